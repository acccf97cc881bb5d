"""The model card: valid for the Hub's own client, safe against names, and its owner's where it is not ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from point_peft import METHODS, LoraConfig, PeftConfig, PointPeftError, PointPeftModel, get_peft_model
from point_peft.hub.card import (
    About,
    base_licence,
    carried,
    citation,
    for_repository,
    kept,
    merged,
    render,
    with_base_licence,
)
from point_peft.hub.licences import forbids_commerce
from tests.test_state import CONFIG, backbone

ABOUT = About(
    methods={"POINT_PEFT": citation("POINT_PEFT"), "LORA": citation("LORA")},
    base_kind="PointTransformer",
    base_model="someone/point-mae",
    revision="v1",
    parameters=612_345,
    all_parameters=22_612_345,
    size=2_460_000,
    modules={"Block": 12, "Linear": 24},
    heads=("cls_head_finetune",),
    results={"ModelNet40": {"accuracy": 94.2, "mAcc": 91}, "ScanObjectNN": {"accuracy": 89.7}},
    datasets=("someone/modelnet40",),
    license="mit",
    pipeline_tag="other",
    tags=("classification",),
    repo_id="alice/adapter",
)
PLAIN = replace(ABOUT, base_model=None, results={}, datasets=(), license=None, pipeline_tag=None, tags=(), repo_id=None)
NASTY = [
    "a: b\nlicense: evil",
    "quote \" and ' and `",
    "\n---\n\n# mine\n",
    "<!-- end point-peft -->",
    "\n<!-- end point-peft -->\n",
    "```\n<script>alert(1)</script>",
    "[x](javascript:alert(1)) | cell",
    "!!python/object/apply:os.system [id]",
    "{a: &b [*b]}",
    "null",
    "012",
    "\x00\x1b\x85\u2028\ud83d",
    "-->",
]


def fields(text: str) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


# ---- what is written ----


def test_the_yaml_is_what_the_client_reads() -> None:
    parsed = ModelCard(render(ABOUT))
    data = parsed.data.to_dict()
    index = data.pop("model-index")
    assert data == {
        "base_model": "someone/point-mae",
        "base_model_relation": "adapter",
        "datasets": ["someone/modelnet40"],
        "library_name": "point-peft",
        "license": "mit",
        "metrics": ["accuracy", "mAcc"],
        "pipeline_tag": "other",
        "tags": ["point-cloud", "point-peft", "lora", "classification"],
    }
    (entry,) = index
    assert entry["name"] == "adapter" and [r["dataset"]["name"] for r in entry["results"]] == list(ABOUT.results)
    results = parsed.data.get("eval_results")
    assert results is not None and all(isinstance(result, EvalResult) for result in results)
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in results] == [
        ("ModelNet40", "accuracy", 94.2),
        ("ModelNet40", "mAcc", 91),
        ("ScanObjectNN", "accuracy", 89.7),
    ]


def test_what_is_not_known_is_not_stated() -> None:
    assert fields(render(PLAIN)) == {"library_name": "point-peft", "tags": ["point-cloud", "point-peft", "lora"]}
    text = render(PLAIN)
    assert "## Results" not in text and 'from_pretrained(backbone, "path/to/this/folder")' in text


def test_the_text_says_what_it_is() -> None:
    text = render(ABOUT)
    for line in (
        "| Base | [someone/point-mae](https://huggingface.co/someone/point-mae), revision v1 (PointTransformer) |",
        "| Parameters | 612,345, 2.71 % of 22,612,345 |",
        "| File | 2.5 MB |",
        "| Adapted modules | 12 Block, 24 Linear |",
        r"| Own modules | cls\_head\_finetune |",
        "| ModelNet40 | accuracy | 94.2 |",
        'model = PointPeftModel.from_pretrained(backbone, "alice/adapter")',
    ):
        assert f"\n{line}\n" in text
    assert "https://arxiv.org/abs/2310.03059" in text and "https://arxiv.org/abs/2106.09685" in text
    named = render(replace(ABOUT, adapter="tasks/a"))
    assert 'from_pretrained(backbone, "alice/adapter", subfolder="tasks/a")' in named
    assert fields(named)["model-index"][0]["name"] == "adapter/tasks/a"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_citation(method: str) -> None:
    found = citation(method)
    assert found and all("https://" in block for block in found)


@pytest.mark.parametrize(
    "base", ["/home/alice/x.pth", "./x", "a/b/c", "", "-x", "x--y", "a b", "ä/b", "x" * 97, *NASTY]
)
def test_a_base_that_is_not_on_the_hub_is_text_only(base: str) -> None:
    data = fields(render(replace(ABOUT, base_model=_printable(base))))
    assert base in ("null", "012") or not {"base_model", "base_model_relation"} & set(data)


def _printable(text: str) -> str:
    """Without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("nasty", [_printable(text) for text in NASTY])
def test_names_cannot_change_the_card(nasty: str) -> None:
    about = About(
        methods={nasty: [nasty]},
        base_kind=nasty,
        base_model=nasty,
        revision=nasty,
        parameters=1,
        all_parameters=0,
        size=1,
        modules={nasty: 1},
        heads=[nasty],
        results={nasty: {nasty: 1.0}},
        datasets=[nasty],
        license=nasty,
        pipeline_tag=nasty,
        tags=[nasty],
    )
    text = render(about)
    data = fields(text)
    assert data["license"] == data["pipeline_tag"] == data["tags"][-1] == data["datasets"][0] == nasty
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == nasty
    assert set(data) <= {
        *("base_model", "base_model_relation", "datasets", "library_name", "license", "metrics", "model-index"),
        *("pipeline_tag", "tags"),
    }
    assert merged(text, text) == text and merged("mine\n", text).count("\n<!-- end point-peft -->\n") == 1
    assert text.count("\n```") == 2 and "\n<script" not in text and "\n# mine" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "94 %", None])
def test_results_are_numbers(value: Any) -> None:
    with pytest.raises(PointPeftError, match="About.results is .*; allowed: dataset -> metric -> a finite number"):
        replace(ABOUT, results={"x": {"accuracy": value}})


def test_the_name_of_a_section_is_plain() -> None:
    for adapter in ("a -->", "", "-a", "a\nb", "ä"):
        with pytest.raises(PointPeftError, match="About.adapter is .*; allowed: letters"):
            replace(ABOUT, adapter=adapter)


# ---- what is there already ----


MINE = """---
license: apache-2.0   # not yet decided
tags:
- mine
- point-cloud
widget: {{x: 1}}
date: 2026-01-02
empty:
---
My introduction.

{section}

## My remarks
"""


def test_nothing_there() -> None:
    assert merged(None, render(ABOUT)) == kept(None, render(ABOUT)) == render(ABOUT)
    assert fields(merged("", render(ABOUT))) == fields(render(ABOUT))


def test_an_owner_s_edits_survive() -> None:
    section = render(PLAIN).split("---\n", 2)[2].strip()
    once = merged(MINE.format(section=section), render(ABOUT))
    data = yaml.safe_load(once.split("---\n")[1])
    assert data["widget"] == {"x": 1} and str(data["date"]) == "2026-01-02" and data["empty"] is None
    assert data["license"] == "mit" and data["library_name"] == "point-peft"
    assert data["tags"] == ["mine", "point-cloud", "point-peft", "lora", "classification"]
    assert "---\nMy introduction.\n\n<!-- begin" in once and once.endswith("<!-- end point-peft -->\n\n## My remarks\n")
    assert once.count("from_pretrained(backbone") == 1 and '"alice/adapter"' in once
    assert merged(once, render(ABOUT)) == once


def test_yaml_in_which_nothing_changes_stays_to_the_letter() -> None:
    text = render(ABOUT).replace("license: mit", "license:    'mit'  # chosen by my lawyer")
    assert merged(text, render(ABOUT)) == text
    # What the new one does not state is its owner's.
    assert merged(text, render(replace(PLAIN, repo_id="alice/adapter"))).startswith(text[: text.index("<!--")])


def test_a_card_without_our_section_gets_one_by_a_push_and_not_by_a_save() -> None:
    for text in (
        "Mine.",
        "Mine.\n",
        "---\nlicense: mit\n---\n",
        "---\nlicense: mit\n---\n\nMine.\r\n",
        "\ufeffMine.\n",
    ):
        assert kept(text, render(PLAIN)) == text
        once = merged(text, render(PLAIN))
        assert ("Mine." in once) == ("Mine." in text) and fields(once)["library_name"] == "point-peft"
        assert fields(once).get("license") == ("mit" if "mit" in text else None)
        assert merged(once, render(PLAIN)) == once == kept(once, render(PLAIN))


def test_line_ends_stay_as_they_are() -> None:
    text = merged(MINE.format(section="").replace("\n", "\r\n"), render(ABOUT))
    assert text.count("\n") == text.count("\r\n") and merged(text, render(ABOUT)) == text
    assert fields(text)["license"] == "mit"


def test_two_adapters_in_one_card() -> None:
    a, b = (replace(ABOUT, adapter=name, methods={method: []}) for name, method in (("a", "LORA"), ("b", "SSF")))
    b = replace(b, base_model="someone/other", results={"x": {"accuracy": 1}})
    both = merged(merged("Intro.\n", render(a)), render(b))
    assert both.index("Intro.") < both.index('subfolder="a"') < both.index('subfolder="b"')
    data = fields(both)
    assert data["base_model"] == ["someone/point-mae", "someone/other"]
    assert {"lora", "ssf"} <= set(data["tags"])
    assert {entry["name"] for entry in yaml.safe_load(both.split("---\n")[1])["model-index"]} == {
        "adapter/a",
        "adapter/b",
    }
    assert merged(merged(both, render(a)), render(b)) == merged(both, render(b))
    again = merged(both, render(replace(a, parameters=7)))
    assert "| Parameters | 7," in again and again.count("<!-- begin") == 2


def test_results_of_others_stay() -> None:
    theirs = {
        "name": "mine",
        "results": [{"task": {"type": "x"}, "dataset": {"name": "d", "type": "d"}, "metrics": []}],
    }
    text = "---\n" + yaml.safe_dump({"model-index": [theirs], "tags": "single"}) + "---\n"
    data = yaml.safe_load(merged(text, render(ABOUT)).split("---\n")[1])
    assert data["model-index"][0] == theirs and data["model-index"][1]["name"] == "adapter"
    assert data["tags"][0] == "single"


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("---\na: [1\n---\n", "cannot be read: while parsing"),
        ("---\na: b: c\n---\n", "cannot be read: mapping values are not allowed"),
        ("---\n- a\n---\n", r"is \['a'\], not fields"),
        ("---\njust text\n---\n", "is 'just text', not fields"),
        ("---\na: !!python/object:x.y {}\n---\n", "cannot be read: could not determine a constructor"),
        ("---\na: 2026-13-45\n---\n", "cannot be read: month must be in"),
        ("---\na: !!int ''\n---\n", "cannot be read"),
        ("---\na: !!bool x\n---\n", "cannot be read"),
        ("---\na: !!timestamp x\n---\n", "cannot be read"),
        ("---\na: \x00\n---\n", "cannot be read: unacceptable character"),
        ("---\na: " + "[" * 5000 + "\n---\n", "cannot be read"),
        ("---\nyes: 1\n---\n", "names a field True: put it in quotes"),
        ("---\nlicense: mit\n", "begins with '---', but no block of YAML"),
    ],
)
def test_broken_yaml_is_refused(front: str, said: str) -> None:
    with pytest.raises(PointPeftError, match=f"the .*card .*{said}"):
        merged(front + "Mine.", render(ABOUT))
    assert kept(front + "Mine.", render(ABOUT)) == front + "Mine."


@pytest.mark.parametrize(
    "marks",
    [
        "<!-- begin point-peft -->",
        "<!-- end point-peft -->",
        "<!-- end point-peft -->\n<!-- begin point-peft -->",
        "<!-- begin point-peft a -->\n<!-- end point-peft b -->",
        "<!-- begin point-peft -->\n<!-- begin point-peft -->\n<!-- end point-peft -->",
        "<!-- begin point-peft -->\n<!-- end point-peft -->\n" * 2,
    ],
)
def test_broken_marks_are_refused(marks: str) -> None:
    with pytest.raises(PointPeftError, match="the card needs one line '<!-- begin point-peft.* and after it one"):
        merged(f"Mine.\n{marks}\n", render(ABOUT))


@settings(max_examples=75)
@given(
    text=st.text(
        alphabet=st.sampled_from("-a:#\n\r <!>[]{}&*'\"") | st.characters(exclude_categories=["Cs"]), max_size=60
    )
)
def test_whatever_is_there_nothing_is_lost(text: str) -> None:
    for existing in (text, f"---\n{text}\n---\n", f"---\nx: 1\n---\n{text}\n"):
        try:
            once = merged(existing, render(PLAIN))
        except PointPeftError:
            continue
        assert merged(once, render(PLAIN)) == once
        assert fields(once)["library_name"] == "point-peft"
    assert text.removeprefix("\ufeff") in merged(f"# x\n{text}", render(PLAIN)).removeprefix("# x\n") or "\r" in text


def test_text_of_a_folder_s_card_arrives_where_there_is_none() -> None:
    edited = merged("Mine.\n", render(PLAIN))
    assert merged(render(ABOUT), edited).endswith(edited.split("---\n", 2)[2])
    assert merged("Other.\n", edited).count("Mine.") == 0 and "Other.\n" in merged("Other.\n", edited)
    assert merged("Other.\n", "Mine.\n") == "Other.\n"
    both = merged(render(PLAIN), "Mine.\n")
    assert "---\nMine.\n\n<!-- begin point-peft -->\n" in both and merged(both, "Mine.\n") == both


def test_the_cards_of_a_push_become_one() -> None:
    card, other = render(PLAIN).encode(), render(replace(PLAIN, parameters=7)).encode()
    files = {"adapter_config.json": b"{}", "README.md": b"Mine.\n" + card.split(b"---\n", 2)[2], "a/b/README.md": other}
    found = for_repository(files, "alice/x")
    assert list(found) == ["adapter_config.json", "README.md"] and found["adapter_config.json"] == b"{}"
    text = found["README.md"].decode()
    for line in (
        'model = PointPeftModel.from_pretrained(backbone, "alice/x")',
        'model = PointPeftModel.from_pretrained(backbone, "alice/x", subfolder="a/b")',
        "<!-- begin point-peft -->",
        "<!-- end point-peft a/b -->",
        "Mine.",
    ):
        assert text.count(f"\n{line}\n") == 1
    again = for_repository({"a/b/README.md": other}, "alice/x")["README.md"].decode()
    assert merged(text, again) == text and "path/to" not in text
    assert for_repository({"x/README.md": b"Mine."}, "alice/x") == {"README.md": b"Mine."}
    assert for_repository({"x": b"\xff"}, "alice/x") == {"x": b"\xff"}
    with pytest.raises(PointPeftError, match="'README.md' is not a text in UTF-8"):
        for_repository({"README.md": b"\xff"}, "alice/x")


# ---- the licence of the base ----

NC = "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("licence", "forbids"),
    [
        *((name, True) for name in (NC, "cc-by-nc-sa-2.0", "fair-noncommercial-research-license", "apple-amlr")),
        *((name, True) for name in ("intel-research", "h-research", "acme-nc-1.0")),
        *(
            (name, False)
            for name in ("mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "openrail", "ncsa")
        ),
    ],
)
def test_identifiers_of_licences_that_forbid_commercial_use(licence: str, forbids: bool) -> None:
    assert forbids_commerce(licence) == forbids


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("base", [None, "facebook/sonata", "my `weights`.pth licensed `mit`"])
def test_an_adapter_s_section_says_which_weights_it_needs(base: str | None, line_end: str) -> None:
    shown = {None: "its base", "facebook/sonata": "[facebook/sonata](https://huggingface.co/facebook/sonata)"}
    plain = replace(ABOUT, base_model=base)
    text = render(replace(plain, base_license=NC)).replace("\n", line_end)
    assert text.count("## Licence") == 1 and f" licensed `{NC}`, which forbids commercial use" in text
    assert f"The adapter works only with the weights of {shown.get(base, 'my')}" in text
    assert base_licence(text, "") == NC and base_licence(text, "other") is None
    without = render(plain).replace("\n", line_end)
    assert base_licence(without, "") is None and with_base_licence(without, "", base, NC) == text
    assert with_base_licence(text, "", base, NC) == text and with_base_licence(text, "other", base, NC) == text
    other = with_base_licence(text, "", base, "mit")
    assert base_licence(other, "") == "mit" and "commercial" not in other and len(other) < len(text)
    assert merged(text, text) == text


def test_a_licence_that_forbids_commercial_use_is_the_card_s_where_it_states_none() -> None:
    text = render(PLAIN)
    for once in (carried(text, [NC]), carried(text, ["mit", None, NC])):
        assert fields(once) == {**fields(text), "license": NC} and carried(once, [NC]) == once
    assert carried(text, []) == carried(text, ["mit", None, "other"]) == text
    named = fields(carried(text.replace("\n", "\r\n"), ["acme-nc-1.0"]))
    assert (named["license"], named["license_name"]) == ("other", "acme-nc-1.0"), "the Hub does not know it"


@pytest.mark.parametrize("stated", [NC, "cc-by-nc-sa-4.0", "other", "unknown", ["mit", NC]])
def test_a_stated_licence_that_does_not_say_otherwise_stays(stated: Any) -> None:
    text = "---\n" + yaml.safe_dump({"license": stated}) + "---\nMine.\n"
    assert carried(text, [NC]) == text


@pytest.mark.parametrize("stated", ["mit", ["mit", "apache-2.0"], "other"])
def test_a_stated_licence_that_says_otherwise_stays_with_a_warning(stated: Any) -> None:
    text = "---\n" + yaml.safe_dump({"license": stated, "license_name": "acme-free"}) + "---\nMine.\n"
    with pytest.warns(UserWarning, match=f"says license '(mit|acme-free).*'{NC}', which forbids commercial use"):
        assert carried(text, [NC]) == text


# ---- in a folder ----


def saved_card(folder: Path, base_license: str | None = None, **base: Any) -> str:
    config = PeftConfig(tuners=[CONFIG, LoraConfig()], **base)
    model = get_peft_model(backbone(), config)
    model.save_pretrained(folder, base_license=base_license)
    return (folder / "README.md").read_text(encoding="utf-8", errors="replace")


def test_a_save_writes_it(tmp_path: Path) -> None:
    text = saved_card(tmp_path, base_model_name_or_path="someone/x", revision="r")
    model = PointPeftModel.from_pretrained(backbone(), tmp_path)
    count = sum(parameter.numel() for parameter in model.adapters.parameters())
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert f"| Parameters | {count:,}, " in text and f"| File | {size / 1000:.1f} kB |" in text
    assert r"| Method | POINT\_PEFT + LORA |" in text and "(PointTransformer)" in text
    assert r"| Own modules | cls\_head\_finetune |" in text and "2 Block" in text
    assert fields(text)["base_model"] == "someone/x" and fields(text)["base_model_relation"] == "adapter"


def test_a_save_passes_the_licence_of_the_base_on(tmp_path: Path) -> None:
    with pytest.raises(PointPeftError, match="base_license is 'CC BY-NC 4.0'; allowed: an identifier as the Hub has"):
        saved_card(tmp_path, base_license="CC BY-NC 4.0")
    assert not (tmp_path / "adapter_config.json").exists()
    text = saved_card(tmp_path, base_license=NC, base_model_name_or_path="facebook/sonata")
    assert fields(text)["license"] == base_licence(text, "") == NC
    assert saved_card(tmp_path, base_license=NC, base_model_name_or_path="facebook/sonata") == text
    (tmp_path / "README.md").write_text(text.replace(f"license: {NC}", "license: mit"), encoding="utf-8")
    with pytest.warns(UserWarning, match="the card says license 'mit'"):
        text = saved_card(tmp_path, base_license="cc-by-nc-sa-4.0")
    assert fields(text)["license"] == "mit" and base_licence(text, "") == "cc-by-nc-sa-4.0"


def test_a_second_save_writes_its_section_alone(tmp_path: Path) -> None:
    text = saved_card(tmp_path)
    (tmp_path / "README.md").write_bytes(
        ("Mine\udcff.\n" + text[text.index("<!--") :]).encode("utf-8", "surrogateescape")
    )
    saved_card(tmp_path, base_model_name_or_path="someone/y")
    data = (tmp_path / "README.md").read_bytes()
    assert b"Mine\xff.\n" in data and b"someone/y" in data and b"base_model: someone/y" in data


def test_a_card_that_cannot_be_read_does_not_cost_the_adapter(tmp_path: Path) -> None:
    text = saved_card(tmp_path).replace("library_name: ", "library_name: [")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match="README.md is left as it is: the YAML at the beginning of the card"):
        saved_card(tmp_path, base_model_name_or_path="someone/y")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    model = PointPeftModel.from_pretrained(backbone(), tmp_path)
    assert model.adapters["default"].config.base_model_name_or_path == "someone/y"  # type: ignore[union-attr]


def test_a_link_stays(tmp_path: Path) -> None:
    text = saved_card(tmp_path / "a")
    (tmp_path / "secret").write_text(text, encoding="utf-8")
    (tmp_path / "a" / "README.md").unlink()
    (tmp_path / "a" / "README.md").symlink_to(tmp_path / "secret")
    saved_card(tmp_path / "a", base_model_name_or_path="someone/y")
    assert (tmp_path / "secret").read_text(encoding="utf-8") == text and (tmp_path / "a" / "README.md").is_symlink()
