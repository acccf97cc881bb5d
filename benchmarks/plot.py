"""The picture of the benchmark: ratios of methods, and times over sizes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.results import Results, Spread
from benchmarks.tables import CHAPTERS, Table

TABLES = {table.name: table for chapter in CHAPTERS for table in chapter.tables}
MARKS = (("training", "o", "tab:blue", 0.2), ("inference", "s", "tab:orange", 0.0), ("memory", "D", "tab:green", -0.2))
"""Table, shape, colour, and place above the middle of a method's line."""


def plot(results: Results, path: Path) -> None:
    """Draw what was measured; what was not leaves its place empty."""
    matplotlib.use("Agg")
    figure = plt.figure(figsize=(16, 11), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.3, 1]).ravel()
    published, reference = left.subplots(2, 1, height_ratios=[1, 3.5])
    _ratios(results, "published ", published)
    published.set_title("the published class: ratios with quartiles; less is better")
    _ratios(results, "", reference)
    reference.set_title("the reference encoder")
    handles, labels = reference.get_legend_handles_labels()
    reference.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.4, -0.04), ncols=1, frameon=False)
    for name, axes in zip(("points", "tokens", "retrieval"), right.subplots(3, 1), strict=True):
        _over_sizes(results, TABLES[name], axes)
    figure.suptitle(f"{results.about['machine']}; {results.about['date']}", fontsize=11)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _ratios(results: Results, prefix: str, axes: Axes) -> None:
    """A line a method, a mark for each ratio."""
    names = [prefix + name for name, *_ in MARKS]
    labels = list(
        dict.fromkeys(m.subject for name in names for m, series in results.of(name).items() if series.reference)
    )[::-1]
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    for name, shape, colour, shift in MARKS:
        spreads = {m.subject: Spread.of(s.ratios) for m, s in results.of(prefix + name).items() if s.reference}
        if spreads:
            axes.errorbar(
                [spread.middle for spread in spreads.values()],
                [labels.index(label) + shift for label in spreads],
                xerr=[
                    [spread.middle - spread.low for spread in spreads.values()],
                    [spread.high - spread.middle for spread in spreads.values()],
                ],
                fmt=shape,
                color=colour,
                markersize=5,
                label=f"{name}, of {TABLES[prefix + name].reference}",
            )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.4)


def _over_sizes(results: Results, table: Table, axes: Axes) -> None:
    """Seconds over sizes, both logarithmic."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for measure, series in results.of(table.name).items():
        assert measure.at is not None
        lines.setdefault(measure.subject, []).append((measure.at, Spread.of(series.values).middle))
    for subject, pairs in lines.items():
        axes.plot(*zip(*sorted(pairs), strict=True), marker=".", label=subject)
    if lines:
        sizes = sorted({size for pairs in lines.values() for size, _ in pairs})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.minorticks_off()
        axes.legend(fontsize=8)
    axes.set(xlabel=table.sizes, ylabel="seconds", title=table.caption)
    axes.grid(alpha=0.3)
