"""The picture of the benchmark: ratios of methods, what PEFT takes, and times over sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.beside_peft import OURS, THEIRS
from benchmarks.page import spelled
from benchmarks.results import Results
from benchmarks.sections import PEAK, RETRIEVAL_PEAK, SCALES
from tools.methods import FULL, INFERENCE, PLAIN, TRAINING


def plot(results: Results, path: Path) -> None:
    """Draw what was measured; what was not leaves its place empty."""
    matplotlib.use("Agg")
    figure = plt.figure(figsize=(16, 11), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.15]).ravel()
    top, bottom = right.subfigures(2, 1, squeeze=False, height_ratios=[2, 1]).ravel()
    _methods(results, left.subplots())
    for section, axes in zip(SCALES, top.subplots(2, 2).flat, strict=True):
        _scale(results, section, axes)
    _beside_peft(results, bottom.subplots())
    about = results.about
    figure.suptitle(f"{about['backbone']}; {about['machine']}; {about['date']}", fontsize=11)
    figure.savefig(path, dpi=80)
    plt.close(figure)


@dataclass(frozen=True)
class Mark:
    """How a ratio is drawn."""

    section: str
    quantity: str
    reference: str
    shape: str
    colour: str
    shift: float
    """Above the middle of its line."""


MARKS = (
    Mark("methods", TRAINING, FULL, "o", "tab:blue", 0.2),
    Mark("methods", INFERENCE, PLAIN, "s", "tab:orange", 0.0),
    Mark("memory", PEAK, FULL, "D", "tab:green", -0.2),
)


def _methods(results: Results, axes: Axes) -> None:
    """A line a method, a mark for each ratio."""
    labels = results.subjects("methods", "memory")[::-1]
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    for mark in MARKS:
        values = {m.subject: value for m, value in results.medians(mark.section, mark.quantity).items()}
        axes.scatter(
            [value / values[mark.reference] for value in values.values()],
            [labels.index(label) + mark.shift for label in values],
            marker=mark.shape,
            color=mark.colour,
            s=28,
            label=f"{mark.quantity}, of the {mark.reference}'s",
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.7, max(len(labels), 1) - 0.3)
    axes.grid(axis="x", alpha=0.4)
    for row in range(1, len(labels), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="black", alpha=0.04, linewidth=0)
    axes.set_title("ratios of medians; less is better")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.04), ncols=1, frameon=False)


def _scale(results: Results, section: str, axes: Axes) -> None:
    """Seconds over sizes, both logarithmic."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for measure, value in results.medians(section).items():
        if measure.unit == "s" and measure.at is not None:
            subject = measure.subject if section in ("points", "tokens") else f"{measure.subject}: {measure.quantity}"
            lines.setdefault(subject, []).append((measure.at, value))
    for subject, pairs in lines.items():
        axes.plot(*zip(*sorted(pairs), strict=True), marker=".", label=subject)
    sizes = sorted({size for pairs in lines.values() for size, _ in pairs})
    if lines:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.minorticks_off()
        axes.legend(fontsize=7)
    peaks = results.medians(section, RETRIEVAL_PEAK)
    memory = f"; at most {spelled(*max(peaks.items(), key=lambda pair: pair[1]))}" if peaks else ""
    axes.set(xlabel=SCALES[section] + memory, ylabel="seconds")
    axes.grid(alpha=0.3)


def _beside_peft(results: Results, axes: Axes) -> None:
    """Two bars an operation."""
    found = {(m.subject, m.quantity): value for m, value in results.medians("peft").items()}
    operations = list(dict.fromkeys(quantity for _, quantity in found))
    for shift, name, colour in ((-0.2, OURS, "tab:blue"), (0.2, THEIRS, "tab:gray")):
        heights = [found[name, operation] for operation in operations]
        axes.bar([place + shift for place in range(len(operations))], heights, width=0.4, label=name, color=colour)
    if found:
        axes.set_yscale("log")
        axes.set_ylim(top=8 * max(found.values()))  # room for the legend
        axes.legend(fontsize=8, ncols=2, loc="upper left")
    axes.set_xticks(range(len(operations)), operations, rotation=20, fontsize=8)
    axes.set(ylabel="seconds", title="LoRA of rank 8 on qkv")
    axes.grid(axis="y", alpha=0.3)
