"""A page and a figure for every registered method, from its code: docs/methods/<method>.md and .svg, and their index.

    python -m tools.method_pages           write them
    python -m tools.method_pages --check   fail if one says otherwise

The text is the docstring of the method's package, or of its module where it is one file; see `Text` for its structure.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

import point_peft
from point_peft import METHODS, TunerConfig
from point_peft.hub.card import citation, home, markdown, paragraphs
from tools.capabilities import known
from tools.method_figures import figure
from tools.methods import BASE, Bench, facts, published, rows_of, table, yes

FOLDER = Path(__file__).parent.parent / "docs" / "methods"


# ---- what the code says ----------------------------------------------------------------------------------------------


@dataclass
class Text:
    """A docstring, taken apart; its blocks are separated by empty lines.

    The first is "NAME: what it is." Those after it with a URL are the citation. An indented block is an equation.
    "When to use it: ..." and "Deviations ..." with its bullets have sections of their own.
    """

    name: str
    summary: str
    citation: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    use: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)


def text_of(method: str) -> Text:
    """The docstring of a method, taken apart and in Markdown."""
    first, *blocks = paragraphs(method)
    cited = citation(method)
    name, colon, summary = " ".join(first.split()).partition(": ")
    text = Text(name=name if colon else method, summary=markdown(_sentence(summary if colon else first)))
    text.citation += map(markdown, cited)
    section = text.body
    for block in blocks[len(cited) :]:
        if block.startswith("When to use it:"):
            text.use.append(markdown(_sentence(block.removeprefix("When to use it:").strip())))
            section = text.body
        elif block.startswith("Deviations"):
            section = text.deviations
            section += filter(None, [markdown(block.partition("\n")[2])])
        elif block.startswith("    "):
            section.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            section.append(markdown(block))
    return text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def meanings(config: type[TunerConfig]) -> dict[str, str]:
    """Field -> the docstring below it, for the fields that a method adds to those of all methods."""
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__[: config.__mro__.index(TunerConfig)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            text = following.value.value if said else ""  # type: ignore[union-attr]
            found[statement.target.id] = inspect.cleandoc(text) if isinstance(text, str) else ""
    own = {item.name for item in fields(config)} - {item.name for item in fields(TunerConfig)}
    return {name: text for name, text in found.items() if name in own}


def _defaults(config: type[TunerConfig]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in fields(config):
        value: Any = item.default_factory() if item.default_factory is not MISSING else item.default
        found[item.name] = "required" if value is MISSING else f"`{value!r}`"
    return found


# ---- pages -----------------------------------------------------------------------------------------------------------


def cell(text: str) -> str:
    """Text that fits into a table, paragraphs and all."""
    return "<br>".join(" ".join(block.split()) for block in re.split(r"\n\s*\n", markdown(text)))


def measured(method: str, bench: Bench) -> list[str]:
    """The section with parameters and GMAC."""
    notes: list[str] = []
    lines: list[list[str]] = []
    for row in rows_of([method]):
        found = facts(row, bench)
        stated = ", ".join(f"{name}={value!r}" for name, value in row.fields.items())
        head = f'head of "{row.pool}"' if row.pool else ""
        lines.append(
            [
                row.variant or "defaults",
                ", ".join(filter(None, [f"`{stated}`" if stated else "", head])) or "-",
                f"{found.parameters:,}",
                f"{found.parameters + found.head:,}",
                published(row, found.parameters, bench, notes),
                f"{found.gmac:.2f}",
                yes(found.mergeable),
                yes(found.needs_coordinates),
                yes(found.needs_bank),
            ]
        )
    header = ("", "fields", "trained, without head", "with head", "published, without head", "GMAC", "merges")
    section = table(lines, (*header, "needs coordinates", "needs a bank"))
    if notes:
        section += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return section


def usage(method: str) -> list[str]:
    """Code that puts the method on a backbone."""
    config = METHODS[method]
    offered = vars(point_peft).get(config.__name__) is config
    lines = ["```python", f"from point_peft import {f'{config.__name__}, ' if offered else ''}get_peft_model"]
    lines.append("from point_peft.backbones import default_backbone")
    if not offered:
        lines.append(f"from {home(config).__name__} import {config.__name__}")
    lines += ["", f"model = get_peft_model(default_backbone(cls_dim=10), {config.__name__}())"]
    return [*lines, "model.print_trainable_parameters()", "```"]


def support(method: str, answers: Mapping[tuple[str, str], str | None]) -> list[str]:
    """The backbones of docs/capabilities.md by what they ask for."""
    groups: dict[str | None, list[str]] = {}
    for (name, backbone), answer in answers.items():
        if name == method:
            groups.setdefault(answer, []).append(backbone)
    if not groups:
        return ["Not tried yet: `python -m tools.capabilities` does."]
    lines = [f"Tried on {sum(map(len, groups.values()))} backbones of other projects and our own:", ""]
    for answer in sorted(groups, key=lambda answer: (answer is None, answer != "yes", answer or "")):
        how = {"yes": "With its defaults", None: "Refused, with a reason"}.get(answer, f"With `{answer}`")
        lines.append(f"- {how} ({len(groups[answer])}): {', '.join(groups[answer])}.")
    return [*lines, "", "[capabilities.md](../capabilities.md) has all methods, and the reasons of refusals."]


def page(method: str, bench: Bench = BASE) -> str:
    """The page of a method."""
    text = text_of(method)
    name = file_name(method)
    config = METHODS[method]
    defaults = _defaults(config)
    own = [[f"`{name}`", defaults[name], cell(meaning)] for name, meaning in meanings(config).items()]
    common = ", ".join(f"`{item.name}`" for item in fields(TunerConfig))
    sections: dict[str, list[str]] = {
        "When to use it": text.use,
        "Use": usage(method),
        f"On {bench.name}": [
            f"{bench.points} points a cloud; GMAC of one forward in eval mode, not merged.",
            "[methods.md](../methods.md) compares all methods, [speed.md](../speed.md) has their times,",
            "[accuracy.md](../accuracy.md) what they reach.",
            "",
            *measured(method, bench),
        ],
        "Fields": [
            *markdown(inspect.cleandoc(config.__doc__ or "")).splitlines(),
            "",
            *(table(own, ("field", "default", "meaning")) if own else []),
            "",
            f"All methods have: {common}.",
        ],
        "Deviations from the published code": _spaced(text.deviations),
        "Backbones": support(method, known()),
        "Citation": _spaced(text.citation),
    }
    lines = [f"# {markdown(text.name)}", "", text.summary, "", f"![{text.name}]({name}.svg)", "", *_spaced(text.body)]
    for title, section in sections.items():
        if section:
            lines += ["", f"## {title}", "", *section]
    lines += ["", f"Made by `python -m tools.method_pages` from the code of `{home(config).__name__}`."]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _spaced(blocks: Sequence[str]) -> list[str]:
    return "\n\n".join(blocks).splitlines()


def index() -> str:
    """The list of all pages."""
    cells = []
    for method in sorted(METHODS):
        text = text_of(method)
        link = f"[{markdown(text.name)}]({file_name(method)}.md)"
        papers = [" ".join(block.split()) for block in text.citation]
        cells.append([f"`{method}`", link, text.summary, "<br>".join(papers) or "-"])
    lines = [
        "# Methods",
        "",
        "Every method that is registered. [methods.md](../methods.md) compares their sizes,",
        "[speed.md](../speed.md) their times,",
        "[capabilities.md](../capabilities.md) says which backbones they work on.",
        "",
        *table(cells, ("method", "page", "what it is", "paper")),
        "",
        "Made by `python -m tools.method_pages` from the code.",
    ]
    return "\n".join(lines) + "\n"


def file_name(method: str) -> str:
    """The name of a method's files, without ending."""
    return method.lower()


def picture(method: str) -> str:
    """The figure of a method, with the name that its page has."""
    return figure(method, text_of(method).name)


def pages(bench: Bench = BASE) -> dict[str, str]:
    """File name -> content, of everything in the folder."""
    files = {"README.md": index()}
    for method in tqdm(sorted(METHODS), desc="pages", leave=False):
        files[f"{file_name(method)}.md"] = page(method, bench)
        files[f"{file_name(method)}.svg"] = picture(method)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write, but fail if a page says otherwise")
    options = parser.parse_args(argv)
    files = pages()
    present = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*")}
    if options.check:
        wrong = sorted(name for name in {*files, *present} if files.get(name) != present.get(name))
        print(f"not as the code says: {', '.join(wrong)}; run python -m tools.method_pages" if wrong else "all right")
        return 1 if wrong else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (FOLDER / name).write_text(content, encoding="utf-8")
    for name in sorted(set(present) - set(files)):
        print(f"{FOLDER / name} belongs to no method")
    return 0


if __name__ == "__main__":
    sys.exit(main())
