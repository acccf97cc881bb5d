"""The picture of the comparison: accuracy over trained parameters, and over the time of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.accuracy.entries import FULL
from benchmarks.accuracy.jobs import SETS
from benchmarks.accuracy.results import Results
from benchmarks.accuracy.tables import FLAGSHIP, Runs, values

SHAPES = "osDv^<>PX"
STARS = {FLAGSHIP: "crimson", FULL: "black"}
PARAMETERS = (0, 1_000, 10_000, 100_000, 1_000_000)
"""What is written along the axis."""
Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[Point]:
    """Those of (cost, accuracy) than which none is both cheaper, or as cheap, and better."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one[0], -one[1])):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found


def legend(names: Sequence[str]) -> dict[str, str]:
    """Entry -> what it is called, but for variants of an entry that is there too: those are for the tables."""
    shown = [name for name in names if ":" not in name or method_of(name) not in names]
    counts = Counter(map(method_of, shown))
    return {name: method_of(name) if counts[method_of(name)] == 1 else name for name in shown}


def method_of(name: str) -> str:
    """The method of an entry, without its settings."""
    return name.partition(":")[0]


def draw(results: Results, path: Path) -> None:
    """A row for each set; the lines join what nothing else beats at its price."""
    matplotlib.use("Agg")
    tasks = results.tasks(SETS)
    called = legend(sorted({name for task in tasks for name in results.of(SETS, task)}))
    figure, axes = plt.subplots(len(tasks), 2, figsize=(13, 3.6 * len(tasks)), layout="constrained", squeeze=False)
    for task, (left, right) in zip(tasks, axes, strict=True):
        runs = {name: own for name, own in results.of(SETS, task).items() if name in called}
        _panel(runs, "trainable_without_head", left, called)
        _panel(runs, "seconds_an_epoch", right, called)
        left.set_xscale("symlog", linthresh=1000, linscale=0.5)
        left.set_xticks(PARAMETERS, [f"{number:,}" for number in PARAMETERS])
        left.set(ylabel=f"{task}: test accuracy, %", xlabel="trained parameters without the head")
        right.set(xlabel="seconds of one core for the training of an epoch")
        right.set_xlim(0, 1.1 * max(right.get_xlim()[1], 1e-9))
    handles: dict[str, Any] = {}
    for one in axes.flat:
        handles.update(zip(*one.get_legend_handles_labels()[::-1], strict=True))
    there = [label for label in called.values() if label in handles]
    figure.legend([handles[name] for name in there], there, loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _panel(runs: Runs, cost: str, axes: Axes, called: Mapping[str, str]) -> None:
    colours = matplotlib.colormaps["tab10"]
    points: list[Point] = []
    for name, own in runs.items():
        costs, accuracies = values(own, cost), values(own, "accuracy")
        if not costs:
            continue
        points.append((median(costs), fmean(accuracies)))
        number = list(called).index(name)
        axes.errorbar(
            *points[-1],
            yerr=[[points[-1][1] - min(accuracies)], [max(accuracies) - points[-1][1]]],
            fmt="*" if name in STARS else SHAPES[number % len(SHAPES)],
            color=STARS.get(name, colours(number % 10)),
            markersize=14 if name in STARS else 7,
            elinewidth=0.8,
            label=called[name],
        )
    best = front(points)
    if best:
        axes.plot(*zip(*best, strict=True), color="grey", linewidth=1, zorder=0)
    axes.grid(alpha=0.3)
