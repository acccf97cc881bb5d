"""Routing: which adapter a cloud is for, told by one frozen query and the memory banks of all adapters.

P. C. Mahalanobis: "On the generalised distance in statistics", Proceedings of the National Institute of Sciences of
India 2, 1936; K. Lee, K. Lee, H. Lee, J. Shin: "A Simple Unified Framework for Detecting Out-of-Distribution Samples
and Adversarial Attacks", NeurIPS 2018, https://arxiv.org/abs/1807.03888

The query u (c,) of a cloud is that of the banks, a pooled feature of the frozen backbone, of unit length. A bank with
rows u_1 … u_n, mean m and covariance C (divided by n) stands for the normal distribution with

    S   = 0.8 C + 0.2 (tr C / c) I
    d   = |W^T (u - m)|                     W W^T = S^-1
    l   = -(d^2 + log |S|) / 2              log of its density at u, but for what all banks have alike

A row left out lies at this distance from the others (with the sphere of all rows, n / (n - 1) times), without a second
inverse, by the formula of Sherman and Morrison:

    d_i^2 = n / (n - 1) e_i / (1 - 0.8 e_i / (n - 1))           e_i = (u_i - m)^T S^-1 (u_i - m)

With the median t of these distances and their 99 % quantile q, of the bank k that is densest at u,

    score of k         f_k = (q_k - d_k) / (q_k - t_k)          1: like a typical row; below 0: 99 % are nearer
    score of others    f_k - (l_k - l_j) / c

The cloud goes to the adapter with the highest score, and to none if that is below 0.

Chosen on validation clouds of radhar, mars, digits and crops of autzen, 300 rows a bank, among these ways: in percent,
how often a cloud's own bank is best, how often known clouds abstain and how often unknown ones do (procedural shapes,
digits turned in space), and how often the own bank is best where mars and digits are two tasks each, of five classes,
and where banks have 300, 30, 75 and 12 rows. `python -m benchmarks.routing_variants` prints them.

    the above                                       100.0     1.7    84.0  92.0    92.5    99.0
    0.1 of a sphere instead of 0.2                  100.0     1.3    85.3  91.3    91.2    89.8
    0.01 of a sphere                                 99.8     0.8    82.7  93.3    71.1    58.5
    a share that is estimated (OAS)                  99.8     1.0    85.3  96.0    88.9    99.8
    the best chosen by f instead of l                98.3     1.3    79.3  89.3    91.3    98.8
    the mean of the tokens, not their maximum        93.8     7.7    85.3  91.3    78.2    98.3
    the tokens before the middle block              100.0     0.8    64.7  58.7    82.6    93.3
    the patch embedding                              94.0     2.0    12.7  48.7    68.3    84.0
    the nearest row by cosine                        99.8     2.8    70.7  90.0    91.9    97.8
    the same, each bank centred                      83.0     0.0     0.0   0.0    74.6    67.2
    the same, standardised with all banks           100.0     2.3    65.3  70.0    90.7    98.0
    the nearest row, each bank whitened              96.2    13.2    96.7  98.7    54.1    28.5
    three nearest rows, whitened by all banks       100.0     2.5    92.7  94.7    92.4    98.0

The last finds more unknown clouds. It was not taken because a product with every row costs more, and because each score
would change when an adapter comes: with the above, that of the best does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from point_peft.adapting import mixed
from point_peft.adapting.adapter import Adapter
from point_peft.adapting.adding import all_adapters, meant_adapters, task_names
from point_peft.adapting.fitting import fitting_states
from point_peft.bank import frozen_tokens
from point_peft.errors import AdapterError
from point_peft.parts.base import FEWEST_ROWS, Bank
from point_peft.running.forward import Root
from point_peft.running.nested import Args, Kwargs
from point_peft.running.second import eval_mode

AUTO = "auto"
"""Instead of names of adapters: those that `route` chooses."""
SHRINKAGE = 0.2
"""The share of the sphere in a covariance."""
KEPT = 0.99
"""The share of the rows left out that score 0 or more."""
BUILD = "RoutingBankConfig() in its configuration gives it one, and build_memory_bank(batches, adapter_name=…) fills it"


@dataclass(frozen=True, eq=False)
class Spread:
    """The place and extent of a bank's rows among all features, and how far from their middle rows are."""

    state: tuple[tuple[Tensor, int], ...]
    """The bank's buffers that it was taken of, and the changes in place that each had had."""
    whiten: Tensor
    """W (c, c)"""
    offset: Tensor
    """-W^T m (c,)"""
    volume: Tensor
    """log |S|"""
    typical: Tensor
    limit: Tensor
    """The distances t and q."""

    @staticmethod
    def of(bank: Bank) -> Spread:
        """The spread of the rows that a bank has now."""
        state = state_of(bank)
        rows = bank.features()
        count, mean = len(rows), rows.mean(dim=0)
        centred = rows - mean
        covariance = centred.T @ centred / count
        # Rows that are all alike have none, and still a place.
        sphere = covariance.diagonal().mean().clamp_min(1e-10)
        covariance = (1 - SHRINKAGE) * covariance
        covariance.diagonal().add_(SHRINKAGE * sphere)
        factor = torch.linalg.cholesky(covariance)
        unit = torch.eye(len(mean), dtype=rows.dtype, device=rows.device)
        whiten = torch.linalg.solve_triangular(factor, unit, upper=False).T.contiguous()
        squared = (centred @ whiten).square().sum(dim=1)
        left_out = count / (count - 1) * squared / (1 - (1 - SHRINKAGE) * squared / (count - 1))
        typical, limit = left_out.sqrt().quantile(left_out.new_tensor([0.5, KEPT])).unbind()
        volume = 2 * factor.diagonal().log().sum()
        # Where all rows are alike, none is farther than another.
        limit = torch.maximum(limit, 1.01 * typical + 1e-3)
        return Spread(state, whiten, -(mean @ whiten), volume, typical, limit)

    def distances(self, query: Tensor) -> Tensor:
        """d (b,) of queries (b, c)."""
        lengths: Tensor = torch.linalg.vector_norm(torch.addmm(self.offset, query, self.whiten), dim=1)
        return lengths


def state_of(bank: Bank) -> tuple[tuple[Tensor, int], ...]:
    """The buffers of a bank, and how often each has been changed in place."""
    return tuple((buffer, 0 if buffer.is_inference() else buffer._version) for buffer in bank.buffers())


# By bank, so that copies and files know nothing of it, and that it goes when its bank does. Two threads that come at
# once both take it, which is the same.
_spreads: WeakKeyDictionary[Bank, Spread] = WeakKeyDictionary()


def spread_of(bank: Bank) -> Spread:
    """The spread of a bank, taken once for the rows that it has."""
    known = _spreads.get(bank)
    now = state_of(bank)
    same = known is not None and len(known.state) == len(now)
    if known is None or not same or any(a is not b or v != w for (a, v), (b, w) in zip(known.state, now, strict=True)):
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(now[0][0].device.type, enabled=False):
            known = _spreads[bank] = Spread.of(bank)
    return known


def scores(query: Tensor, banks: Sequence[Bank]) -> Tensor:
    """Scores (b, banks) of queries (b, c) of unit length."""
    spreads = [spread_of(bank) for bank in banks]
    distances = torch.stack([spread.distances(query) for spread in spreads], dim=1)
    density = -(distances.square() + torch.stack([spread.volume for spread in spreads])) / 2
    limit, typical = torch.stack([torch.stack([spread.limit, spread.typical]) for spread in spreads], dim=1)
    densest, place = density.max(dim=1, keepdim=True)
    fit: Tensor = ((limit - distances) / (limit - typical)).gather(1, place)
    return fit - (densest - density) / query.shape[1]


def route(
    root: Root, args: Args, kwargs: Kwargs, adapters: str | Sequence[str] | None
) -> tuple[tuple[str | None, ...], Tensor]:
    """The adapter for each sample, and the scores (b, adapters), as `AdapterSet.route` says."""
    banks = banks_for_routing(root, adapters)
    first, bank = next(iter(banks.items()))
    with eval_mode(root.base_model.modules()):
        tokens = frozen_tokens(root, args, kwargs, bank.source, first)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        query = nn.functional.normalize(bank.query(tokens).float(), dim=1)
        wrong = (~query.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if wrong:
            raise AdapterError(f"sample {wrong[0]} of {len(query)} cannot be routed: its features are not finite")
        found = scores(query, list(banks.values()))
        best, place = found.max(dim=1)
    names = list(banks)
    chosen = zip(best.tolist(), place.tolist(), strict=True)
    return tuple(names[index] if score >= 0 else None for score, index in chosen), found


def forward_by_name(root: Root, args: Args, kwargs: Kwargs, names: Sequence[str | None] | str) -> Any:
    """The output for a batch, each sample with its own adapter, as `AdapterSet.forward_mixed` says.

    What the stem gives for the query serves the adapters too, where all take the model's arguments as they are.
    """
    if names != AUTO:
        return mixed.forward_mixed(root, args, kwargs, task_names(root.adapters, names))
    alike = not any(fitting_states(adapter) for adapter in all_adapters(root.adapters).values())
    with mixed.sharing(root, args, kwargs, 0) if alike else nullcontext():
        chosen, _ = route(root, args, kwargs, None)
        return mixed.forward_mixed(root, args, kwargs, chosen)


def banks_for_routing(root: Root, adapters: str | Sequence[str] | None) -> dict[str, Bank]:
    """The banks of the adapters that are meant, None: of all that have one; all can be compared with one query."""
    meant = meant_adapters(root.adapters, adapters)
    found = {name: bank_for_routing(adapter) for name, adapter in meant.items()}
    lacking = [name for name, bank in found.items() if bank is None]
    banks = {name: bank for name, bank in found.items() if bank is not None}
    if not meant or not banks or (adapters is not None and lacking):
        who = f"adapter '{lacking[0]}' has no memory bank" if lacking else "there is no adapter"
        raise AdapterError(f"{who}, so nothing can be routed to it: {BUILD}")
    for name, bank in banks.items():
        if bank.lacks_rows():
            raise AdapterError(f"the memory bank of adapter '{name}' is empty: call build_memory_bank(batches) for it")
        count = len(bank.rows)
        if count < FEWEST_ROWS:
            raise AdapterError(f"the memory bank of '{name}' has {count} rows, routing needs {FEWEST_ROWS} or more")
    _check_alike(root, meant, banks)
    return banks


def bank_for_routing(adapter: Adapter) -> Bank | None:
    """The bank of an adapter that routes to it: of several, one that is for routing alone, else the first."""
    banks = [state.bank for state in adapter.shared_states() if state.bank is not None]
    return min(banks, key=lambda bank: bank.in_forward, default=None)


def _check_alike(root: Root, meant: Mapping[str, Adapter], banks: Mapping[str, Bank]) -> None:
    """Raise `AdapterError` unless one query serves all banks."""
    what: dict[str, dict[str, Any]] = {
        "features of width": {name: bank.rows.shape[1] for name, bank in banks.items()},
        "tokens of source": {name: f"'{bank.source}'" for name, bank in banks.items()},
        "clouds of columns": {name: [s.takes for s in fitting_states(meant[name])][:1] for name in banks},
        "prefix tokens of": {name: _base_of(meant[name], root.base_model) for name in banks},
    }
    for kind, of in what.items():
        first, *others = of
        for other in others:
            if of[other] != of[first]:
                raise AdapterError(
                    f"one query cannot serve the memory banks of '{first}' and '{other}': they are made of {kind} "
                    f"{of[first]} and {of[other]}; name adapters that agree in route(points, adapters)"
                )


def _base_of(adapter: Adapter, base: nn.Module) -> str:
    """The backbone whose prefix tokens an adapter was made for."""
    return "another base" if any(state.other_base(base) for state in adapter.shared_states()) else "this base"
