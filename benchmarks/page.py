"""The page of the benchmark, from nothing but its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.results import Measure, Results, Series, Spread
from benchmarks.tables import CHAPTERS, Table
from tools.methods import table as markdown

NOT_MEASURED = "Not measured in this run."
UNITS: Mapping[str, Sequence[tuple[str, float]]] = {
    "s": (("s", 1.0), ("ms", 1e3), ("µs", 1e6)),
    "bytes": (("GB", 1e-9), ("MB", 1e-6), ("kB", 1e-3)),
}


def page(results: Results, picture: str) -> str:
    """The page in Markdown; `picture` is the name of the file with the plot."""
    lines = [
        "# Speed, memory and file sizes",
        "",
        f"Made by `{results.about['command']}`; nothing here is written by hand.",
        "",
        *(f"- {name}: {text}" for name, text in results.about.items() if name != "command"),
        "",
        "What is compared takes turns in every round. A value is the median over the rounds [lower quartile, upper "
        "quartile]; a ratio is that of the rounds' own ratios. An aim is *met* where the whole range is within it.",
        "",
        *_aims(results),
        "",
        f"![ratios of methods, and times over sizes]({picture})",
    ]
    for chapter in CHAPTERS:
        lines += ["", f"## {chapter.title}", "", chapter.text]
        for table in chapter.tables:
            lines += ["", f"**{table.caption}**", "", *(_lines(results.of(table.name), table) or [NOT_MEASURED])]
    return "\n".join(lines) + "\n"


def spelled(spread: Spread, unit: str) -> str:
    """A value with its unit, in three digits, and its range."""
    name, factor = next((pair for pair in UNITS[unit] if spread.middle * pair[1] >= 1), UNITS[unit][-1])
    return f"{_with_range(spread, lambda value: _three_digits(value * factor))} {name}"


def ratio_of(series: Series) -> str:
    """A ratio with its range, a small one in more digits."""
    spread = Spread.of(series.ratios)
    digits = 2 if spread.middle >= 0.1 else 3
    return _with_range(spread, lambda value: f"{value:.{digits}f}")


def _with_range(spread: Spread, spell: Callable[[float], str]) -> str:
    if spread.low == spread.high:
        return spell(spread.middle)
    return f"{spell(spread.middle)} [{spell(spread.low)}, {spell(spread.high)}]"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def met(series: Series, aim: float) -> bool:
    """Whether the whole range of its ratios is within an aim."""
    return Spread.of(series.ratios).high <= aim


def _aims(results: Results) -> list[str]:
    """How many aims are met, and which are not."""
    every, missed = 0, []
    for table in (table for chapter in CHAPTERS for table in chapter.tables):
        rows = {measure.subject: series for measure, series in results.of(table.name).items()}
        for subject, aim in table.aims.items():
            if subject in rows:
                every += 1
                missed += [] if met(rows[subject], aim) else [f"{subject} ({table.name})"]
    return [f"Aims that are met: {every - len(missed)} of {every}. Not met: {'; '.join(missed) or 'none'}."]


def _lines(found: Mapping[Measure, Series], table: Table) -> list[str]:
    if not found:
        return []
    return _over_sizes(found, table) if table.sizes else _compared(found, table)


def _compared(found: Mapping[Measure, Series], table: Table) -> list[str]:
    cells = []
    for measure, series in found.items():
        cell = [measure.subject, spelled(Spread.of(series.values), table.unit)]
        cell.append(ratio_of(series) if series.reference else "-")
        if table.aims:
            aim = table.aims.get(measure.subject)
            cell += ["", ""] if aim is None else [f"at most {aim:g}", "yes" if met(series, aim) else "no"]
        cells.append(cell)
    return markdown(cells, ["", "median", f"of {table.reference}", *(["aim", "met"] if table.aims else [])])


def _over_sizes(found: Mapping[Measure, Series], table: Table) -> list[str]:
    sizes = sorted({measure.at for measure in found if measure.at is not None})
    rows: dict[str, dict[int | None, str]] = {}
    for measure, series in found.items():
        rows.setdefault(measure.subject, {})[measure.at] = spelled(Spread.of(series.values), table.unit)
    cells = [[subject, *(row.get(size, "-") for size in sizes)] for subject, row in rows.items()]
    return markdown(cells, [table.sizes, *(f"{size:,}" for size in sizes)])
