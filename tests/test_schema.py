"""Values against annotations: what fits, in which words, and the way to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from point_peft.schema import (
    MAX_INTEGER,
    Count,
    FrozenMapping,
    Limit,
    MisfitError,
    fits,
    from_json,
    frozen,
    limits_of,
    spell,
    to_json,
)


@dataclass(frozen=True, kw_only=True)
class Leaf:
    name: str
    side: Literal["left", "right"] = "left"


@dataclass(frozen=True, kw_only=True)
class Tree:
    leaves: tuple[Leaf, ...]
    best: Leaf | None = None
    steps: tuple[int | str, ...] = ()
    ranks: Mapping[str, int] = FrozenMapping()
    count: Count = 1
    share: Annotated[float | None, Limit("at most 1, or None", lambda share: share <= 1)] = None


def test_json_and_back() -> None:
    leaf = Leaf(name="a", side="right")
    tree = Tree(leaves=(leaf,), best=leaf, steps=(0, "x"), ranks=FrozenMapping({"b": 2, "a": 1}), share=0.5)
    data = json.loads(json.dumps(to_json(tree), sort_keys=True))
    again = from_json(data, Tree)
    assert again == tree and hash(again) == hash(tree) and list(again.ranks) == ["b", "a"]
    assert from_json({"leaves": []}, Tree) == Tree(leaves=())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"leaves": None}, "None where tuple is expected"),
        ({"leaves": [{"name": 3}]}, "3 where str is expected"),
        ({"leaves": [{"side": "left"}]}, "where Leaf is expected"),
        ({"best": {"name": "a", "side": "up"}}, "'up' where Literal is expected"),
        ({"best": {"name": "a", "more": 1}}, "where Leaf is expected"),
        ({"steps": [1.5]}, "1.5 where .* is expected"),
        ({"ranks": [["a", 1], ["a", 2]]}, "where Mapping is expected"),
        ({"ranks": [["a", "b"]]}, "'b' where int is expected"),
        ({"count": True}, "True where int is expected"),
        ({"count": MAX_INTEGER + 1}, "16777217 where int is expected"),
        ({"share": float("nan")}, "nan where float is expected"),
        ({"other": 1}, "where Tree is expected"),
    ],
)
def test_the_innermost_value_that_does_not_fit_is_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(MisfitError, match=match):
        from_json({"leaves": [], **change}, Tree)


@pytest.mark.parametrize(
    ("hint", "words", "fitting", "other"),
    [
        (int, f"an integer, at most {MAX_INTEGER}", [0, -3], [True, 1.0, 10**9, None]),
        (float, "a finite number", [1, 0.5], [True, float("inf"), 10**400, "1"]),
        (bool, "True or False", [True], [1, None]),
        (str | None, "a string or None", ["a", None], [b"a", 3]),
        (Literal["a", 1], "'a' or 1", ["a", 1], [True, "b"]),
        (Sequence[int], f"a list of an integer, at most {MAX_INTEGER}", [(), (1,)], [[1], ("a",)]),
        (Mapping[str, bool], "a mapping of a string to True or False", [FrozenMapping({"a": True})], [{"a": True}]),
        (Leaf, "Leaf", [Leaf(name="a")], [{"name": "a"}]),
    ],
)
def test_what_fits_and_how_it_is_spelled(hint: Any, words: str, fitting: list[Any], other: list[Any]) -> None:
    assert spell(hint) == words
    assert all(fits(value, hint) for value in fitting) and not any(fits(value, hint) for value in other)


def test_limits_stand_at_their_fields() -> None:
    limits = limits_of(Tree)
    assert {name: limit.words for name, (limit,) in limits.items()} == {
        "count": "1 or more",
        "share": "at most 1, or None",
    }
    assert limits["count"][0].holds(1) and not limits["count"][0].holds(0)


def test_frozen_values_can_be_hashed() -> None:
    assert frozen(["b", "a"]) == ("b", "a") and frozen({"b", "a"}) == ("a", "b") and frozen("a") == "a"
    assert hash(frozen({"a": 1})) == hash(FrozenMapping({"a": 1})) and repr(frozen({"a": 1})) == "{'a': 1}"
