"""Batches whose samples go different ways: taking some samples out of a model's inputs, putting outputs together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from point_peft.errors import AdapterError
from point_peft.running.nested import Args, Kwargs, leaves


@dataclass(frozen=True)
class Batch:
    """The arguments that a model is called with, of `count` samples.

    A tensor among it has a row a sample; or it is packed, and then it has a row a point, and another tells which sample
    each point is of: numbers (n,), or the ends (b,) of samples.
    """

    args: Args
    kwargs: Kwargs
    count: int
    samples: Tensor | None
    """Packed: the sample number (n,) of each point."""

    @staticmethod
    def of(args: Args, kwargs: Kwargs, count: int) -> Batch:
        """Raises `AdapterError` if there are not as many samples."""
        tensors = [tensor for _, tensor in (*leaves(args), *leaves(kwargs)) if tensor.ndim]
        lengths = {len(tensor) for tensor in tensors if tensor.is_floating_point()}
        integers = [t for t in tensors if t.ndim == 1 and not t.is_floating_point() and t.dtype is not torch.bool]
        lengths.discard(count)
        for tensor in integers:
            if _are_ends(tensor, count) and int(tensor[-1]) in lengths:
                ends = tensor.to(torch.int64)
                samples = torch.searchsorted(ends, torch.arange(int(ends[-1]), device=ends.device), right=True)
                return Batch(args, kwargs, count, samples)
        for tensor in integers:
            if len(tensor) in lengths and _are_numbers(tensor, count):
                return Batch(args, kwargs, count, tensor.to(torch.int64))
        if not any(len(tensor) == count for tensor in tensors):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "none"
            raise AdapterError(
                f"adapter_names has {count} entries, one for each sample, and no tensor that the model is called with "
                f"has as many rows or says which of as many samples a point is of; their shapes: {shapes}"
            )
        return Batch(args, kwargs, count, None)

    def part(self, rows: Tensor) -> Batch:
        """The batch of some of the samples, of ascending numbers `rows`."""
        points = self.points_of(rows)

        def taken(tensor: Tensor) -> Tensor:
            if self.samples is not None and points is not None:
                if tensor.ndim == 1 and _are_ends(tensor, self.count) and int(tensor[-1]) == len(self.samples):
                    return self.samples[points].bincount(minlength=self.count)[rows].cumsum(0).to(tensor.dtype)
                if tensor.shape == self.samples.shape and torch.equal(tensor.to(torch.int64), self.samples):
                    return torch.searchsorted(rows, self.samples[points]).to(tensor.dtype)
                if tensor.ndim and len(tensor) == len(self.samples):
                    return tensor[points]
            return tensor[rows] if tensor.ndim and len(tensor) == self.count else tensor

        args, kwargs = _mapped(self.args, taken, "argument"), _mapped(self.kwargs, taken, "argument")
        samples = None if points is None or self.samples is None else torch.searchsorted(rows, self.samples[points])
        return Batch(args, kwargs, len(rows), samples)

    def points_of(self, rows: Tensor) -> Tensor | None:
        """Packed: the points of some samples."""
        return None if self.samples is None else torch.isin(self.samples, rows).nonzero()[:, 0]

    def joined(self, parts: Sequence[tuple[Tensor, Any]]) -> Any:
        """One output of those of parts of the batch, (samples, output): rows where those of their samples were.

        Where they do not fit together, as of heads of different widths, a list: for each sample what the model gives
        for it alone.
        """
        with suppress(_DoNotFitError):
            return self._join(parts)
        outputs: list[Any] = [None] * self.count
        for rows, output in parts:
            samples = rows if self.samples is None else self.samples[self.points_of(rows)]
            for row in rows.tolist():
                outputs[row] = _mapped(output, partial(_of_sample, rows=rows, samples=samples, row=row), "output")
        return outputs

    def _join(self, parts: Sequence[tuple[Tensor, Any]]) -> Any:
        first = parts[0][1]
        if isinstance(first, Tensor):
            return self._join_tensors(parts)
        kinds = {type(output) for _, output in parts}
        if len(kinds) > 1:
            raise _DoNotFitError
        if isinstance(first, Mapping):
            if any(set(output) != set(first) for _, output in parts):
                raise _DoNotFitError
            return _rebuilt(first, {key: self._join([(r, o[key]) for r, o in parts]) for key in first})
        if isinstance(first, (tuple, list)):
            if any(len(output) != len(first) for _, output in parts):
                raise _DoNotFitError
            return _rebuilt(first, [self._join([(r, o[i]) for r, o in parts]) for i in range(len(first))])
        if all(output == first for _, output in parts):
            return first
        raise _DoNotFitError

    def _join_tensors(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        where: list[Tensor] = []
        for rows, output in parts:
            points = self.points_of(rows)
            places = rows if points is None or len(points) != (len(output) if output.ndim else 0) else points
            if output.ndim == 0 or len(output) != len(places):
                raise _DoNotFitError
            where.append(places)
        like = parts[0][1]
        if any(output.shape[1:] != like.shape[1:] or output.dtype != like.dtype for _, output in parts):
            raise _DoNotFitError
        return torch.cat([output for _, output in parts])[torch.cat(where).argsort()]


def _of_sample(tensor: Tensor, *, rows: Tensor, samples: Tensor, row: int) -> Tensor:
    """The share of one sample in an output of several, which has a row a sample or a row a point."""
    for numbers in (samples, rows):
        if tensor.ndim and len(tensor) == len(numbers):
            return tensor[numbers == row]
    return tensor


class _DoNotFitError(Exception):
    """Outputs that cannot be one."""


def _are_ends(tensor: Tensor, count: int) -> bool:
    """Tell whether a tensor of integers (count,) can be the ends of samples, each with a point or more."""
    return len(tensor) == count and bool((tensor.diff() > 0).all()) and bool(tensor[0] > 0)


def _are_numbers(tensor: Tensor, count: int) -> bool:
    """Tell whether integers (n,) can be the sample numbers of points, of samples with a point or more each."""
    if bool((tensor < 0).any()) or int(tensor.max()) != count - 1:
        return False
    return bool((tensor.to(torch.int64).bincount(minlength=count) > 0).all())


def _mapped(value: Any, change: Callable[[Tensor], Tensor], what: str) -> Any:
    """The same nested tuples, lists and dicts with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _rebuilt(value, {key: _mapped(entry, change, what) for key, entry in value.items()})
    if isinstance(value, (tuple, list)):
        return _rebuilt(value, [_mapped(entry, change, what) for entry in value])
    # What it holds under names of its own no `leaves` tell, as of an octree.
    if any(True for held in (value, getattr(value, "__dict__", {})) for _ in leaves(held)):
        raise AdapterError(
            f"an {what} of the model is a {type(value).__name__} that holds tensors, and cannot be divided among "
            "adapters: only tensors, tuples, lists and dicts can; run the adapters one after another"
        )
    return value


def _rebuilt(like: Any, entries: Any) -> Any:
    """A tuple, list or dict of the same kind."""
    return type(like)(*entries) if isinstance(like, tuple) and type(like) is not tuple else type(like)(entries)
