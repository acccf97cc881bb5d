"""Names and regular expressions: what they match, what they refuse, and that no expression hangs."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from point_peft.errors import MatchError, nearest_names
from point_peft.matching import match_names

pytestmark = pytest.mark.smoke

PARTS = ("", ".attn", ".attn.qkv", ".attn.proj", ".mlp.fc1")
BLOCKS = [f"blocks.blocks.{i}{part}" for i in range(12) for part in PARTS]
NAMES = ["", "encoder", "encoder.first_conv.0", *BLOCKS, "norm", "cls_head_finetune", "cls_head_finetune.0"]


@pytest.mark.parametrize(
    ("entry", "matched"),
    [
        ("1", ["blocks.1", "xblocks.1"]),
        ("blocks.1", ["blocks.1"]),
        ("blocks.11", ["blocks.11"]),
        ("s.1", []),
        (".1", []),
        ("1.qkv", ["blocks.1.qkv"]),
        ("Größe", ["Größe", "a.Größe"]),
        ("größe", []),
        ("blocks.*", []),
    ],
)
def test_a_list_entry_is_a_name_or_a_dotted_suffix(entry: str, matched: list[str]) -> None:
    names = ["blocks.1", "blocks.11", "xblocks.1", "blocks.1.qkv", "Größe", "a.Größe"]
    if matched:
        assert match_names([entry], names) == tuple(matched)
    else:
        with pytest.raises(MatchError, match=f"no module matches '{re.escape(entry)}'"):
            match_names([entry], names)


def test_the_order_is_that_of_the_names_and_nothing_comes_twice() -> None:
    assert match_names(["c", "a", "a", "x.a"], ["x.a", "b", "c", "x.a", "a"]) == ("x.a", "c", "a")
    assert match_names("a|c", ["c", "a", "c"]) == ("c", "a")


def test_no_entries_match_nothing() -> None:
    assert match_names([], NAMES) == ()
    assert match_names((), []) == ()


def test_the_root_is_never_matched() -> None:
    assert "" not in match_names(".*", NAMES)
    assert len(match_names(".*", NAMES)) == len(NAMES) - 1


@pytest.mark.parametrize("patterns", ["", [""], ["qkv", ""], [None], [["qkv"]]])
def test_empty_or_foreign_entries_are_refused(patterns: list[str]) -> None:
    with pytest.raises(MatchError, match=r"modules_to_save.*(empty|non-empty)"):
        match_names(patterns, NAMES, field="modules_to_save")


def test_every_entry_must_match() -> None:
    with pytest.raises(MatchError, match="no module matches 'qvk'"):
        match_names(["qkv", "qvk"], NAMES)
    with pytest.raises(MatchError, match=r"no block matches 'blocks\.77'.*layers"):
        match_names(["blocks.77"], NAMES, what="block", field="layers")


def test_a_miss_names_what_is_near() -> None:
    with pytest.raises(MatchError) as caught:
        match_names(["blocks.*.qvk"], NAMES)
    assert str(caught.value).startswith(
        "no module matches 'blocks.*.qvk' (target_modules); nearest: 'blocks.blocks.0.attn.qkv' (12 modules)"
    )
    assert "given as one string" in str(caught.value)
    with pytest.raises(MatchError, match=r"list \['qkv'\] matches its end"):
        match_names("qkv", NAMES)
    with pytest.raises(MatchError, match=r"nearest: 'blocks.blocks.0.attn.qkv' \(12 modules\)"):
        match_names(r".*\.\d+\.attn\.qvk", NAMES)


@pytest.mark.parametrize(
    ("wanted", "start"),
    [
        ("qvk", "'blocks.blocks.0.attn.qkv' (12 modules)"),
        ("attn.QKV", "'blocks.blocks.0.attn.qkv' (12 modules)"),
        ("blocks.blocks.12", "'blocks.blocks.0' (12 modules)"),
        ("fc", "'blocks.blocks.0.mlp.fc1' (12 modules)"),
        ("cls_head", "'cls_head_finetune'"),
        ("nrom", "'norm'"),
        ("zzz", "none (there are 'encoder', 'blocks', 'norm', 'cls_head_finetune')"),
        ("", "none (there are 'encoder',"),
        ("***", "none (there are 'encoder',"),
        ("日本", "none (there are 'encoder',"),
    ],
)
def test_nearest_names(wanted: str, start: str) -> None:
    assert nearest_names(wanted, NAMES).startswith(start)


def test_nearest_names_of_few_or_many() -> None:
    assert nearest_names("a", []) == "none (there are no modules)"
    assert nearest_names("lora", ["lora_a", "lora_b", "lora_c"], limit=2, what="adapter").count("'lora_") == 2
    assert nearest_names("tsak", ["task", "zzz"], what="adapter") == "'task'"
    assert nearest_names("0", [c * 3 for c in "abcdefgh"]).endswith("'fff', …)")
    assert nearest_names("qvk" * 5000, NAMES)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        (r"blocks\.blocks\.(0|3)\.attn\.qkv", ["blocks.blocks.0.attn.qkv", "blocks.blocks.3.attn.qkv"]),
        (r".*\.1\d\.attn\.(?:qkv|proj)", [f"blocks.blocks.{i}.attn.{n}" for i in (10, 11) for n in ("qkv", "proj")]),
        (r"(?!blocks).*\.0", ["encoder.first_conv.0", "cls_head_finetune.0"]),
        (r"^(?=.*conv)\w+[.]\w+[^a-z]{1,2}$", ["encoder.first_conv.0"]),
        (r"\bnorm\b", ["norm"]),
    ],
)
def test_an_expression_matches_whole_names(pattern: str, matched: list[str]) -> None:
    assert match_names(pattern, NAMES) == tuple(matched)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("blocks.(0", "missing .*at position 7"),
        ("*qkv", "nothing to repeat at position 0"),
        ("[z-a]", "bad character range z-a at position 1"),
        ("a{99999999999999}", "too large"),
        ("a" * 1001, "longer than 1000"),
        ("(" * 101 + "a" + ")" * 101, "more than 100 groups"),
        (r"(a)\1", "a back-reference, which is not supported"),
        ("(?i)qkv", "an inline flag, which is not supported"),
        ("(?i:q)kv", "an inline flag, which is not supported"),
        ("(?<=q)kv", "a look-behind, which is not supported"),
        ("(a)?(?(1)b|c)", "a conditional group, which is not supported"),
    ],
)
def test_an_invalid_expression_says_why(pattern: str, why: str) -> None:
    with pytest.raises(MatchError, match=f"^target_modules: .*{why}"):
        match_names(pattern, NAMES)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(.*a){20}",
        "(.*a){20}" * 20,
        "(a*)*" * 100,
        "(" * 100 + "a*" + ")*" * 100,
        "(((a{1000}){1000}){1000}){1000}",
        "(((a?){1000}){1000}){1000}b",
        ".*" * 500,
        "(?=(?=(?=.*a).*a).*a)*" * 33,
        "(|a|aa)+" * 100 + "b",
    ],
)
def test_no_expression_hangs(pattern: str) -> None:
    names = ["a" * 300 + "!" * (i % 2) for i in range(400)] + [f"{'a' * i}.b" for i in range(100)]
    began = time.process_time()
    try:
        match_names(pattern, names)
    except MatchError as error:
        assert re.search("takes too long|no module matches", str(error))
    assert time.process_time() - began < 15


_PIECES = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\W", "[ab]", "[^a]", r"[^\w.]", "[a-]", "1", "é", r"\b", r"\B", "^", "$"]
)
_COUNTS = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,3}"])
_EXPRESSIONS = st.recursive(
    _PIECES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        st.tuples(inner, _COUNTS).map("(?:{0[0]}){0[1]}".format),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(_EXPRESSIONS, st.text(alphabet="ab.1é", min_size=1, max_size=6))
def test_expressions_mean_what_re_means(pattern: str, name: str) -> None:
    expected = re.fullmatch(pattern, name) is not None
    if expected:
        assert match_names(pattern, [name]) == (name,)
    else:
        with pytest.raises(MatchError, match="no module matches"):
            match_names(pattern, [name])
