"""A LoRA adapter made of several others, each with a weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from einops import einsum, rearrange
from torch import Tensor

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.planning import build_adapter
from point_peft.config import FrozenMapping, PeftConfig
from point_peft.errors import AdapterError, PointPeftError, quoted
from point_peft.parts.backbone import Backbone
from point_peft.tuners.lora import LoraConfig, LoraPart, anchored

Combination = Literal["linear", "cat", "svd"]


def combine(
    adapters: Mapping[str, Adapter],
    weights: Sequence[float],
    combination_type: Combination,
    svd_rank: int | None,
    backbone_for: Callable[[PeftConfig], Backbone],
) -> Adapter:
    """The weighted combination of LoRA adapters at the same layers, complete but not attached.

    Of the changes D_i = s_i B_i A_i with weights w_i, "cat" gives the sum of w_i D_i exactly, its rank being the sum of
    theirs; "svd" gives the best approximation of that sum of rank `svd_rank`, by default the largest of theirs.
    "linear" adds up the factors, each times the root of |w_i s_i|; it keeps their rank, which must be the same, and is
    only a rough approximation, since it also has products of B_i and A_j.
    """
    _check(adapters, weights, combination_type, svd_rank)
    parts = {name: _parts(name, adapter) for name, adapter in adapters.items()}
    _check_alike(adapters, parts)
    first = next(iter(adapters.values()))
    columns = {path: [own[path] for own in parts.values()] for path in parts[next(iter(parts))]}
    ranks = {path: _rank(path, column, combination_type, svd_rank) for path, column in columns.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others: FrozenMapping[int] = FrozenMapping({anchored(path): r for path, r in ranks.items() if r != rank})
    tuner = first.config.tuners[0]
    assert isinstance(tuner, LoraConfig)
    # A scale of one: those of the adapters are in the factors.
    tuner = replace(tuner, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern=others, alpha_pattern=others)
    config = replace(first.config, tuners=(tuner,))
    combined = build_adapter(backbone_for(config), config, dict(first.own_modules()), first.saved)
    with torch.no_grad():
        for path, part in _parts("", combined).items():
            down, up = _factors(columns[path], weights, combination_type, ranks[path])
            part.lora_A.weight.copy_(rearrange(down, "n r i -> (n r) i").reshape(part.lora_A.weight.shape))
            part.lora_B.weight.copy_(rearrange(up, "n out r -> (n out) r").reshape(part.lora_B.weight.shape))
            if not all(bool(torch.isfinite(tensor).all()) for tensor in part.factors()):
                raise AdapterError(f"weights {list(weights)} give values at '{path}' that are not finite")
    combined.requires_grad_(False)
    return combined


def _check(
    adapters: Mapping[str, Adapter], weights: Sequence[float], combination_type: str, svd_rank: int | None
) -> None:
    kinds = get_args(Combination)
    if combination_type not in kinds:
        raise PointPeftError(f"combination_type is {quoted(combination_type)}; allowed: {', '.join(map(repr, kinds))}")
    if not adapters:
        raise AdapterError("an empty list of adapters cannot be combined: name at least one")
    numbers = [weight for weight in weights if type(weight) in (int, float) and math.isfinite(weight)]
    if len(numbers) != len(weights) or len(weights) != len(adapters):
        raise PointPeftError(
            f"weights is {quoted(list(weights))}; allowed: a finite number for each of the {len(adapters)} adapters"
        )
    if svd_rank is not None and (combination_type != "svd" or type(svd_rank) is not int or svd_rank < 1):
        raise PointPeftError(f"svd_rank is {svd_rank!r}; allowed: 1 or more with combination_type='svd', else None")


def _parts(name: str, adapter: Adapter) -> dict[str, LoraPart]:
    """The LoRA parts of an adapter by path, which has nothing else but modules of its own."""
    found: dict[str, LoraPart] = {}
    for path, part in adapter.all_parts():
        if isinstance(part, LoraPart):
            if part.lora_magnitude_vector is not None:
                raise AdapterError(f"adapter '{name}' uses DoRA, whose changes do not add up: it cannot be combined")
            found[path] = part
    methods = [tuner.method for tuner in adapter.config.tuners]
    if methods != [LoraConfig.method]:
        raise AdapterError(f"adapter '{name}' ({', '.join(methods)}) cannot be combined: only LORA alone can")
    return found


def _check_alike(adapters: Mapping[str, Adapter], parts: Mapping[str, Mapping[str, LoraPart]]) -> None:
    """All must adapt the same rows of the same layers, and have equal modules of their own."""
    (first, head), *others = adapters.items()
    for name, adapter in others:
        differing = sorted(set(parts[first]) ^ set(parts[name]))
        if differing:
            raise AdapterError(f"adapters '{first}' and '{name}' adapt other layers: only one has '{differing[0]}'")
        for path, part in parts[name].items():
            if part.chosen != parts[first][path].chosen:
                raise AdapterError(f"adapters '{first}' and '{name}' choose other of q, k and v at '{path}'")
        own, wanted = _saved_tensors(adapter), _saved_tensors(head)
        unlike = sorted(set(own) ^ set(wanted)) or [key for key in own if not _same(own[key], wanted[key])]
        if unlike:
            raise AdapterError(
                f"adapters '{first}' and '{name}' have modules of their own that differ in '{unlike[0]}', and these "
                "cannot be combined: train with modules_to_save=[], or give them the same heads"
            )


def _saved_tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": tensor
        for path, module in adapter.own_modules()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _rank(path: str, parts: Sequence[LoraPart], combination_type: Combination, svd_rank: int | None) -> int:
    """The rank of the combination at one layer."""
    ranks = [part.r for part in parts]
    if combination_type == "cat":
        return sum(ranks)
    if combination_type == "svd":
        return svd_rank or max(ranks)
    if len(set(ranks)) > 1:
        raise AdapterError(
            f"combination_type='linear' needs equal ranks, at '{path}' they are {ranks}: use 'cat' or 'svd'"
        )
    return ranks[0]


def _factors(
    parts: Sequence[LoraPart], weights: Sequence[float], combination_type: Combination, rank: int
) -> tuple[Tensor, Tensor]:
    """A (n, rank, in) and B (n, out, rank) of the combination at one layer, for a scale of one."""
    amounts = [weight * part.scale for weight, part in zip(weights, parts, strict=True)]
    wide = torch.promote_types(parts[0].lora_A.weight.dtype, torch.float32)
    pairs = [tuple(factor.to(wide) for factor in part.factors()) for part in parts]
    if combination_type == "linear":
        roots = [math.sqrt(abs(amount)) for amount in amounts]
        ups = [root * up for root, (up, _) in zip(roots, pairs, strict=True)]
        # The sign goes to one of the two, or it would be lost.
        signed = [math.copysign(root, amount) for root, amount in zip(roots, amounts, strict=True)]
        downs = [root * down for root, (_, down) in zip(signed, pairs, strict=True)]
        return torch.stack(downs).sum(0), torch.stack(ups).sum(0)
    down = torch.cat([amount * down for amount, (_, down) in zip(amounts, pairs, strict=True)], dim=1)
    up = torch.cat([up for up, _ in pairs], dim=2)
    if combination_type == "cat":
        return down, up
    left, lengths, right = torch.linalg.svd(einsum(up, down, "n out r, n r i -> n out i"), full_matrices=False)
    kept = min(rank, lengths.shape[-1])
    left = einsum(left[..., :kept], lengths[..., :kept], "n out r, n r -> n out r")
    missing = rank - kept  # a layer can be narrower than the rank
    return (
        torch.nn.functional.pad(right[:, :kept], (0, 0, 0, missing)),
        torch.nn.functional.pad(left, (0, missing)),
    )
