"""docs/guarantees.md names a test for every promise, and each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "guarantees.md"
ROWS = re.findall(r"^\| \*\*(.*?)\*\* \| (.*?) \| (.*) \|$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
NAMED = re.findall(r"\[([^\]]+)\]\(\.\./tests/(\w+\.py)\)", PAGE.read_text("utf-8"))
"""(the name of a test in words, its file)."""


def test_every_promise_has_a_test() -> None:
    assert len(ROWS) > 20 and len({promise for promise, _, _ in ROWS}) == len(ROWS)
    for promise, meaning, tests in ROWS:
        assert meaning and re.fullmatch(r"((• )?\[[^\]]+\]\(\.\./tests/\w+\.py\)(<br>)?)+", tests), promise


@pytest.mark.parametrize("file", sorted({file for _, file in NAMED}))
def test_the_tests_that_are_named_exist(file: str) -> None:
    tree = ast.parse((PAGE.parents[1] / "tests" / file).read_text("utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {"test_" + re.sub(r"[\s']+", "_", words) for words, where in NAMED if where == file}
    assert named <= defined, f"{file} has no {sorted(named - defined)}"
