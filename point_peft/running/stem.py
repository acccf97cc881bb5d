"""What the frozen modules ahead of the blocks have computed, to be used again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StemCall:
    """What a module of the stem got and gave."""

    args: tuple[Any, ...]
    output: Any
    versions: tuple[int, ...]
    """How often each tensor of the output had been changed in place by then."""

    @staticmethod
    def of(args: tuple[Any, ...], output: Any) -> StemCall:
        """What is to be remembered of a call that has just ended."""
        return StemCall(args, output, _versions(output))

    @property
    def intact(self) -> bool:
        """Whether the output is as it was given."""
        return _versions(self.output) == self.versions

    def answers(self, args: tuple[Any, ...]) -> bool:
        """Whether a call with these arguments, all of them tensors, would give the same."""
        if len(args) != len(self.args) or not self.intact or not all(isinstance(value, Tensor) for value in args):
            return False
        pairs = zip(args, self.args, strict=True)
        if torch.compiler.is_compiling():  # which knows the tensors and not their values
            return all(a is b for a, b in pairs)
        return all(a is b or (isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)

    def of_samples(self, rows: Tensor, batch: int) -> StemCall | None:
        """The same of some samples of the batch; None where not all tensors have a row a sample."""
        outputs = self.output if isinstance(self.output, tuple) else (self.output,)
        fitting = all(isinstance(v, Tensor) and v.ndim and len(v) == batch for v in (*self.args, *outputs))
        if not fitting or not self.intact:
            return None
        taken = tuple(value[rows] for value in outputs)
        args = tuple(value[rows] for value in self.args)
        return StemCall.of(args, taken if isinstance(self.output, tuple) else taken[0])


def _versions(output: Any) -> tuple[int, ...]:
    if torch.compiler.is_compiling():
        return ()
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return tuple(value._version for value in outputs if isinstance(value, Tensor) and not value.is_inference())
