"""BatchNorm inside an adapter, whose forward may be run again by gradient checkpointing."""

from typing import Any

import torch
from torch import Tensor, nn

Norm = nn.BatchNorm1d | nn.SyncBatchNorm
"""The second is what `SyncBatchNorm.convert_sync_batchnorm` makes of the first."""


def batch_norm(norm: nn.Module, features: Tensor, *, recomputing: bool) -> Tensor:
    """Features (..., c) normalised; when checkpointing repeats a forward, the statistics are not updated again."""
    assert isinstance(norm, Norm)
    x = features.reshape(-1, features.shape[-1])
    run = _of_all_processes if _is_shared_on_cpu(norm, x) else nn.Module.__call__
    if norm.training and recomputing:
        # On copies: a recomputation must save for backward just what the forward saved.
        held = {name: buffer for name, buffer in norm._buffers.items() if buffer is not None}
        try:
            norm._buffers.update({name: buffer.clone() for name, buffer in held.items()})
            x = run(norm, x)
        finally:
            norm._buffers.update(held)
    else:
        x = run(norm, x)
    return x.reshape(features.shape)


def _is_shared_on_cpu(norm: Norm, x: Tensor) -> bool:
    """Tell whether statistics are those of several processes on CPUs, for which torch has no function."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or x.device.type != "cpu":
        return False
    return torch.distributed.is_initialized() and torch.distributed.get_world_size(norm.process_group) > 1


def _of_all_processes(norm: Norm, x: Tensor) -> Tensor:
    """x (n, c) normalised by the mean and variance over all processes, with gradient to all."""
    assert isinstance(norm, nn.SyncBatchNorm)
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
    mean, var = norm.running_mean, norm.running_var
    return shared_batch_norm(x, mean, var, norm.weight, norm.bias, momentum or 0.0, norm.eps, norm.process_group)


def shared_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """x (n, c) normalised by the statistics over the processes of a group, None: all, with gradient to all of them.

    Running statistics move by `momentum`. Processes may have different numbers of rows.
    """
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    total: Tensor = _Sum.apply(torch.cat([rows.sum(dim=0), rows.new_tensor([len(rows)])]), group)  # type: ignore[no-untyped-call]
    n = total[-1].detach()
    mean = total[:-1] / n
    var: Tensor = _Sum.apply((rows - mean).square().sum(dim=0), group) / n  # type: ignore[no-untyped-call]
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * n / (n - 1)).to(running_var.dtype), momentum)
    rows = (rows - mean) * torch.rsqrt(var + eps)
    rows = rows if weight is None else rows * weight
    return (rows if bias is None else rows + bias).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group, total = group, tensor.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None
