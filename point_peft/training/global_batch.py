"""A batch that several processes share, as if one process had all of it.

Random numbers and the statistics of BatchNorm are those of the whole batch. A process that drew dropout for its own
clouds only, or normalised by them, would train another model for each number of processes; here the number of
processes changes nothing but the speed, and sums by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from point_peft.parts.batch_norm import shared_batch_norm
from point_peft.torch_private import run_backward

# Each multiplies its first argument by random numbers: what it makes of ones is what it would multiply by.
_DROPOUTS: tuple[Any, ...] = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
# Each overwrites a tensor with random numbers.
_IN_PLACE: tuple[Any, ...] = (Tensor.bernoulli_, Tensor.exponential_, Tensor.normal_, Tensor.random_, Tensor.uniform_)
_LIKE: tuple[Any, ...] = (torch.bernoulli, torch.rand_like, torch.randn_like, torch.randint_like)
_SIZED: tuple[Any, ...] = (torch.rand, torch.randn)


class GlobalBatch(TorchFunctionMode):
    """Within this context a process runs its clouds of a batch of `sum(sizes)`, of which it has `sizes[rank]`.

    What has as many rows as the process has clouds, or a multiple of it, is taken for a part of the batch, in the order
    of the processes; all of them must draw the same random numbers, so their generators must have the same seed.
    """

    def __init__(self, sizes: Sequence[int], rank: int) -> None:
        super().__init__()
        self.own, self.all, self.before = sizes[rank], sum(sizes), sum(sizes[:rank])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            with self:  # checkpoints run forwards again in there
                return run_backward(args[0])
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func in _DROPOUTS and self._is_part(args[0]):
            return args[0] * self._drawn(func, torch.ones_like(args[0]), args[1:], {**kwargs, "inplace": False})
        if func in _IN_PLACE and self._is_part(args[0]):
            return args[0].copy_(self._drawn(func, args[0], args[1:], kwargs))
        if func in _LIKE and self._is_part(args[0]):
            return self._drawn(func, args[0], args[1:], kwargs)
        if func in _SIZED and args:
            return self._sized(func, args, kwargs)
        return func(*args, **kwargs)

    def _is_part(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.ndim > 0 and len(tensor) > 0 and len(tensor) % self.own == 0

    def _drawn(self, func: Callable[..., Any], like: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """This process's rows of what `func` gives for the whole batch."""
        per_cloud = len(like) // self.own
        whole = like.new_empty(per_cloud * self.all, *like.shape[1:])
        if func in _DROPOUTS or func is torch.bernoulli:
            # Of those that read what they are given, a mask of ones or probabilities: each process knows its own.
            whole.fill_(1) if func in _DROPOUTS else _set_rows(whole, like, per_cloud * self.before)
        rows: Tensor = func(whole, *args, **kwargs)
        return rows[per_cloud * self.before : per_cloud * (self.before + self.own)]

    def _sized(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = tuple(args[0]) if isinstance(args[0], (tuple, list, torch.Size)) else tuple(args)
        if not size or size[0] == 0 or size[0] % self.own:
            return func(*args, **kwargs)
        per_cloud = size[0] // self.own
        whole = func((per_cloud * self.all, *size[1:]), **kwargs)
        return whole[per_cloud * self.before : per_cloud * (self.before + self.own)]

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        rows = input.movedim(1, -1).reshape(-1, input.shape[1])
        out = shared_batch_norm(rows, running_mean, running_var, weight, bias, momentum, eps, None)
        shape = input.movedim(1, -1).shape
        return out.reshape(shape).movedim(-1, 1)


def _set_rows(whole: Tensor, own: Tensor, first: int) -> None:
    whole.zero_()
    whole[first : first + len(own)] = own
