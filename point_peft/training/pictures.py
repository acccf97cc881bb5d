"""The pictures of a run: curves, confusions, clouds with what the model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from point_peft.data.optional import optional

SHOWN_POINTS = 8192
FEW = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ff8800", "#004488", "#997700", "#882255")
"""Colours that the colour-blind can tell apart as well (the first six: Paul Tol's "bright" scheme)."""
UNKNOWN_COLOUR = "#cccccc"
VERDICT = ("#bbbbbb", "#dd0000", "#ffffff00")
"""The colours of what is right, wrong and not known."""


class Shown(NamedTuple):
    """A cloud on the page of samples."""

    points: Tensor
    """(n, 3)"""
    labels: Tensor
    """() or (n,)"""
    predicted: Tensor
    """() or (n,)"""


def check_matplotlib() -> None:
    """Raise `DataError` if no pictures can be drawn, before anything is trained."""
    optional("matplotlib.figure", "the pictures of a run", "train")


def curves(epochs: Sequence[dict[str, float]], measure: str) -> bytes:
    """A picture (PNG) of the loss and of a measure in percent by epoch, of training and validation."""
    figure = new_figure(10, 4)
    loss, share = figure.subplots(1, 2)
    numbers = [line["epoch"] for line in epochs]
    loss.plot(numbers, [line["train_loss"] for line in epochs], marker=".", label="training")
    validated = [line for line in epochs if f"val_{measure}" in line]
    if validated:
        own = [line["epoch"] for line in validated]
        loss.plot(own, [line["val_loss"] for line in validated], marker=".", label="validation")
        share.plot(own, [line[f"val_{measure}"] for line in validated], marker=".", color="tab:orange")
        best = max(validated, key=lambda line: line[f"val_{measure}"])
        share.axvline(best["epoch"], color="0.7", linestyle=":", label=f"best: epoch {best['epoch']:.0f}")
        share.legend(loc="lower right")
    loss.set(xlabel="epoch", title="loss", ylim=(0, None))
    loss.legend()
    share.set(xlabel="epoch", title=f"validation, {measure}, %", ylim=(0, 101))
    for axes in (loss, share):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def confusions(counts: Tensor, classes: Sequence[str], title: str) -> bytes:
    """A picture (PNG) of how often each class was taken for each, in percent of its row; (classes, classes)."""
    shares = 100 * counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    size = min(4 + 0.45 * len(classes), 24)
    figure = new_figure(size, size)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.7, label="% of the true class")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) <= 20:
        for row in range(len(classes)):
            for column in range(len(classes)):
                share = float(shares[row, column])
                if share >= 0.5:
                    colour = "white" if share > 55 else "black"
                    axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return png(figure)


def samples(shown: Sequence[Shown], classes: Sequence[str], title: str) -> bytes:
    """A page (PNG) of clouds: with their classes, true and predicted, or with the classes of their points."""
    return _segmented(shown, classes, title) if shown[0].labels.ndim else _classified(shown, classes, title)


def _classified(shown: Sequence[Shown], classes: Sequence[str], title: str) -> bytes:
    columns = min(len(shown), 6)
    rows = -(-len(shown) // columns)
    figure = new_figure(2.4 * columns, 2.7 * rows + 0.5)
    figure.suptitle(title)
    for number, cloud in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, columns, number, projection="3d")
        right = int(cloud.labels) == int(cloud.predicted)
        scatter(axes, cloud.points, cloud.points[:, 2].numpy())
        name = classes[int(cloud.predicted)]
        truth = "" if right or int(cloud.labels) < 0 else f"\n(true: {classes[int(cloud.labels)]})"
        colour = "black" if int(cloud.labels) < 0 else "tab:green" if right else "tab:red"
        axes.set_title(name + truth, color=colour, fontsize=9)
    return png(figure)


def _segmented(shown: Sequence[Shown], classes: Sequence[str], title: str) -> bytes:
    known = any(bool((cloud.labels >= 0).any()) for cloud in shown)
    kinds = ("true", "predicted", "right or wrong") if known else ("predicted",)
    figure = new_figure(4.6 * len(kinds), 3.8 * len(shown) + 1)
    figure.suptitle(title)
    colours = class_colours(len(classes))
    for row, cloud in enumerate(shown):
        wrong = cloud.labels != cloud.predicted
        verdict = torch.where(cloud.labels < 0, 2, wrong.long())
        drawn: dict[str, tuple[Tensor, Sequence[Any]]] = {
            "true": (cloud.labels, colours),
            "predicted": (cloud.predicted, colours),
        }
        drawn["right or wrong"] = (verdict, VERDICT)
        for column, kind in enumerate(kinds):
            axes = figure.add_subplot(len(shown), len(kinds), row * len(kinds) + column + 1, projection="3d")
            values, own = drawn[kind]
            # Colour -1, the last, is that of what is unknown.
            scatter(axes, cloud.points, np.array(own)[values.numpy()])
            missed = 100 * float(wrong[cloud.labels >= 0].double().mean())
            axes.set_title(f"{missed:.1f} % wrong" if kind == "right or wrong" else kind, fontsize=9)
    patch = optional("matplotlib.patches", "the pictures of a run", "train").Patch
    keys = [patch(color=colours[number], label=name) for number, name in enumerate(classes)]
    keys += [patch(color=VERDICT[number], label=word) for number, word in enumerate(("right", "wrong")) if known]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 6), fontsize=9)
    return png(figure)


def class_colours(count: int) -> list[Any]:
    """A colour for each of so many classes, as unlike as can be, and a last one for what is unknown."""
    maps = optional("matplotlib", "the pictures of a run", "train").colormaps
    if count <= len(FEW):
        return [*FEW[:count], UNKNOWN_COLOUR]
    return [*(maps["gist_rainbow"](number / count) for number in range(count)), UNKNOWN_COLOUR]


def scatter(axes: Any, points: Tensor, colours: npt.NDArray[Any]) -> None:
    """Draw a cloud (n, 3 or more) into 3D axes, by a colour, or a number, for each of its points."""
    chosen = np.linspace(0, len(points) - 1, min(len(points), SHOWN_POINTS)).astype(int)
    own = points.numpy()[chosen]
    colours = colours[chosen]
    limits = {"cmap": "viridis", "c": colours} if colours.dtype.kind == "f" and colours.ndim == 1 else {"c": colours}
    axes.scatter(*own[:, :3].T, s=3, linewidths=0, **limits)
    spans = np.ptp(own[:, :3], axis=0)
    axes.set_box_aspect(np.maximum(spans, 0.05 * spans.max()), zoom=1.3)
    axes.view_init(elev=40)
    axes.set_axis_off()


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, of 100 pixels each."""
    made: Any = optional("matplotlib.figure", "the pictures of a run", "train").Figure(
        figsize=(width, height), layout="constrained", dpi=100
    )
    return made


def png(figure: Any) -> bytes:
    """A figure as the content of a file."""
    data = BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
