"""Classifiers on the features that a head reads: a probe that is converged, and retrieval, which trains nothing."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy.special import softmax  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks.accuracy.measuring import BATCH, Array, Classifier
from point_peft.errors import PointPeftError
from point_peft.training.feeding import Feed
from point_peft.training.models import to_inputs_of
from point_peft.training.plan import in_order

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of C among which validation chooses."""
DEFAULT_STRENGTH = 1e-2
"""C where there is no validation."""
SHARPNESS = 20.0
"""Of the softmax over cosines."""


def features_of(model: nn.Module, head: str, clouds: Any) -> tuple[Array, Array]:
    """The input (m, c) of the module `head` of a model for each cloud, and the labels (m,)."""
    kept: list[Tensor] = []
    feed = Feed(to_inputs=to_inputs_of(model, 1))
    labels = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        model.eval()
        with torch.no_grad():
            for places in in_order(len(clouds), BATCH):
                batch = feed.batch([clouds[place] for place in places])
                args, kwargs = feed.inputs(batch)
                model(*args, **kwargs)
                labels.append(feed.labels(batch))
    finally:
        handle.remove()
    if len(kept) != len(labels):
        raise PointPeftError(f"the head {head!r} ran {len(kept)} times in {len(labels)} batches")
    return torch.cat(kept).flatten(1).numpy().astype(np.float64), torch.cat(labels).numpy()


def converged_probe(
    model: nn.Module, head: str, train: Any, val: Any, classes: int
) -> tuple[Classifier, dict[str, Any]]:
    """Logistic regression by L-BFGS on standardised features, and how it was chosen, as JSON."""
    values, labels = features_of(model, head, train)
    scaler = StandardScaler().fit(values)
    strengths = STRENGTHS if val is not None and len(val) else (DEFAULT_STRENGTH,)
    held = features_of(model, head, val) if len(strengths) > 1 else None
    found = []
    for strength in strengths:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            probe = LogisticRegression(C=strength, max_iter=5000).fit(scaler.transform(values), labels)
        converged = not any(issubclass(one.category, ConvergenceWarning) for one in caught)
        figures = (0.0, 0.0) if held is None else _figures(_shares(probe, scaler.transform(held[0]), classes), held[1])
        found.append((figures, strength, converged, probe))
    figures, strength, converged, probe = max(found, key=lambda one: one[0])

    def classify(clouds: Any) -> tuple[Array, Array]:
        own, right = features_of(model, head, clouds)
        return right, _shares(probe, scaler.transform(own), classes)

    tried = {f"{own:g}": round(pair[0], 2) for pair, own, *_ in found}
    return classify, {"C": strength, "tried": tried, "converged": converged, "val": figures[0]}


def retrieval(model: nn.Module, head: str, train: Any, classes: int) -> Classifier:
    """The classes of the training clouds, weighted by softmax(20 cos) between standardised features."""
    values, labels = features_of(model, head, train)
    scaler = StandardScaler().fit(values)
    rows, one_hot = _unit(scaler.transform(values)), np.eye(classes)[labels]

    def classify(clouds: Any) -> tuple[Array, Array]:
        own, right = features_of(model, head, clouds)
        return right, softmax(SHARPNESS * _unit(scaler.transform(own)) @ rows.T, axis=1) @ one_hot

    return classify


def _shares(probe: LogisticRegression, values: Array, classes: int) -> Array:
    """Probabilities (m, classes); those of classes that no training cloud has are 0."""
    shares = np.zeros((len(values), classes))
    shares[:, probe.classes_] = probe.predict_proba(values)
    return shares


def _figures(shares: Array, labels: Array) -> tuple[float, float]:
    """Accuracy in percent, and how much less than none the loss is."""
    loss = log_loss(labels, np.clip(shares, 1e-12, None), labels=range(shares.shape[1]))
    return 100 * float((shares.argmax(axis=1) == labels).mean()), -float(loss)


def _unit(values: Array) -> Array:
    unit: Array = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return unit
