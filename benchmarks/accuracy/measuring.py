"""A classifier on test clouds: what it is right in, how sure it is, and what corruption costs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import nn

from point_peft.data.cloud_set import CloudSet
from point_peft.data.corrupting import CORRUPTIONS
from point_peft.training.calibration import calibration_error, reliability
from point_peft.training.feeding import Feed
from point_peft.training.inference import Inference
from point_peft.training.models import to_inputs_of
from point_peft.training.objective import Loss
from point_peft.training.opening import Corrupted
from point_peft.training.plan import in_order

BATCH = 50
SEVERITIES = (1, 3, 5)
Array = npt.NDArray[Any]
Classifier = Callable[[Any], tuple[Array, Array]]
"""From a data set to labels (m,) and probabilities (m, classes)."""


def inference_of(model: nn.Module, classes: int) -> Inference:
    """A model, ready to predict."""
    return Inference(
        model=model,
        wrapped=model,
        accelerator=Accelerator(),
        feed=Feed(to_inputs=to_inputs_of(model, 1)),
        loss=Loss(classes=classes),
        batch_size=BATCH,
        segmentation=False,
    )


def classifier_of(model: nn.Module, classes: int) -> Classifier:
    """A trained model as a classifier."""
    inference = inference_of(model, classes)

    def classify(clouds: Any) -> tuple[Array, Array]:
        found = list(inference.predicted(clouds, in_order(len(clouds), BATCH)))
        labels = torch.cat([labels for labels, _ in found])
        scores = torch.cat([scores for _, scores in found])
        return labels.numpy(force=True), scores.softmax(dim=1).numpy(force=True)

    return classify


class Answers(NamedTuple):
    """What came of some clouds."""

    right: Array
    """(m,) bool"""
    confidence: Array
    """(m,): the probability of the class that was answered."""

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * float(self.right.mean())


def answers(classify: Classifier, clouds: Any) -> Answers:
    """Classify the clouds of a data set."""
    labels, shares = classify(clouds)
    return Answers(shares.argmax(axis=1) == labels, shares.max(axis=1))


def measured(classify: Classifier, test: CloudSet, corrupted: int) -> dict[str, Any]:
    """The figures of a classifier, as JSON; of the first `corrupted` test clouds also under each corruption."""
    plain = answers(classify, test)
    found: dict[str, Any] = {
        "accuracy": plain.accuracy,
        "ece": calibration_error(reliability(torch.from_numpy(plain.confidence), torch.from_numpy(plain.right))),
        "right": packed(plain.right),
        "count": len(plain.right),
        "confidence": np.round(1000 * plain.confidence).astype(int).tolist(),
    }
    part = test.subset(range(min(corrupted, len(test))))
    if len(part):
        found["corrupted"] = {
            kind: [answers(classify, Corrupted(part, kind, severity)).accuracy for severity in SEVERITIES]
            for kind in CORRUPTIONS
        }
        found["uncorrupted"] = 100 * float(plain.right[: len(part)].mean())
    return found


def packed(right: Array) -> str:
    """Booleans (m,) as hexadecimal digits."""
    return np.packbits(right).tobytes().hex()


def unpacked(text: str, count: int) -> Array:
    """The booleans (count,) that `packed` wrote."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)
