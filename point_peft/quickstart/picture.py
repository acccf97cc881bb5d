"""The picture of the quickstart: what two adapters on one backbone answer, how they learned, what their files weigh."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from point_peft.quickstart.data import Clouds
from point_peft.quickstart.training import Curve

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN = 10
COLOURS = ("tab:blue", "tab:orange")  # of the first task and of the second
VIEW = torch.tensor([[0.83, -0.17, -0.53], [0.0, 0.95, -0.31], [0.56, 0.26, 0.79]])  # turned 34 degrees, tilted 18


def draw(path: Path, tasks: list[Clouds], logits: list[Tensor], curves: list[Curve], sizes: dict[str, float]) -> None:
    """Draw two tasks on the same test clouds: logits (m, classes), a training and the megabytes of files of each."""
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.65, 1]).ravel()
    top.suptitle(f"One frozen backbone, two adapters: {tasks[0].name}, and {tasks[1].name}", fontsize=14)
    cells = list(top.subplots(2, SHOWN // 2).flat)
    for axes in cells:
        axes.set_axis_off()
    for axes, cloud in zip(cells, one_of_each_class(tasks[0].test[1]), strict=False):
        show_cloud(axes, cloud, tasks, [output[cloud].argmax() for output in logits])
    accuracy, loss, weight = bottom.subplots(1, 3)
    for task, curve, colour in zip(tasks, curves, COLOURS, strict=True):
        epochs = range(1, len(curve.val) + 1)
        accuracy.plot(epochs, curve.val, marker="o", color=colour, label=task.name)
        loss.plot(epochs, curve.losses, marker="o", color=colour, label=task.name)
    accuracy.set(xlabel="epoch", title="validation accuracy, %", ylim=(0, 102))
    loss.set(xlabel="epoch", title="training loss", ylim=(0, None))
    accuracy.legend(loc="lower right")
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    show_sizes(weight, sizes)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def one_of_each_class(labels: Tensor) -> list[int]:
    """Indices of clouds to show: the first of each class, then the others in order."""
    first = [int((labels == label).nonzero()[0]) for label in torch.unique(labels)]
    return [*first, *(index for index in range(len(labels)) if index not in first)][:SHOWN]


def show_cloud(axes: Axes, cloud: int, tasks: list[Clouds], answers: list[Tensor]) -> None:
    """A test cloud from a little above and the right, near points bright, under the answers of both adapters."""
    x, y, z = (tasks[0].test[0][cloud] @ VIEW).T.numpy()
    near = z.argsort()
    axes.scatter(x[near], y[near], c=z[near], s=5, cmap="viridis", linewidths=0)
    axes.set_aspect("equal")
    labels = [task.test[1][cloud] for task in tasks]
    names = [task.class_names[answer] for task, answer in zip(tasks, answers, strict=True)]
    truths = [task.class_names[label] for task, label in zip(tasks, labels, strict=True)]
    right = names == truths
    truth = "" if right else f" (is {' · '.join(truths)})"
    axes.set_title(" · ".join(names) + truth, color="black" if right else "crimson")


def show_sizes(axes: Axes, sizes: dict[str, float]) -> None:
    """A bar for each file."""
    bars = axes.barh(list(sizes), list(sizes.values()), color=["lightgrey", *COLOURS])
    axes.bar_label(bars, [f"{size:.2f} MB" for size in sizes.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xticks([])
    axes.set_title("what is stored")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
