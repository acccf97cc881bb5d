"""Pages, followed word for word: a block of code is run, or checked where it would take hours or another machine."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

from point_peft import cli

ROOT = Path(__file__).parents[1]
OURS = ("benchmarks", "examples", "point_peft", "tools")
Names = dict[str, Any]
Program = Callable[[Sequence[str]], object]


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the blocks of code of a page."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    return [(language, textwrap.dedent(content)) for _, language, content in found]


def follow(text: str, names: Names, page: str = "page", *, commands_run: bool = True) -> None:
    """Do what the blocks of a text say, in the present folder: run Python and commands, write files.

    `point-peft` is run, or with `commands_run=False` its arguments are read only, as those of other programs are.
    """
    point_peft = run_point_peft if commands_run else read_point_peft
    for language, block in blocks(text):
        if language == "python":
            exec(compile(block, page, "exec"), names)
        elif language == "sh":
            for line in commands_of(block):
                run_line(line, {**PROGRAMS, "point-peft": point_peft})
        elif language in ("yaml", "json"):
            # The first line is a comment with the name of the file.
            Path(block.splitlines()[0].removeprefix("#").strip()).write_text(block, "utf-8")
        else:
            assert language == "text", f"{page} has a block of {language or 'no language'}, which nothing handles"


def commands_of(block: str) -> list[list[str]]:
    """The words of each command, without assignments to variables ahead of it."""
    commands = []
    for line in block.replace("\\\n", "").splitlines():
        for part in re.split(r"\s&&\s", line):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                commands.append(words)
    return commands


def run_line(words: Sequence[str], programs: dict[str, Program]) -> None:
    """Run or check a command."""
    program = re.sub(r"^python3?(\.\d+)?$", "python", Path(words[0]).name)
    assert program in programs, f"nothing handles {shlex.join(words)}"
    programs[program](words[1:])


# ---- programs --------------------------------------------------------------------------------------------------------


def run_point_peft(words: Sequence[str]) -> None:
    assert cli.main(list(words)) == 0, f"point-peft {shlex.join(words)}"


def read_point_peft(words: Sequence[str]) -> None:
    check_arguments(cli.main, words)


class _Read(Exception):
    """The arguments of a program have been read."""


def check_arguments(main: Callable[..., object], words: Sequence[str]) -> None:
    """Let a program read its arguments, and go no further."""
    read = argparse.ArgumentParser.parse_args

    def only_read(parser: argparse.ArgumentParser, *arguments: Any, **more: Any) -> NoReturn:
        read(parser, *arguments, **more)
        raise _Read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", only_read)
        patch.setattr(sys, "argv", [main.__module__, *words])
        try:
            main()
        except _Read:
            return
        except SystemExit:
            pytest.fail(f"{main.__module__} does not take {shlex.join(words)}")
    pytest.fail(f"{main.__module__} has read no arguments")


def check_python(words: Sequence[str]) -> None:
    """`python -m MODULE …` and `python FILE …`; ours have to take the arguments, others to be there."""
    if not words:
        return
    if words[0] != "-m":
        assert (ROOT / words[0]).exists() or Path(words[0]).exists(), f"python {words[0]}: there is no such file"
        words = ["-m", ".".join(Path(words[0]).with_suffix("").parts), *words[1:]]
    _, module, *arguments = words
    if module.split(".")[0] not in OURS:
        assert importlib.util.find_spec(module), f"python -m {module}: there is no such module"
        for word in arguments if module == "pytest" else ():
            assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).exists(), word
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"python -m {module}: there is no such module"
    program = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module)
    assert callable(program.main)
    if arguments:  # without any there is nothing to read, and some programs have none
        check_arguments(program.main, arguments)


def check_launcher(words: Sequence[str]) -> None:
    """`torchrun … -m MODULE …` and `accelerate launch … FILE …`: what is launched."""
    first = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    check_python(words[first:])


def check_pip(words: Sequence[str]) -> None:
    """`pip install`: packages that are pinned, ours with extras that it has."""
    assert words[0] in ("install", "uninstall"), words
    for word in words[1:]:
        if match := re.fullmatch(r"(?:\.|point-peft)\[(.+)\]", word):
            assert set(match[1].split(",")) <= extras(), f"{word}: the extras are {', '.join(sorted(extras()))}"


@cache
def extras() -> frozenset[str]:
    """The extras of our package, as setup.py has them."""
    stated: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", stated.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return frozenset(stated["extras_require"])


def check_make(words: Sequence[str]) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    meant = {word for word in words if "=" not in word}
    assert meant <= targets, f"make has no target {', '.join(meant - targets)}"


def check_hf(words: Sequence[str]) -> None:
    assert list(words[:2]) == ["auth", "login"], words


PROGRAMS: dict[str, Program] = {
    "accelerate": check_launcher,
    "hf": check_hf,
    "make": check_make,
    "pip": check_pip,
    "point-peft": run_point_peft,
    "python": check_python,
    "torchrun": check_launcher,
}
"""Program -> what is done with its words."""
