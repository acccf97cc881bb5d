"""Operations on task vectors: what several fine-tunings changed in one tensor, as a stack (tasks, ...).

P. Yadav, D. Tam, L. Choshen, C. Raffel, M. Bansal: "TIES-Merging: Resolving Interference When Merging Models", NeurIPS
2023, https://arxiv.org/abs/2306.01708 (trimming, sign election, disjoint mean). L. Yu, B. Yu, H. Yu, F. Huang, Y. Li:
"Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML 2024,
https://arxiv.org/abs/2311.03099 (DARE: dropping at random and rescaling).

Deviations, each with its reason:
- tasks have weights, as in PEFT: they multiply the values that are kept. They have no say in the election, and what the
  mean is divided by is the number of the values that are kept.
- a task of negative weight is its change negated, in the election too, and one of weight 0 takes no part. In PEFT it
  votes as if it were to be added: values on which the tasks agree after the subtraction are then the ones that are
  dropped.
- an even vote elects the positive sign, as in PEFT; in the paper it keeps nothing. By number, two tasks that disagree
  are always even.
- what is trimmed or dropped is that of one tensor at a time, as in PEFT, not of the whole model.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from point_peft.config import Combination


def task_arithmetic(tasks: Tensor, weights: Tensor, combination: Combination) -> Tensor:
    """One tensor (...) of a stack (tasks, ...), as a combination says it, for weights (tasks,)."""
    if combination.density is not None:
        prune = dropped if combination.combination_type.startswith("dare") else trimmed
        tasks = prune(tasks, combination.density)
    if combination.elects:
        return elected_mean(tasks, weights, by_number=combination.majority_sign_method == "frequency")
    return weighted_sum(tasks, weights)


def weighted_sum(tasks: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t tau_t."""
    return einsum(weights, tasks, "t, t ... -> ...")


def trimmed(tasks: Tensor, density: float) -> Tensor:
    """Each task with its largest values by size, the share `density` of them, rounded down; the others become 0."""
    flat = rearrange(tasks, "t ... -> t (...)")
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(tasks)


def dropped(tasks: Tensor, density: float) -> Tensor:
    """m tau / density with m ~ Bernoulli(density) for each value, of which the expectation is tau.

    The numbers are drawn task by task, from torch's own generator.
    """
    return tasks * torch.bernoulli(torch.full_like(tasks, density)) / density


def elected_mean(tasks: Tensor, weights: Tensor, *, by_number: bool) -> Tensor:
    """The weighted mean of those values that have the elected sign, and 0 where there are none.

    sigma_t = sgn(w_t) tau_t,   gamma = sgn(sum_t sigma_t), or sgn(sum_t sgn(sigma_t)) `by_number`
    T = {t: sgn(sigma_t) = gamma},   sum_{t in T} w_t tau_t / |T|
    """
    signed = einsum(weights.sign(), tasks, "t, t ... -> t ...")
    votes = signed.sign() if by_number else signed
    agrees = torch.where(votes.sum(0) >= 0, signed > 0, signed < 0)
    return weighted_sum(signed * agrees, weights.abs()) / agrees.sum(0).clamp_min(1)
