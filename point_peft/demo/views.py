"""The ways to colour a cloud, each with a key to its colours in words."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from point_peft.demo.answer import Answer, Refusal

VIEWS = {"height": "Height", "label": "Label", "attention": "Attention", "neighbourhood": "Neighbourhood"}
"""View -> its name on the page; attention is that to prompts."""
SCALE = ("#3a6fd0", "#1f9d9a", "#7fb13a", "#e0a326")
"""From low to high: all of them can be seen on white and on near black."""
CLASSES = ("#3f7fd6", "#d9822b", "#2b9a66", "#c04a9c", "#8a8f1f", "#d2504a", "#7a63d1", "#1f97a8", "#a0673c", "#6f7a86")
"""Of classes of points; more than ten take them again."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A cloud, coloured in one way."""

    values: npt.NDArray[np.float32]
    """(m,) numbers that stand for colours."""
    colours: tuple[str, ...]
    """From the least to the greatest of `limits`, evenly, and blended in between."""
    limits: tuple[float, float]
    caption: str
    """One line of HTML: the colours and their meaning."""


def view_of(answer: Answer | Refusal, view: str) -> View:
    """A cloud as a task sees it, in the colours of a view, or by height where the task has no such view."""
    if isinstance(answer, Refusal):
        return _by_height(answer, f"{escape(answer.task.name)} does not answer for this cloud.")
    name = escape(answer.task.name)
    if view == "label":
        return _by_label(answer) or _by_height(answer, f"{name} gives the whole cloud one class, no point its own.")
    if view == "attention":
        return _by_attention(answer) or _by_height(answer, f"{name} has no prompts that attention is seen to go to.")
    if view == "neighbourhood":
        return _by_neighbourhood(answer) or _by_height(answer, f"It is not known where the tokens of {name} lie.")
    return _by_height(answer, "")


def _by_height(answer: Answer | Refusal, why: str) -> View:
    height = answer.points[:, 2]
    low, high = float(height.min()), float(height.max())
    return View(
        values=(height - low).astype(np.float32),
        colours=SCALE,
        limits=(0.0, max(high - low, 1e-9)),
        caption=f"{why} {_ramp('low', 'high')}".strip() if why else f"height {_ramp('low', 'high')}",
    )


def _by_label(answer: Answer) -> View | None:
    if answer.labels is None:
        return None
    classes = answer.task.classes
    there = np.unique(answer.labels).tolist()
    keys = " ".join(_swatch(class_colour(number), classes[number]) for number in there)
    colours = tuple(class_colour(number) for number in range(len(classes)))
    # Two colours at least: one alone is no scale.
    colours = colours if len(colours) > 1 else colours * 2
    return View(
        values=answer.labels.astype(np.float32), colours=colours, limits=(0.0, float(len(colours) - 1)), caption=keys
    )


def _by_attention(answer: Answer) -> View | None:
    if answer.attention is None:
        return None
    low, high = float(answer.attention.min()), float(answer.attention.max())
    return View(
        values=answer.attention,
        colours=SCALE,
        limits=(low, max(high, low + 1e-9)),
        caption=f"attention to prompts in {answer.block} {_ramp(f'{100 * low:.0f} %', f'{100 * high:.0f} %')}",
    )


def _by_neighbourhood(answer: Answer) -> View | None:
    if answer.neighbourhood is None:
        return None
    tokens, numbers = np.unique(answer.neighbourhood, return_inverse=True)
    # Steps of the golden ratio: whatever two numbers follow each other, their colours are unlike.
    colours = tuple(_hue(0.618034 * number) for number in range(max(len(tokens), 2)))
    return View(
        values=numbers.astype(np.float32),
        colours=colours,
        limits=(0.0, float(len(colours) - 1)),
        caption=f"{len(tokens)} tokens: points by the nearest centre",
    )


def class_colour(number: int) -> str:
    """The colour of a class of points."""
    return CLASSES[number % len(CLASSES)]


def _hue(turn: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(turn % 1.0, 0.52, 0.6)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _ramp(low: str, high: str) -> str:
    return (
        f'<span class="pp-ramp">{low}<i style="background:linear-gradient(90deg,{",".join(SCALE)})"></i>{high}</span>'
    )


def _swatch(colour: str, name: str) -> str:
    return f'<span class="pp-key"><i style="background:{colour}"></i>{escape(name)}</span>'
