"""The page's answer as a picture: the cloud and the probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from point_peft.data.optional import optional
from point_peft.demo.answer import Answer
from point_peft.demo.figure import DRAWN
from point_peft.demo.views import VIEWS, class_colour, view_of
from point_peft.training.pictures import new_figure, png

BAR, OTHER = "#2f6fca", "#9db4d3"
SHOWN_CLASSES = 12


def picture_of(name: str, answers: list[Answer], view: str, turn: float, tilt: float) -> bytes:
    """A picture (PNG) of one answer for a cloud, or of two below each other."""
    figure = new_figure(9, 0.5 + 4 * len(answers))
    figure.suptitle(name, fontsize=12)
    for place, answer in zip(np.atleast_1d(figure.subfigures(len(answers), 1)), answers, strict=True):
        _draw_cloud(place.add_subplot(1, 2, 1, projection="3d"), answer, view, turn, tilt)
        _draw_shares(place.add_subplot(1, 2, 2), answer)
    return png(figure)


def _draw_cloud(axes: Any, answer: Answer, view: str, turn: float, tilt: float) -> None:
    own = view_of(answer, view)
    colors: Any = optional("matplotlib.colors", "the picture of the page", "demo")
    scale = colors.LinearSegmentedColormap.from_list("view", own.colours, N=max(256, len(own.colours)))
    chosen = np.linspace(0, len(answer.points) - 1, min(len(answer.points), DRAWN)).astype(np.int64)
    low, high = own.limits
    axes.scatter(*answer.points[chosen].T, c=own.values[chosen], cmap=scale, vmin=low, vmax=high, s=7, linewidths=0)
    spans = np.ptp(answer.points, axis=0)
    axes.set_box_aspect(np.maximum(spans, 0.05 * max(spans.max(), 1e-9)), zoom=1.5)
    axes.view_init(elev=tilt, azim=turn)
    axes.set_axis_off()
    axes.set_title(f"colours: {VIEWS[view].lower()}", fontsize=9, color="#5d6874")


def _draw_shares(axes: Any, answer: Answer) -> None:
    order = answer.shares.argsort(descending=True)[:SHOWN_CLASSES].tolist()
    shares = [100 * float(answer.shares[number]) for number in order]
    own = [BAR if number == answer.best else OTHER for number in order]
    colours = [class_colour(number) for number in order] if answer.labels is not None else own
    axes.barh(range(len(order)), shares, color=colours, height=0.6)
    axes.set_yticks(range(len(order)), [answer.task.classes[number] for number in order], fontsize=10)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the points, %" if answer.labels is not None else "probability, %")
    axes.set_title(f"{answer.task.name}: {answer.task.classes[answer.best]}", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
