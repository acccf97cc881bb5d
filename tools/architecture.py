"""The figure of docs/architecture.md: the packages of point_peft and what each imports, read from the code itself.

python -m tools.architecture            write docs/architecture.svg
python -m tools.architecture --check    fail if the code imports otherwise than the figure says
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "point_peft"
OUT = ROOT / "docs" / "architecture.svg"
QUESTIONS = {
    "errors": "errors that say what to do",
    "version": "the version",
    "schema": "does a JSON value fit an annotation?",
    "expressions": "which names does an expression match?",
    "matching": "which modules are meant?",
    "geometry": "where do points lie, who is near?",
    "anatomy": "what is a backbone made of?",
    "running": "what does one forward know?",
    "tracing": "what does a forward tell of a model?",
    "parts": "what are methods made of?",
    "config": "what was asked for?",
    "tuners": "the methods, a folder each",
    "adapting": "how is an adapter attached?",
    "heads": "heads of an adapter's own",
    "files": "how is it saved and read?",
    "hub": "how is it pushed and pulled?",
    "bank": "how is a memory bank built?",
    "status": "what is attached where?",
    "parameter_groups": "who learns how fast, what decays?",
    "routing": "which adapter is a cloud for?",
    "adapter_set": "all that can be done with adapters",
    "model": "a backbone with adapters: the doors",
    "library": "which adapters are there?",
    "starting": "how does a fresh adapter begin?",
    "extracting": "which adapter lies between two models?",
    "profiles": "which modules are trained?",
    "data": "which clouds are in people's files?",
    "training": "how is an adapter trained?",
    "integrations": "other libraries",
    "demo": "which page shows what an adapter does?",
    "cli": "the command line",
    "backbones": "reference backbones",
}
"""Unit -> the question that it answers."""
LEFT_OUT = {"__main__", "version", "errors", "torch_private", "quickstart"}
ROW, NAMES, CELL, TOP = 30, 430, 27, 118
"""Height of a row, width of the names, width of a column, height of the column heads."""
INK, SOFT, LINE, DOT = "#1f2933", "#5d6874", "#d5dbe1", "#2f6fca"


def unit_of(module: str) -> str:
    """The file or folder of point_peft that a dotted name belongs to; "" for the package itself."""
    return module.removeprefix("point_peft").lstrip(".").split(".")[0]


def imported(path: Path) -> Iterator[str]:
    """The units that a file imports."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "point_peft":
            names = [alias.name for alias in node.names] if node.module == "point_peft" else [""]
            yield from (unit_of(f"{node.module}.{name}".rstrip(".")) for name in names)


def imports() -> dict[str, set[str]]:
    """Unit -> the units that it imports, for all that are drawn."""
    units: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("").parts
        if relative != ("__init__",):
            units.setdefault(relative[0], set()).update(imported(path))
    known = set(units) - LEFT_OUT
    return {unit: (seen & known) - {unit} for unit, seen in units.items() if unit in known}


def in_order(graph: Mapping[str, set[str]]) -> list[str]:
    """The units, each above all that it imports."""
    return sorted(graph, key=list(QUESTIONS).index, reverse=True)


def text(x: float, y: float, words: str, size: float, fill: str, extra: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{fill}" {extra}>{escape(words)}</text>'


def picture() -> str:
    """The figure as SVG: a row a unit, a dot where it imports another; all dots lie below the diagonal."""
    graph = imports()
    units = in_order(graph)
    wide, high = NAMES + CELL * len(units) + 50, TOP + ROW * len(units) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img" aria-label="Packages and their imports">',
        f'<rect width="{wide}" height="{high}" rx="12" fill="#ffffff"/>',
        text(20, 40, "package", 13, SOFT),
        text(150, 40, "the question that it answers", 13, SOFT),
        text(20, 62, "a dot: the package of the row imports that of the column", 12, SOFT),
    ]
    for number, unit in enumerate(units):
        x = NAMES + CELL * number + CELL / 2
        parts.append(text(x + 4, TOP - 12, unit, 12, INK, f'transform="rotate(-60 {x + 4:.0f} {TOP - 12})"'))
    for number, unit in enumerate(units):
        y = TOP + ROW * number
        parts += [
            f'<line x1="12" x2="{wide - 12}" y1="{y}" y2="{y}" stroke="{LINE}"/>',
            text(20, y + 20, unit, 14, INK, 'font-weight="600"'),
            text(150, y + 20, QUESTIONS[unit], 12.5, SOFT),
        ]
        for column, other in enumerate(units):
            x = NAMES + CELL * column
            if unit == other:
                parts.append(
                    f'<rect x="{x + 4}" y="{y + 4}" width="{CELL - 8}" height="{ROW - 8}" rx="4" fill="{LINE}"/>'
                )
            elif other in graph[unit]:
                parts.append(f'<circle cx="{x + CELL / 2}" cy="{y + ROW / 2}" r="5" fill="{DOT}"/>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    if parser.parse_args().check:
        same = OUT.is_file() and OUT.read_text("utf-8") == picture()
        print("the figure is right" if same else "the code imports otherwise: python -m tools.architecture")
        return 0 if same else 1
    OUT.write_text(picture(), encoding="utf-8")
    print(OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
