"""Clouds as they are measured, and samples as models take them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Task = Literal["classification", "segmentation"]
Split = Literal["train", "val", "test"]

COORDINATES = ("x", "y", "z")
UNKNOWN = -1
"""The label of a point or a cloud of which none is known; it takes no part in losses and figures."""


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """One cloud as it was measured: nothing is centred, scaled, dropped or resampled yet.

    Names of channels: red, green, blue (0 to 1), nx, ny, nz, intensity, and otherwise those of the file, in lower case.
    """

    coordinates: npt.NDArray[np.float64]
    """(n, 3), in the unit of the file; sensors' may lie far from the origin."""
    channels: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """Name -> (n,)."""
    labels: npt.NDArray[np.int64] | None = None
    """(n,), one for each point, or None."""
    source: str = ""
    """The file, and the place in it, for errors."""

    def part(self, rows: npt.NDArray[np.integer[Any]], source: str) -> "Cloud":
        """The cloud of some of its points, with all that is known of them."""
        return Cloud(
            coordinates=self.coordinates[rows],
            channels={name: values[rows] for name, values in self.channels.items()},
            labels=None if self.labels is None else self.labels[rows],
            source=source,
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sample of a data set: how it is read, and what is known of it without reading it."""

    read: Callable[[], Cloud]
    source: str
    """The file, and the place in it, for errors and predictions."""
    label: int | None = None
    """The number of the class of the whole cloud; None: unknown, or each point has its own."""
    category: int = 0
    """The number of the kind of object whose parts are asked for."""
    group: str = ""
    """The person, the recording, the scene: entries of one group never lie in two splits."""
    split: Split | None = None
    """None where the data do not say."""


class Sample(NamedTuple):
    """One prepared cloud."""

    points: Tensor
    """(n, c) float32; the first three columns are the coordinates."""
    label: Tensor
    """() or (n,) int64."""
    category: Tensor
    """() int64."""


class CloudBatch(NamedTuple):
    """Samples of one size, one on the other; the first two items are what loops for classification expect."""

    points: Tensor
    """(b, n, c)"""
    labels: Tensor
    """(b,) or (b, n)"""
    categories: Tensor
    """(b,)"""
