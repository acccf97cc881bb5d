"""The cloud in 3D: one figure with every view of every task, so that a swap is a matter of which of them is visible."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from point_peft.data.optional import optional
from point_peft.demo.answer import Answer, Refusal
from point_peft.demo.board import Answers
from point_peft.demo.views import VIEWS, View, view_of

DRAWN = 4000
"""Points of a cloud that are drawn."""
DISTANCE = 1.8
"""Of the camera from the middle of the cube that holds the cloud, whose sides are 1."""
HEIGHT = 420
"""In pixels."""


def camera(turn: float, tilt: float) -> dict[str, Any]:
    """The camera of plotly for two angles in degrees: around the cloud, and up from its side."""
    around, up = math.radians(turn), math.radians(tilt)
    eye = {"x": math.cos(up) * math.cos(around), "y": math.cos(up) * math.sin(around), "z": math.sin(up)}
    return {"eye": {axis: DISTANCE * value for axis, value in eye.items()}, "up": {"x": 0, "y": 0, "z": 1}}


def figure_of(answers: Answers, task: str, view: str, turn: float, tilt: float) -> Any:
    """The figure with every task's cloud in every view; of these, one is visible."""
    graphs: Any = optional("plotly.graph_objects", "figures of clouds", "demo")
    figure = graphs.Figure(layout=_layout(answers.of[task], turn, tilt))
    for name, answer in answers.of.items():
        for kind in VIEWS:
            figure.add_trace(_trace(graphs, name, kind, answer, visible=(name, kind) == (task, view)))
    return figure


def _trace(graphs: Any, name: str, kind: str, answer: Answer | Refusal, *, visible: bool) -> Any:
    own = view_of(answer, kind)
    chosen = np.linspace(0, len(answer.points) - 1, min(len(answer.points), DRAWN)).astype(np.int64)
    points = (answer.points - answer.points.mean(axis=0))[chosen].astype(
        np.float32
    )  # near the origin, float32 is exact
    return graphs.Scatter3d(
        x=points[:, 0],
        y=points[:, 1],
        z=points[:, 2],
        mode="markers",
        marker={
            "size": 2.4 if len(points) <= 1500 else 1.6,
            "color": own.values[chosen],
            "cmin": own.limits[0],
            "cmax": own.limits[1],
            "colorscale": _scale(own),
            "line": {"width": 0},
        },
        meta={"task": name, "view": kind, "caption": own.caption, "cube": cube(answer)},
        visible=visible,
        hoverinfo="skip",
        showlegend=False,
    )


def cube(answer: Answer | Refusal) -> list[list[float]]:
    """The ranges of three axes, as long as each other, that hold the points of an answer."""
    points = answer.points - answer.points.mean(axis=0)
    least, most = points.min(axis=0), points.max(axis=0)
    half = 0.51 * max(float((most - least).max()), 1e-6)
    return [[middle - half, middle + half] for middle in ((least + most) / 2).tolist()]


def _scale(view: View) -> list[list[Any]]:
    last = len(view.colours) - 1
    return [[place / last, colour] for place, colour in enumerate(view.colours)]


def _layout(answer: Answer | Refusal, turn: float, tilt: float) -> dict[str, Any]:
    clear = "rgba(0,0,0,0)"
    return {
        "height": HEIGHT,
        "autosize": True,
        "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "scene": {
            "aspectmode": "cube",
            "bgcolor": clear,
            "camera": camera(turn, tilt),
            "dragmode": "turntable",
            **{f"{axis}axis": {"visible": False, "range": own} for axis, own in zip("xyz", cube(answer), strict=True)},
        },
    }
