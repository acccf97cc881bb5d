"""The answers of two models to the same questions, counted batch by batch, and what the counts tell."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from point_peft.data.cloud import UNKNOWN, Task
from point_peft.training.agreement import kappa, share_interval, sign_test
from point_peft.training.calibration import calibration_error, reliability
from point_peft.training.objective import confusion, figures


class Names(NamedTuple):
    """The names of what was asked."""

    classes: tuple[str, ...]
    clouds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The answers of k models, the first of which are A and B, to the questions of some clouds; all add up."""

    confusions: Tensor
    """(k, classes, classes): true class by answer."""
    bins: Tensor
    """(k, 3, bins), see `reliability`."""
    losses: Tensor
    """(k,): the sums of the negative logarithms of the probability of the true class."""
    sureness: Tensor
    """(k,): the sums of the probabilities of what was answered, labelled or not."""
    pairs: Tensor
    """(classes, classes): A's answer by B's."""
    right: Tensor
    """(2, 2): if A is wrong or right by if B is."""
    clouds: Tensor
    """(b, 4): of each cloud its points, those on which A and B differ, and those that A and B have right."""
    whole: Tensor
    """(b, 3): of each cloud the label, and the answers of A and B, to the first of its questions."""

    @staticmethod
    def of(logs: Tensor, labels: Tensor, clouds: int) -> Counts:
        """The counts of log-probabilities (k, m, classes) and labels (m,), of equally many questions for each cloud."""
        answers, known, classes = logs.argmax(dim=2), labels != UNKNOWN, logs.shape[2]
        confidence, right = logs.amax(dim=2).exp(), answers == labels
        true = logs[:, known].gather(2, labels[known].expand(len(logs), -1)[..., None])[..., 0]
        by_cloud = torch.stack([torch.ones_like(known), answers[0] != answers[1], right[0], right[1]])
        whole = rearrange(torch.stack([labels, answers[0], answers[1]]), "a (b n) -> b n a", b=clouds)[:, 0]
        return Counts(
            confusions=torch.stack([confusion(own, labels) for own in logs]),
            bins=torch.stack([reliability(c[known], r[known]) for c, r in zip(confidence, right, strict=True)]).cpu(),
            losses=-true.double().sum(dim=1).cpu(),
            sureness=confidence.double().sum(dim=1).cpu(),
            pairs=_table(answers[0], answers[1], classes),
            right=_table(right[0][known].long(), right[1][known].long(), 2),
            clouds=reduce(by_cloud.long(), "a (b n) -> b a", "sum", b=clouds).cpu(),
            whole=whole.cpu(),
        )

    def __add__(self, other: Counts) -> Counts:
        both = {item.name: (getattr(self, item.name), getattr(other, item.name)) for item in fields(self)}
        added = {name: torch.cat(two) if name in ("clouds", "whole") else sum(two) for name, two in both.items()}
        return Counts(**added)


def _table(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """The counts (size, size) int64 of pairs of numbers below `size`."""
    return torch.bincount(rows * size + columns, minlength=size * size).reshape(size, size).cpu()


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The figures of one model; shares in percent, and None where nothing is labelled."""

    accuracy: float | None
    class_accuracy: float | None
    miou: float | None
    """The mean intersection over union, of segmentation."""
    calibration_error: float | None
    """See `calibration.calibration_error`."""
    loss: float | None
    """The mean negative logarithm of the probability of the true class."""
    confidence: float
    """The mean probability of what was answered."""
    reliability: tuple[tuple[float, ...], ...]
    """For each bin of confidence: its labelled answers, their mean confidence, the share that is right."""


class Right(NamedTuple):
    """The labelled clouds, in segmentation points, by who has them right."""

    both: int
    only_a: int
    only_b: int
    neither: int


@dataclass(frozen=True, kw_only=True)
class Lead:
    """The clouds on which only one is right, in segmentation on which one has more points right.

    Clouds are counted, not points: the points of a cloud are no independent trials.
    """

    a: int
    b: int
    share: float | None
    """The share of them, in percent, that is B's; None where there are none."""
    low: float
    high: float
    """The exact interval (Clopper-Pearson) that holds it in 95 % of the cases or more."""
    p: float
    """The exact two-sided probability of such a lead, or a greater one, between equals (McNemar's test)."""


@dataclass(frozen=True, kw_only=True)
class OfClass:
    """One class: how many labels it has, and the share in percent of them that each has right."""

    name: str
    labels: int
    a: float
    b: float


@dataclass(frozen=True, kw_only=True)
class Differing:
    """A cloud on which the two differ."""

    cloud: str
    index: int
    share: float
    """Of its points, in percent; 100 in classification."""
    true: str | None = None
    a: str | None = None
    b: str | None = None
    """The names of the true class and of the answers, in classification."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models, A and B, on the same clouds."""

    task: Task
    classes: tuple[str, ...]
    clouds: int
    answers: int
    """Clouds, in segmentation points."""
    labelled: int
    """Those of them that have a label."""
    a: Answered
    b: Answered
    together: Answered | None
    """Both adapters active at once, with A's head; None where that was not asked for."""
    agreement: float
    """The share of equal answers, in percent."""
    kappa: float
    """Cohen's."""
    right: Right | None
    lead: Lead | None
    of_classes: tuple[OfClass, ...]
    """Those that occur, the one on which the two differ most first."""
    pairs: tuple[tuple[int, ...], ...]
    """Counts of A's answers (rows) by B's (columns)."""
    differing: tuple[Differing, ...]
    """In the order of the data, in segmentation the cloud on which they differ most first."""

    @staticmethod
    def of(counts: Counts, names: Names, task: Task) -> Comparison:
        """The comparison that counts tell."""
        segmentation = task == "segmentation"
        known = int(counts.right.sum())
        answers = int(counts.pairs.sum())
        figures_of = [_answered(counts, number, answers, segmentation) for number in range(len(counts.losses))]
        (neither, only_b), (only_a, both) = counts.right.tolist()
        return Comparison(
            task=task,
            classes=names.classes,
            clouds=len(names.clouds),
            answers=answers,
            labelled=known,
            a=figures_of[0],
            b=figures_of[1],
            together=figures_of[2] if len(figures_of) > 2 else None,
            agreement=100 * int(counts.pairs.diagonal().sum()) / answers,
            kappa=kappa(counts.pairs),
            right=Right(both, only_a, only_b, neither) if known else None,
            lead=_lead(counts) if known else None,
            of_classes=_of_classes(counts, names.classes),
            pairs=tuple(map(tuple, counts.pairs.tolist())),
            differing=_differing(counts, names, segmentation),
        )


def _answered(counts: Counts, number: int, answers: int, segmentation: bool) -> Answered:
    bins, known = counts.bins[number], int(counts.right.sum())
    count = bins[0].clamp(min=1)
    measured = figures(counts.confusions[number], segmentation) if known else {}
    rows = torch.stack([bins[0], 100 * bins[1] / count, 100 * bins[2] / count], dim=1)
    return Answered(
        accuracy=measured.get("accuracy"),
        class_accuracy=measured.get("class_accuracy"),
        miou=measured.get("miou"),
        calibration_error=calibration_error(bins) if known else None,
        loss=float(counts.losses[number] / known) if known else None,
        confidence=float(100 * counts.sureness[number] / answers),
        reliability=tuple(map(tuple, rows.tolist())),
    )


def _lead(counts: Counts) -> Lead:
    a, b = counts.clouds[:, 2], counts.clouds[:, 3]
    of_a, of_b = int((a > b).sum()), int((b > a).sum())
    low, high = share_interval(of_b, of_a + of_b)
    return Lead(
        a=of_a,
        b=of_b,
        share=100 * of_b / (of_a + of_b) if of_a + of_b else None,
        low=100 * low,
        high=100 * high,
        p=sign_test(of_b, of_a + of_b),
    )


def _of_classes(counts: Counts, classes: tuple[str, ...]) -> tuple[OfClass, ...]:
    labels = counts.confusions[0].sum(dim=1)
    shares = 100 * counts.confusions.diagonal(dim1=1, dim2=2).double() / labels.clamp(min=1)
    found = [
        OfClass(name=classes[i], labels=int(labels[i]), a=float(shares[0, i]), b=float(shares[1, i]))
        for i in range(len(classes))
        if labels[i]
    ]
    return tuple(sorted(found, key=lambda own: -abs(own.a - own.b)))


def _differing(counts: Counts, names: Names, segmentation: bool) -> tuple[Differing, ...]:
    shares = (100 * counts.clouds[:, 1].double() / counts.clouds[:, 0]).tolist()
    places = [place for place, share in enumerate(shares) if share]
    if segmentation:
        places.sort(key=lambda place: -shares[place])
        return tuple(Differing(cloud=names.clouds[i], index=i, share=shares[i]) for i in places)
    words = [[names.classes[n] if n >= 0 else None for n in row] for row in counts.whole.tolist()]
    return tuple(
        Differing(cloud=names.clouds[i], index=i, share=shares[i], true=words[i][0], a=words[i][1], b=words[i][2])
        for i in places
    )
