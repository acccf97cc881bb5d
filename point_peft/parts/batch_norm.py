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
    total: Tensor = _Sum.apply(torch.cat([x.sum(dim=0), x.new_tensor([len(x)])]), norm.process_group)  # type: ignore[no-untyped-call]
    n = total[-1].detach()
    mean = total[:-1] / n
    squares: Tensor = _Sum.apply((x - mean).square().sum(dim=0), norm.process_group)  # type: ignore[no-untyped-call]
    var = squares / n
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(var * n / (n - 1), share)
    x = (x - mean) * torch.rsqrt(var + norm.eps)
    return x if norm.weight is None else x * norm.weight + norm.bias


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
