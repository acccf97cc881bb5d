"""Learning rates: one grid for everything, chosen on validation clouds of all sets, wider where an edge is best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

GRID = (3e-4, 1e-3, 3e-3, 1e-2)
FACTOR = 3.0
EXTENSIONS = 2
"""Rates that may be added to the grid."""
Tried = Mapping[float, tuple[float, float]]
"""Rate -> accuracy on validation after the last epoch, and how much less than none the loss is."""


def on_validation(run: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy of a run on validation, and how much less than none the loss is."""
    return run["validated"], -run["validated_loss"]


def over_sets(tried: Sequence[Tried]) -> Tried:
    """The means over sets, of the rates that were tried on each of them."""
    shared = [rate for rate in tried[0] if all(rate in one for one in tried)] if tried else []
    return {rate: (fmean(one[rate][0] for one in tried), fmean(one[rate][1] for one in tried)) for rate in shared}


def best_rate(tried: Tried) -> float:
    """The rate of the best accuracy on validation; of several, that of the least loss, then the lower one."""
    return max(sorted(tried), key=lambda rate: tried[rate])


def missing_rates(tried: Tried, grid: Sequence[float] = GRID, extensions: int = EXTENSIONS) -> list[float]:
    """The rates still to try: the rest of the grid, then one beyond the edge that is best; none at the end."""
    rest = [rate for rate in grid if rate not in tried]
    if rest or len(tried) >= len(grid) + extensions:
        return rest
    best = best_rate(tried)
    if best == max(tried):
        return [_round(best * FACTOR)]
    return [_round(best / FACTOR)] if best == min(tried) else []


def on_edge(tried: Tried) -> bool:
    """Tell whether the best rate is the least or the greatest that was tried."""
    return best_rate(tried) in (min(tried), max(tried))


def _round(rate: float) -> float:
    return float(f"{rate:.1g}")
