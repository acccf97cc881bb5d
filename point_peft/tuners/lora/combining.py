"""The factors of several LoRA adapters, each with a weight, as those of one."""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor

from point_peft.config import Changes, Combination
from point_peft.errors import AdapterError
from point_peft.tuners.lora.parts import LoraPart
from point_peft.tuners.lora.task_vectors import task_arithmetic


def combined_tensors(
    adapters: Changes, weights: Sequence[float], combination: Combination
) -> tuple[dict[str, int], dict[str, dict[str, Tensor]]]:
    """The ranks and the tensors of the combination by layer, for a scale of one."""
    layers = _layers(adapters)
    ranks = {path: _rank(path, parts, combination) for path, parts in layers.items()}
    tensors: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for path, parts in layers.items():
            down, up = _factors(path, parts, weights, combination, ranks[path])
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


def _rank(path: str, parts: Sequence[LoraPart], combination: Combination) -> int:
    """The rank of the combination at one layer."""
    ranks, kind = [part.r for part in parts], combination.combination_type
    if kind == "cat":
        return sum(ranks)
    if combination.of_changes:
        return combination.svd_rank or max(ranks)
    if len(set(ranks)) > 1:
        others = f"'{kind}_svd'" if combination.prunes else "'cat' or 'svd'"
        raise AdapterError(f"combination_type='{kind}' needs equal ranks, at '{path}' they are {ranks}: use {others}")
    return ranks[0]


def _factors(
    path: str, parts: Sequence[LoraPart], weights: Sequence[float], combination: Combination, rank: int
) -> tuple[Tensor, Tensor]:
    """A (n, rank, in) and B (n, out, rank) of the combination at one layer, for a scale of one."""
    like = parts[0].lora_A.weight
    wide = torch.promote_types(like.dtype, torch.float32)
    pairs = [[factor.to(wide) for factor in part.factors()] for part in parts]
    ups, downs = [up for up, _ in pairs], [down for _, down in pairs]
    scales = [part.scale for part in parts]
    if combination.of_changes:
        scaled = zip(scales, ups, downs, strict=True)
        changes = [scale * einsum(up, down, "n out r, n r i -> n out i") for scale, up, down in scaled]
        change = task_arithmetic(torch.stack(changes), like.new_tensor(weights, dtype=wide), combination)
        if not bool(torch.isfinite(change).all()):
            raise AdapterError(f"weights {list(weights)} give values at '{path}' that are not finite")
        return _low_rank(change, rank)
    amounts = like.new_tensor([w * scale for w, scale in zip(weights, scales, strict=True)], dtype=wide)
    if combination.combination_type == "cat":
        down = torch.cat([amount * down for amount, down in zip(amounts, downs, strict=True)], dim=1)
        return down, torch.cat(ups, dim=2)
    # The sign goes to one of the two, or it would be lost.
    roots = amounts.abs().sqrt()
    down = task_arithmetic(torch.stack(downs), amounts.sign() * roots, combination)
    return down, task_arithmetic(torch.stack(ups), roots, combination)


def _low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the best approximation of a change (n, out, in) of a rank."""
    left, lengths, right = torch.linalg.svd(change, full_matrices=False)
    kept = min(rank, lengths.shape[-1])
    left = einsum(left[..., :kept], lengths[..., :kept], "n out r, n r -> n out r")
    missing = rank - kept  # a layer can be narrower than the rank
    return torch.nn.functional.pad(right[:, :kept], (0, 0, 0, missing)), torch.nn.functional.pad(left, (0, missing))
