"""Links of pages that lead out of docs/, and the pages that they lead to on the site.

A page is read on GitHub too, where `../point_peft/model.py` leads to the file. The site has a page for each file and
each folder that some page leads to.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "README.md"}
"""Pages at the top of the repository -> their place on the site."""
CODE = re.compile(r"^( *)(`{3,})[^\n]*\n.*?^\1\2 *$|(`+)[^`].*?\3", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".sh": "sh"}
HIDDEN = "---\nsearch:\n  exclude: true\n---\n"


def origin(place: str) -> str:
    """The path in the repository of a page of the site."""
    return {there: here for here, there in MOVED.items() if there != here}.get(place, f"docs/{place}")


def place_of(path: str) -> str:
    """The place on the site, below docs/, of a path in the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return MOVED.get(path, f"source/{path}.md")


def links(text: str) -> Iterator[str]:
    """The targets of a page's links within the repository, without those to a place in the page itself."""
    for target in LINK.findall(CODE.sub("", text)):
        if not _is_elsewhere(target):
            yield target


def _is_elsewhere(target: str) -> bool:
    return target.startswith("#") or re.match(r"[a-z]+:", target) is not None


def outside(place: str, text: str) -> set[str]:
    """The paths in the repository, neither pages nor below docs/, that a page leads to."""
    paths = {_path(place, target)[0] for target in links(text)}
    return {path for path in paths if place_of(path).startswith("source/")}


def _path(place: str, target: str) -> tuple[str, str]:
    path, hash_, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin(place)), path)), hash_ + anchor


def rewritten(place: str, text: str) -> str:
    """A page in which every link leads to a place on the site."""

    def new(match: re.Match[str]) -> str:
        if _is_elsewhere(match[1]):
            return match[0]
        path, anchor = _path(place, match[1])
        return f"]({posixpath.relpath(place_of(path), posixpath.dirname(place) or '.')}{anchor})"

    return outside_of_code(text, lambda prose: LINK.sub(new, prose))


def outside_of_code(text: str, change: Callable[[str], str]) -> str:
    """A page with all that is not code changed."""
    end, pieces = 0, []
    for match in CODE.finditer(text):
        pieces += [change(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*pieces, change(text[end:])])


def source_page(path: str) -> str:
    """The page of a file or of a folder of the repository; FileNotFoundError if there is no such."""
    file = ROOT / path
    if not file.is_dir():
        text = file.read_text("utf-8").rstrip()
        language = LANGUAGES.get(file.suffix, "text")
        return f"{HIDDEN}# {path}\n\n``````{language}\n{text}\n``````\n"
    rows = [
        f"| `{item.name}{'/' if item.is_dir() else ''}` | {_first_line(item)} |"
        for item in sorted(file.iterdir())
        if (item.suffix == ".py" and item.name != "__init__.py") or (item / "__init__.py").exists()
    ]
    own = [_first_line(file)] if (file / "__init__.py").exists() else []
    return "\n".join([f"{HIDDEN}# {path}/", "", *own, "", "| file | what it is |", "| --- | --- |", *rows]) + "\n"


def _first_line(path: Path) -> str:
    module = path / "__init__.py" if path.is_dir() else path
    said = ast.get_docstring(ast.parse(module.read_text("utf-8"))) or ""
    return said.partition("\n\n")[0].replace("\n", " ").replace("|", r"\|")
