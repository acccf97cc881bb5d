"""Two classifiers on the same questions: how far they agree beyond chance, and what a lead of one is worth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEVEL = 0.95
_HALVINGS = 50


def kappa(pairs: Tensor) -> float:
    """Cohen's kappa of counts (classes, classes), how often the first answers i where the second answers j.

    1 is agreement, 0 is what their shares of classes give by chance. Where both only ever give one and the same class,
    chance alone is agreement, and kappa is 1.
    """
    shares = pairs.double() / pairs.sum()
    agreed, chance = shares.diagonal().sum(), shares.sum(dim=1) @ shares.sum(dim=0)
    return 1.0 if chance == 1 else float((agreed - chance) / (1 - chance))


def at_most(count: int, of: int, share: float) -> float:
    """The probability of at most so many successes of a binomial, `of` trials that succeed with this share."""
    if count >= of:
        return 1.0
    number = torch.arange(count + 1, dtype=torch.float64)
    whole, chance = torch.tensor(float(of), dtype=torch.float64), torch.tensor(share, dtype=torch.float64)
    ways = torch.lgamma(whole + 1) - torch.lgamma(number + 1) - torch.lgamma(whole - number + 1)
    # 0 log 0 is 0
    terms = ways + torch.xlogy(number, chance) + torch.xlogy(whole - number, 1 - chance)
    return min(1.0, float(terms.logsumexp(dim=0).exp()))


def sign_test(count: int, of: int) -> float:
    """The two-sided p-value of `count` among `of` that fall to one side or the other, if both sides are equally likely.

    Of questions that only one of two classifiers has right, this is McNemar's exact test.
    """
    return min(1.0, 2 * at_most(min(count, of - count), of, 0.5))


def share_interval(count: int, of: int) -> tuple[float, float]:
    """The interval of Clopper and Pearson, from 0 to 1, that holds the share behind `count` of `of` in 95 % or more."""
    tail = (1 - LEVEL) / 2
    low = 0.0 if count == 0 else _crossing(lambda share: 1 - at_most(count - 1, of, share) >= tail)
    high = 1.0 if count == of else _crossing(lambda share: at_most(count, of, share) <= tail)
    return low, high


def _crossing(holds: Callable[[float], bool]) -> float:
    """The least share for which something holds, that holds for every greater one."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return (low + high) / 2
