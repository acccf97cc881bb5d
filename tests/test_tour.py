"""docs/tour.md, followed word for word in an empty folder: what a block prints stands below it."""

from __future__ import annotations

import codeop
import io
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from point_peft import cli
from tests.hub_server import HubServer

pytestmark = pytest.mark.pages

pytest_plugins = ["tests.hub_fixture"]

PAGE = Path(__file__).parents[1] / "docs" / "tour.md"
LEARNT = re.compile(r"(\d+)%|(?<=^digit )\d is \w+", flags=re.MULTILINE)
"""What depends on the rounding of another processor: shares of the clouds, and what single clouds are taken for."""
FAR = 25
"""Points by which a share of 100 clouds may differ."""


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the blocks after the installation."""
    installation, *rest = re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)
    assert "pip install" in installation[1]
    return rest


def run_python(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, PAGE.name, "exec"), names)


def run_commands(block: str, _: dict[str, Any]) -> None:
    for line in block.splitlines():
        program, *words = shlex.split(line)
        assert program == "point-peft" and cli.main(words) == 0, line


DOINGS: dict[str, Callable[[str, dict[str, Any]], None]] = {"python": run_python, "sh": run_commands}


def is_near(stated: str, printed: str) -> bool:
    """The same but for what is learnt, where shares are near; a line of "…" stands for any lines."""
    pieces = [re.escape(LEARNT.sub("%", piece.strip("\n"))) for piece in re.split(r"^ *…$", stated, flags=re.MULTILINE)]
    if not re.fullmatch(r"(\n.*)*\n".join(pieces), LEARNT.sub("%", printed.strip("\n"))):
        return False
    shares = zip(LEARNT.findall(stated), LEARNT.findall(printed), strict=True)
    return all(abs(int(one or 0) - int(other or 0)) <= FAR for one, other in shares)


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_the_tour(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    done = blocks(PAGE.read_text("utf-8"))
    for (language, block), (following, said) in zip(done, [*done[1:], ("", "")], strict=True):
        if language in DOINGS:
            shown = io.StringIO()
            with redirect_stdout(shown), redirect_stderr(shown):
                DOINGS[language](block, names)
            stated = said if following == "text" else ""
            assert is_near(stated, shown.getvalue()), f"{block}prints\n{shown.getvalue()}and not\n{stated}"
    assert len(hub.commits("alice/digits")) == 2, "the repository is made, and one push"


def test_every_block_can_be_pasted_into_a_session() -> None:
    """A session ends a compound statement at an empty line, and none before it."""
    for language, block in blocks(PAGE.read_text("utf-8")):
        lines: list[str] = []
        for line in [*block.splitlines(), ""] if language == "python" else ():
            lines.append(line)
            if codeop.compile_command("\n".join(lines), PAGE.name):
                lines = []
        assert not lines, f"not complete:\n{block}"


def test_what_is_learnt_may_differ_and_nothing_else() -> None:
    assert is_near("after: 75% of\n…\nall\n", "after: 70% of\none\ntwo\nall\n")
    assert is_near("digit 6 is even\ndigit 2 is even\n", "digit 6 is even\ndigit 7 is odd\n")
    assert not is_near("after: 75%\n", "after: 12%\n")
    assert not is_near("True\n", "False\n") and not is_near("one\n…\nall\n", "one\ntwo\n")
