"""Calls of the frozen modules ahead of the blocks, to be used again in the same forward or batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StemCall:
    """A call of a module of the stem: its arguments and its output."""

    args: tuple[Any, ...]
    output: Any
    versions: tuple[int, ...]
    """The number of changes in place of each tensor of the output by then."""
    points: Mapping[int, Tensor]
    """Stage -> the clouds (b, n, 3) that were seen at modules within it, which do not run where this answers."""

    @staticmethod
    def of(args: tuple[Any, ...], output: Any, points: Mapping[int, Tensor]) -> StemCall:
        """Remember a call that has just ended."""
        return StemCall(args, output, versions(output), points)

    @property
    def intact(self) -> bool:
        """True if the output is as it was given."""
        return versions(self.output) == self.versions

    def answers(self, args: tuple[Any, ...]) -> bool:
        """True if a call with these arguments, all of them tensors, would give the same."""
        if len(args) != len(self.args) or not self.intact or not all(isinstance(value, Tensor) for value in args):
            return False
        pairs = zip(args, self.args, strict=True)
        if torch.compiler.is_compiling():  # which knows the tensors and not their values
            return all(a is b for a, b in pairs)
        return all(a is b or (isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)

    def of_samples(self, rows: Tensor, batch: int) -> StemCall | None:
        """The same of some samples of the batch; None where not all tensors have a row a sample."""
        outputs = self.output if isinstance(self.output, tuple) else (self.output,)
        values = (*self.args, *outputs, *self.points.values())
        fitting = all(isinstance(v, Tensor) and v.ndim and len(v) == batch for v in values)
        if not fitting or not self.intact:
            return None
        taken = tuple(value[rows] for value in outputs)
        args = tuple(value[rows] for value in self.args)
        points = {stage: value[rows] for stage, value in self.points.items()}
        return StemCall.of(args, taken if isinstance(self.output, tuple) else taken[0], points)


Calls = Mapping[str, Sequence[StemCall]]
"""Module of the stem -> its calls in order."""


class Stem:
    """The stem of one forward: filled while its modules run, emptied at the forward's end."""

    def __init__(self) -> None:
        self.calls: dict[str, list[StemCall]] = {}
        """The calls that were computed, here or in the second pass or in a forward of the same batch."""
        self.known: Calls = {}
        """The same of the forward around this one or of those before it, whose answers need not be computed again."""
        self.computed = False
        """True once a module has run here because no answer was known: the groups are not those of the known calls."""
        self.answering: dict[str, StemCall] = {}
        """In compiled code: the answer of a call that has begun."""

    def answer(self, path: str, args: tuple[Any, ...]) -> StemCall | None:
        """The known call of a module that answers one with these arguments."""
        return next((call for call in self.known.get(path, ()) if call.answers(args)), None)

    def keep(self, path: str, args: tuple[Any, ...], output: Any, points: Mapping[int, Tensor]) -> StemCall | None:
        """Remember a call that has just ended; None if it was answered by what was known."""
        if any(call.output is output for call in self.known.get(path, ())):
            return None
        self.computed = True
        call = StemCall.of(args, output, points)
        self.calls.setdefault(path, []).append(call)
        return call

    def of_samples(self, rows: Tensor | None, batch: int) -> Calls:
        """The calls for some samples of the batch, None for all."""
        if rows is None:
            return {path: tuple(calls) for path, calls in self.calls.items()}
        taken = {path: [call.of_samples(rows, batch) for call in calls] for path, calls in self.calls.items()}
        return {path: [call for call in calls if call is not None] for path, calls in taken.items()}

    def forget(self) -> None:
        """Let go of it all, at the end of the forward. Others of its batch may go on with the calls."""
        self.calls, self.known = {}, {}


def versions(value: Any) -> tuple[int, ...]:
    """The number of changes in place of each tensor, alone or in a tuple or list; none in compiled code."""
    if torch.compiler.is_compiling():
        return ()
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(tensor._version for tensor in tensors if isinstance(tensor, Tensor) and not tensor.is_inference())
