"""The examples in the docstrings of the doors run, and print what they say."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from point_peft import PointPeftModel, describe, get_peft_model, inject_adapter

METHODS = [
    PointPeftModel.add_adapter,
    PointPeftModel.load_adapter,
    PointPeftModel.build_memory_bank,
    PointPeftModel.forward_tasks,
    PointPeftModel.parameter_groups,
]


def run(door: Callable[..., Any], names: dict[str, Any]) -> dict[str, Any]:
    """Run the examples of a docstring, and give the names that they have bound."""
    (test,) = doctest.DocTestFinder(recurse=False).find(door, door.__name__, globs=dict(names))
    assert test.examples
    printed: list[str] = []
    failures = doctest.DocTestRunner().run(test, out=printed.append, clear_globs=False)
    assert not failures.failed, "".join(printed)
    return test.globs


@pytest.mark.parametrize("door", [get_peft_model, inject_adapter, describe], ids=lambda door: door.__name__)
def test_an_example_runs_by_itself(door: Callable[..., Any]) -> None:
    run(door, {})


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_the_example_of_a_method_goes_on_from_the_first(
    method: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(method, run(get_peft_model, {}))
