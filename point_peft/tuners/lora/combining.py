"""The factors of several LoRA adapters, each with a weight, as those of one."""

import math
from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor

from point_peft.config import Changes, Combination
from point_peft.errors import AdapterError
from point_peft.tuners.lora.parts import LoraPart


def combined_tensors(
    adapters: Changes, weights: Sequence[float], combination_type: Combination, svd_rank: int | None
) -> tuple[dict[str, int], dict[str, dict[str, Tensor]]]:
    """The ranks and the tensors of the combination by layer, for a scale of one.

    Of the changes D_i = s_i B_i A_i with weights w_i, "cat" gives the sum of w_i D_i exactly, its rank being the sum of
    theirs; "svd" gives the best approximation of that sum of rank `svd_rank`, by default the largest of theirs.
    "linear" adds up the factors, each times the root of |w_i s_i|; it keeps their rank, which must be the same, and is
    only a rough approximation, since it also has products of B_i and A_j.
    """
    layers = _layers(adapters)
    ranks = {path: _rank(path, parts, combination_type, svd_rank) for path, parts in layers.items()}
    tensors: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for path, parts in layers.items():
            down, up = _factors(parts, weights, combination_type, ranks[path])
            a, b = rearrange(down, "n r i -> (n r) i"), rearrange(up, "n out r -> (n out) r")
            kernel = parts[0].lora_A.weight.shape[2:]  # of a convolution
            tensors[path] = {
                "lora_A.weight": a.reshape(len(a), -1, *kernel),
                "lora_B.weight": b.reshape(*b.shape, *parts[0].lora_B.weight.shape[2:]),
            }
    return ranks, tensors


def _layers(adapters: Changes) -> dict[str, list[LoraPart]]:
    """Path -> the parts of the adapters there, which must all adapt the same rows of the same layers."""
    (first, wanted), *_ = adapters.items()
    layers: dict[str, list[LoraPart]] = {path: [] for path in wanted}
    for name, parts in adapters.items():
        differing = sorted(set(wanted) ^ set(parts))
        if differing:
            raise AdapterError(f"adapters '{first}' and '{name}' adapt other layers: only one has '{differing[0]}'")
        for path, column in layers.items():
            part = parts[path]
            assert isinstance(part, LoraPart)
            if part.lora_magnitude_vector is not None:
                raise AdapterError(f"adapter '{name}' uses DoRA, whose changes do not add up: it cannot be combined")
            if column and part.chosen != column[0].chosen:
                raise AdapterError(f"adapters '{first}' and '{name}' choose other of q, k and v at '{path}'")
            column.append(part)
    return layers


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
    return (torch.nn.functional.pad(right[:, :kept], (0, 0, 0, missing)), torch.nn.functional.pad(left, (0, missing)))
