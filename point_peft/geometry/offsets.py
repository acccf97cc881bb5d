"""Samples of packed points: offsets and sample numbers."""

import torch
from torch import Tensor, nn

from point_peft.errors import PointPeftError


def offset_of(samples: Tensor) -> Tensor:
    """The offset (b,) of points that carry sorted sample numbers (n,); a number that does not occur is an empty sample.

    Empty samples after the last number are not known of, so b is the last number plus one. Raises on numbers that are
    negative or not sorted.
    """
    _check_integers(samples, "samples")
    if len(samples) and bool((samples[1:] < samples[:-1]).any()):
        place = int((samples[1:] < samples[:-1]).nonzero()[0]) + 1
        raise PointPeftError(
            f"sample numbers must be sorted: number {int(samples[place])} follows {int(samples[place - 1])} "
            f"at point {place}"
        )
    if len(samples) and int(samples[0]) < 0:
        raise PointPeftError(f"sample numbers must not be negative, got {int(samples[0])}")
    return torch.bincount(samples).cumsum(0)


def samples_of(offset: Tensor, n: int) -> Tensor:
    """The sample number (n,) of each of the n points that `offset` (b,) divides. Raises if it does not divide n."""
    offset = checked_offset(offset, n, "offset")
    return torch.repeat_interleave(counts_of(offset), output_size=n)


def as_offset(value: Tensor, n: int) -> Tensor:
    """The offset (b,) of n points from either form: an offset, or the sorted sample number of each point (n,).

    A value that ends in n is read as an offset: sample numbers that end in n would leave a sample without points.
    Raises if it is neither.
    """
    _check_integers(value, "offset or sample numbers")
    if len(value) and int(value[-1]) == n:
        return checked_offset(value, n, "offset")
    if len(value) == n:
        return offset_of(value)
    got = f"{len(value)} numbers, the last {int(value[-1])}" if len(value) else "no numbers"
    raise PointPeftError(f"expected an offset that ends in {n} or one sample number for each of {n} points, got {got}")


def gathered(samples: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The order (n,) of points in which each sample is in one piece, and the offset (b,) of the samples then.

    `samples` is an offset, or the sample number of each of the n points, which may be mingled.
    """
    order = torch.arange(n, device=samples.device)
    if len(samples) == n:
        samples, order = samples.sort(stable=True)
    return order, as_offset(samples, n)


def rows_of(offset: Tensor, n: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n points of all samples in rows of at most `size`, each of one sample: a batch for dense functions.

    Returns the numbers of the points (rows, size), where a shorter row repeats its last; which of them are not repeated
    (rows, size); and the sample (rows,). The rows of a sample are of nearly equal length.
    """
    row_offset, bounds = runs_of(checked_offset(offset, n, "offset"), size)
    count = bounds.diff()
    place = torch.arange(int(count.amax() if len(count) else 0), device=offset.device)
    index = bounds[:-1, None] + torch.minimum(place, count[:, None] - 1)
    return index, place < count[:, None], samples_of(row_offset, len(count))


def runs_of(offset: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each sample cut into as few runs of at most `size` as can be, of nearly equal length.

    Returns the offset (b,) of the samples in runs, and the bounds (runs + 1,) of the runs.
    """
    counts = counts_of(offset)
    runs = (counts + size - 1) // size
    run_offset = runs.cumsum(0)
    own = torch.repeat_interleave(runs)
    number = torch.arange(len(own), device=offset.device) - (run_offset - runs)[own]
    begin = (offset - counts)[own] + number * counts[own] // runs[own]
    return run_offset, torch.cat([begin, offset[-1:] if len(offset) else offset.new_zeros(1)])


def counts_of(offset: Tensor) -> Tensor:
    """The number of points (b,) in each sample, of where each ends (b,)."""
    return nn.functional.pad(offset, (1, 0)).diff()


def checked_offset(offset: Tensor, n: int, name: str) -> Tensor:
    """The offset as int64. Raises if it does not divide n points."""
    _check_integers(offset, name)
    offset = offset.long()
    last = int(offset[-1]) if len(offset) else 0
    if last != n:
        raise PointPeftError(f"{name} must end in {n}, the number of points, got {last}")
    if bool((counts_of(offset) < 0).any()):
        place = int((counts_of(offset) < 0).nonzero()[0])
        raise PointPeftError(f"{name} must not decrease, but sample {place} ends at {int(offset[place])}")
    return offset


def _check_integers(value: Tensor, name: str) -> None:
    if value.ndim != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise PointPeftError(f"{name} must be integers of one dimension, got {value.dtype} {tuple(value.shape)}")
