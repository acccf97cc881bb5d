"""Flags that come from the fields of a dataclass, and the values that their texts stand for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.errors import PointPeftError
from point_peft.training.flags import add_flags, field_docs, given_flags, value_of
from point_peft.training.recipe import Recipe
from point_peft.training.train_command import without_processes


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """A field of every kind that options have."""

    count: int = 3
    share: float | None = None
    """A part, in %; of `all`."""
    word: str | None = "a"
    names: Sequence[str] = ("x", "y")
    weights: Literal["none", "balanced"] | Sequence[float] = "none"
    precision: Literal["no", "bf16"] | None = None
    codes: Mapping[str, Sequence[int]] | None = None
    quick: bool = False
    hidden: int = 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="try")
    add_flags(made, Kinds, "kinds", without=("hidden",))
    return made


def given(*arguments: str) -> dict[str, Any]:
    return given_flags(parser().parse_args(arguments), Kinds)


def test_what_is_not_given_has_no_value() -> None:
    assert given() == {}


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--count", "7"], {"count": 7}),
        (["--count", "7.5"], {"count": 7.5}),
        (["--share", "1e-3"], {"share": 0.001}),
        (["--share=-.5"], {"share": -0.5}),
        (["--share", "2"], {"share": 2}),
        (["--share", "None"], {"share": None}),
        (["--share", "x"], {"share": "x"}),
        (["--share", "no"], {"share": "no"}),
        (["--share", "12:30"], {"share": "12:30"}),
        (["--word", "5"], {"word": "5"}),
        (["--word", "{a: b"], {"word": "{a: b"}),
        (["--word", "none"], {"word": None}),
        (["--names", "x, y,z"], {"names": ["x", "y", "z"]}),
        (["--names", "1"], {"names": ["1"]}),
        (["--names", ""], {"names": []}),
        (["--names", "[x, y]"], {"names": ["x", "y"]}),
        (["--weights", "balanced"], {"weights": "balanced"}),
        (["--weights", "1,2.5,1e-1"], {"weights": [1, 2.5, 0.1]}),
        (["--precision", "no"], {"precision": "no"}),
        (["--codes", "{ground: [2, 9], tree: [5]}"], {"codes": {"ground": [2, 9], "tree": [5]}}),
        (["--quick"], {"quick": True}),
        (["--no-quick"], {"quick": False}),
        (["--count", "1", "--quick"], {"count": 1, "quick": True}),
    ],
)
def test_values(arguments: list[str], value: dict[str, Any]) -> None:
    found = given(*arguments)
    assert found == value and {name: type(own) for name, own in found.items()} == {
        name: type(own) for name, own in value.items()
    }


def test_a_text_that_is_no_value_is_told_with_its_flag_and_place() -> None:
    with pytest.raises(PointPeftError, match=r"--codes is '\{ground: \[2', which is no value \(line 1, column 12: "):
        given("--codes", "{ground: [2")


@pytest.mark.parametrize("flag", ["--hidden", "--nothing"])
def test_other_flags_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([flag, "1"])
    assert f"unrecognized arguments: {flag} 1" in capsys.readouterr().err


def test_help_is_what_stands_below_a_field_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert field_docs(Kinds) == {"share": "A part, in %; of all."}
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--share VALUE A part, in %; of all. (default: None)" in text
    assert "--names VALUE (default: x,y)" in text and "--quick, --no-quick" in text


@pytest.mark.parametrize("kind", [Recipe, DataOptions, Preparation])
def test_every_default_may_be_given_as_the_help_shows_it(kind: type[Any]) -> None:
    asked = argparse.ArgumentParser()
    add_flags(asked, kind, "all", without=("preparation",))
    arguments = []
    for item in fields(kind):
        if item.name != "preparation" and not isinstance(item.default, bool):
            text = ",".join(item.default) if isinstance(item.default, tuple) else str(item.default)
            arguments += [f"--{item.name.replace('_', '-')}", text]
    assert kind(**given_flags(asked.parse_args(arguments), kind)) == kind()


def test_a_recipes_file_means_what_people_mean(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("lr: 1e-3\nmixed_precision: no\naugment: [none]\nclip: null\nmemory_bank: false\n")
    expected = Recipe(lr=1e-3, mixed_precision="no", augment=["none"], clip=None, memory_bank=False)
    assert Recipe.from_yaml(file) == expected
    file.write_text(expected.to_yaml())
    assert Recipe.from_yaml(file) == expected


def test_a_value_of_a_method() -> None:
    assert value_of("q,v", Sequence[str], "--set target_modules") == ["q", "v"]


@pytest.mark.parametrize("given", [["--processes", "2"], ["--processes=2"]])
def test_processes_are_started_with_the_same_words(given: list[str]) -> None:
    assert without_processes(["train", "d", *given, "--lr", "2"]) == ["train", "d", "--lr", "2"]
