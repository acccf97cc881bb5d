"""The loss that is minimised and the figures that are measured, of clouds or of their points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from point_peft.data.cloud import UNKNOWN
from point_peft.errors import PointPeftError


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Cross entropy over everything that has a label, as a sum, since parts of a batch know no mean of the whole."""

    classes: int
    label_smoothing: float = 0.0
    weights: Tensor | None = None
    """(classes,), one for each class."""

    def total(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The sum over labels (m,) of scores (m, classes), not yet divided by `weight_of`."""
        weights = None if self.weights is None else self.weights.to(scores.device)
        return F.cross_entropy(
            scores.float(), labels, weights, ignore_index=UNKNOWN, reduction="sum", label_smoothing=self.label_smoothing
        )

    def weight_of(self, labels: Tensor) -> Tensor:
        """The number of labels that count, each with the weight of its class; () float64."""
        known = labels[labels != UNKNOWN]
        if self.weights is None:
            return torch.tensor(float(known.numel()), dtype=torch.float64, device=labels.device)
        return self.weights.to(known.device, torch.float64)[known].sum()


def balanced_weights(counts: Tensor) -> Tensor:
    """Weights (classes,) inverse to counts (classes,), of mean 1 over the classes that occur; 0 for those that do not.

    A class without samples has no loss to weigh.
    """
    there = counts > 0
    inverse = torch.where(there, 1.0 / counts.clamp(min=1), 0.0)
    return (inverse / inverse[there].mean()).float()


def scores_of(output: Any, to_logits: Callable[[Any], Tensor] | None) -> Tensor:
    """The scores, of whatever shape, out of what a model gives: a tensor, or a tuple that begins with one."""
    if to_logits is not None:
        output = to_logits(output)
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise PointPeftError(
            f"the model gives a {type(output).__name__}: pass to_logits=function that turns it into a tensor of scores"
        )
    return output


def flat_scores(output: Any, labels: Tensor, classes: int, to_logits: Callable[[Any], Tensor] | None) -> Tensor:
    """Scores (m, classes) of labels (m,) or (b, n), out of what a model gives, see `scores_of`.

    They are of clouds (b, classes), or of points (b, n, classes), (b, classes, n) or packed
    (m, classes). Raises `PointPeftError` for other shapes and for another number of classes.
    """
    output = scores_of(output, to_logits)
    shape = tuple(output.shape)
    if output.ndim == 3 and shape[2] != classes and shape[1] == classes:
        output = rearrange(output, "b c n -> b n c")
    if output.shape[-1] != classes or output.shape[:-1].numel() != labels.numel():
        raise PointPeftError(
            f"the model gives {shape} for labels {tuple(labels.shape)} of {classes} classes: its last layer must have "
            f"{classes} outputs, for each cloud in classification and for each point in segmentation"
        )
    scores: Tensor = output.reshape(-1, classes)
    return scores


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes) int64 on the CPU: how often class i was taken for class j, over labels (m,) that are known."""
    classes = scores.shape[1]
    known = labels != UNKNOWN
    pairs = labels[known] * classes + scores[known].argmax(dim=1)
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).cpu()


def figures(counts: Tensor, segmentation: bool) -> dict[str, float]:
    """The measures in percent that are told by confusions (classes, classes), over classes that occur.

    accuracy: the share that is right; class_accuracy: the mean of that over classes; miou, in segmentation: the mean
    over classes of intersection over union.
    """
    counts = counts.double()
    right, there, taken = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    occurs = there > 0
    if not occurs.any():
        raise PointPeftError("nothing here has a label that is known, so there is nothing to measure")
    measured = {
        "accuracy": float(100 * right.sum() / there.sum()),
        "class_accuracy": float(100 * (right[occurs] / there[occurs]).mean()),
    }
    if segmentation:
        # A class that is only ever predicted counts as well: its union is not empty, its intersection is.
        met = (there + taken) > 0
        measured["miou"] = float(100 * (right[met] / (there + taken - right)[met]).mean())
    return measured


def monitored(segmentation: bool) -> str:
    """The measure by which the best epoch is chosen on validation."""
    return "miou" if segmentation else "accuracy"


def class_report(counts: Tensor, classes: Sequence[str]) -> list[tuple[str, int, float]]:
    """(name, how many there are, the share that is right in percent) of each class that occurs."""
    right, there = counts.diagonal().tolist(), counts.sum(dim=1).tolist()
    return [(name, n, 100 * r / n) for name, n, r in zip(classes, there, right, strict=True) if n]
