"""What a difference is worth: the paired bootstrap over seeds and test clouds."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

DRAWS = 4000
LEVEL = 0.95


class Difference(NamedTuple):
    """A difference of accuracies in points, and the interval that holds 95 % of its draws."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Better or worse, if zero lies outside the interval; else nothing."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else ""


def paired_difference(
    right: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_], *, same_clouds: bool = True, draws: int = DRAWS
) -> Difference:
    """The accuracy of one classifier less that of another, of answers (seeds, clouds) to the same questions.

    Seeds and clouds are drawn with replacement, both of them, the same ones for both classifiers. `same_clouds` says
    that a column is the same cloud for every seed; else each seed has clouds of its own, which are drawn for it alone.
    The draws are seeded, so that the same answers give the same interval.
    """
    gain = 100 * (right.astype(np.float64) - other.astype(np.float64))
    seeds, clouds = gain.shape
    of_seeds = weights(seeds, draws, 0)
    if same_clouds:
        means = ((of_seeds @ gain) * weights(clouds, draws, 1)).sum(axis=1)
    else:
        own = np.stack([weights(clouds, draws, 1 + number) @ row for number, row in enumerate(gain)], axis=1)
        means = (of_seeds * own).sum(axis=1)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Difference(float(gain.mean()), float(low), float(high))


@cache
def weights(count: int, draws: int, stream: int) -> npt.NDArray[np.float64]:
    """The shares (draws, count) that so many things have in draws of as many of them with replacement."""
    rng = np.random.default_rng((0, stream))
    return rng.multinomial(count, np.full(count, 1 / count), size=draws) / count


def slope(curve: npt.ArrayLike) -> float | None:
    """The mean of the last quarter of a curve less that of the quarter before; None below four values."""
    values = np.asarray(curve, np.float64)
    quarter = len(values) // 4
    if not quarter:
        return None
    return float(values[-quarter:].mean() - values[-2 * quarter : -quarter].mean())
