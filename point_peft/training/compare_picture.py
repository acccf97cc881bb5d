"""The picture of a comparison: what the two answer, how sure each is, and clouds on which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from point_peft.data.cloud import UNKNOWN
from point_peft.data.optional import optional
from point_peft.training.answers import Answered, Comparison
from point_peft.training.comparing import answers_for
from point_peft.training.contenders import Pair
from point_peft.training.pictures import FEW, class_colours, new_figure, png, scatter

WIDTH, TOP = 12.0, 5.6
"""Inches: of the picture, and the height of the charts."""
SHOWN_CLOUDS, A_ROW = 12, 6
SHOWN_SCENES = 2
NUMBERED_CLASSES = 12
"""Up to so many classes, the cells of a table have room for numbers."""
COLOURS = {"A": FEW[0], "B": FEW[1]}
WHO_IS_RIGHT = ("#cccccc", FEW[0], FEW[1], "#222222", "#ffffff00")
WHO = ("both right", "only A right", "only B right", "neither right")
ALIKE = ("#cccccc", "#dd0000")


class _Panel(NamedTuple):
    """One drawing of a cloud."""

    title: str
    numbers: Tensor
    """(n,), of the colours."""
    colours: Sequence[Any]


def picture(found: Comparison, pair: Pair) -> bytes:
    """A picture (PNG), 1,200 pixels wide, of a comparison."""
    segmentation = found.task == "segmentation"
    shown = found.differing[: SHOWN_SCENES if segmentation else SHOWN_CLOUDS]
    rows = len(shown) if segmentation else -(-len(shown) // A_ROW)
    below = (3.5 if segmentation else 2.5) * rows + (0.9 if shown else 0)
    figure = new_figure(WIDTH, TOP + below)
    charts, clouds = figure.subfigures(2, 1, height_ratios=(TOP, below)) if shown else (figure, None)
    left, right = charts.subfigures(1, 2, width_ratios=(1.05, 1))
    _draw_pairs(left, found)
    _draw_reliability(right, found)
    if clouds is not None:
        (_draw_scenes if segmentation else _draw_clouds)(clouds, found, pair)
    return png(figure)


def _draw_pairs(place: Any, found: Comparison) -> None:
    """The answers of A by those of B, as shares of A's, with the numbers where there is room."""
    counts, classes = np.array(found.pairs), found.classes
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes = place.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    place.colorbar(image, ax=axes, shrink=0.75, label="% of A's answers")
    size = 9 if len(classes) <= NUMBERED_CLASSES else 7 if len(classes) <= 30 else 5
    upright = 0 if max(map(len, classes)) * len(classes) <= 40 else 90
    axes.set_xticks(range(len(classes)), [_short(name, 16) for name in classes], rotation=upright, fontsize=size)
    axes.set_yticks(range(len(classes)), [_short(name, 16) for name in classes], fontsize=size)
    axes.set(xlabel="B answers", ylabel="A answers")
    axes.set_title(f"the same answer in {found.agreement:.1f} %, kappa {found.kappa:.2f}", fontsize=11)
    if len(classes) <= NUMBERED_CLASSES:
        small = 9 if counts.max() < 1000 or len(classes) <= 6 else 6
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 55 else "black"
            number = f"{counts[row, column]:,}"
            axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=small)


def _draw_reliability(place: Any, found: Comparison) -> None:
    """The share that is right by confidence, and how often each is so sure."""
    labelled = found.right is not None
    upper, lower = place.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    upper.plot([0, 100], [0, 100], color="0.6", linestyle=":", label="as sure as right")
    edges = np.linspace(0, 100, len(found.a.reliability) + 1)
    for name, own in (("A", found.a), ("B", found.b)):
        table = np.array(own.reliability)
        there = table[:, 0] > 0
        share = 100 * table[:, 0] / max(table[:, 0].sum(), 1)
        upper.plot(table[there, 1], table[there, 2], color=COLOURS[name], linewidth=1, label=_sure(name, own))
        # A bin of few answers tells little: its dot is small.
        upper.scatter(table[there, 1], table[there, 2], s=4 + 3 * share[there], color=COLOURS[name])
        lower.stairs(share, edges, color=COLOURS[name], linewidth=1.6)
    upper.set(ylabel="right, %", xlim=(0, 100), ylim=(0, 102))
    place.suptitle("how sure each is, and how often right" if labelled else "no labels are known", fontsize=11)
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=9, frameon=False)
    lower.set(xlabel="confidence, %", ylabel="answers, %", ylim=(0, None))
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)


def _sure(name: str, own: Answered) -> str:
    error = "" if own.calibration_error is None else f", calibration error {own.calibration_error:.1f} %"
    right = "" if own.accuracy is None else f" {own.accuracy:.1f} % right"
    return f"{name}:{right}, {own.confidence:.1f} % sure{error}"


def _draw_clouds(place: Any, found: Comparison, pair: Pair) -> None:
    shown = found.differing[:SHOWN_CLOUDS]
    colours = "blue: A is right, red: B is, black: neither" if found.right is not None else "no labels are known"
    many = f"{len(shown)} of the {len(found.differing):,} clouds" if len(shown) > 1 else "the cloud"
    place.suptitle(f"{many} on which they differ ({colours})", fontsize=11)
    rows = -(-len(shown) // A_ROW)
    for number, own in enumerate(shown, start=1):
        axes = place.add_subplot(rows, A_ROW, number, projection="3d")
        points = pair.clouds[own.index].points
        scatter(axes, points, points[:, 2].numpy())
        title = f"A: {_short(str(own.a), 18)}\nB: {_short(str(own.b), 18)}"
        colour = "black"
        if own.true is not None:
            title = f"true: {_short(own.true, 16)}\n{title}"
            colour = COLOURS["A"] if own.a == own.true else COLOURS["B"] if own.b == own.true else "black"
        axes.set_title(title, fontsize=8.5, color=colour)


def _draw_scenes(place: Any, found: Comparison, pair: Pair) -> None:
    shown = found.differing[:SHOWN_SCENES]
    place.suptitle("where they differ most", fontsize=11)
    colours = class_colours(len(found.classes))
    labelled = found.right is not None
    for row, own in enumerate(shown):
        true, (a, b) = answers_for(pair.first, pair.second, own.index, found.classes)
        panels = [_Panel("A", a, colours), _Panel("B", b, colours)]
        if labelled:
            who = torch.where(true == UNKNOWN, 4, 3 - (a == true).long() * 2 - (b == true).long())
            # 0 both, 1 only A, 2 only B, 3 neither
            panels = [_Panel("true", true, colours), *panels, _Panel("who is right", who, WHO_IS_RIGHT)]
        else:
            panels.append(_Panel("differing", (a != b).long(), ALIKE))
        points = pair.clouds[own.index].points
        for column, panel in enumerate(panels):
            axes = place.add_subplot(len(shown), len(panels), row * len(panels) + column + 1, projection="3d")
            scatter(axes, points, np.array(panel.colours)[panel.numbers.numpy()])
            name = f"{_short(Path(own.cloud).name, 24)}: " if column == 0 else ""
            axes.set_title(f"{name}{panel.title}", fontsize=9)
    patch = optional("matplotlib.patches", "the pictures of a run", "train").Patch
    keys = [patch(color=colours[number], label=_short(name, 16)) for number, name in enumerate(found.classes)]
    place.legend(handles=keys, loc="outside lower left", ncols=min(len(keys), 6), fontsize=9, title="class")
    verdict = zip(WHO_IS_RIGHT, WHO, strict=False) if labelled else zip(ALIKE, ("the same", "differing"), strict=True)
    keys = [patch(color=colour, label=word) for colour, word in verdict]
    place.legend(handles=keys, loc="outside lower right", ncols=2, fontsize=9, title=panels[-1].title)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
