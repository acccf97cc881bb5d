"""Calibration: the gap between how sure a classifier says it is and how often it is right."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def reliability(confidence: Tensor, right: Tensor) -> Tensor:
    """(3, BINS) float64: of each bin of confidence the answers, the sum of their confidences, and those that are right.

    `confidence` (m,) is the probability of the class that was answered, `right` (m,) bool. Of further answers, the
    table is added.
    """
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    columns = torch.stack([torch.ones_like(confidence), confidence, right.to(confidence.dtype)]).double()
    return torch.zeros(3, BINS, dtype=torch.float64, device=place.device).index_add_(1, place, columns)


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error in percent, of a table (3, BINS) of `reliability`.

    That is |accuracy - confidence| of each bin, weighted by its answers (Guo et al., "On Calibration of Modern Neural
    Networks", ICML 2017, https://arxiv.org/abs/1706.04599).
    """
    count, confidence, right = bins
    return float(100 * (right - confidence).abs().sum() / count.sum())
