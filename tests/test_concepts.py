"""docs/concepts.md: its code prints what stands below it, its figures are those that tools.concepts draws."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tools import architecture, concepts, overview

PAGE = Path(__file__).parents[1] / "docs" / "concepts.md"


def test_the_code_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    assert len(found) == PAGE.read_text("utf-8").count("```python")
    for block, stated in found:
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, PAGE.name, "exec"), names)
        assert printed.getvalue() == stated


@pytest.mark.parametrize("name", concepts.FIGURES)
def test_the_figures_are_those_of_the_tool(name: str) -> None:
    drawn = (concepts.OUT / f"{name}.svg").read_text("utf-8")
    assert drawn == concepts.FIGURES[name](), "draw them anew: python -m tools.concepts"
    assert f"concepts/{name}.svg" in PAGE.read_text("utf-8"), "the page does not show it"


@pytest.mark.parametrize("tool", [overview, architecture], ids=["overview", "architecture"])
def test_other_figures_are_those_of_their_tools(tool: Any) -> None:
    assert tool.OUT.read_text("utf-8") == tool.picture(), f"draw it anew: python -m {tool.__name__}"


def test_no_figure_is_left_over() -> None:
    assert {path.stem for path in concepts.OUT.glob("*")} == set(concepts.FIGURES)
