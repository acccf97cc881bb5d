"""From a cloud as it was measured to the points that a model takes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import Cloud


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A stated way from measured clouds to points (n, c) float32, in this order of steps. Travels in a run's folder."""

    num_points: int | None = 1024
    """Points a cloud: of more, so many are drawn without replacement; fewer are filled up with copies. None: all."""
    centre: str = "mean"
    """"mean", "median", "ground" (mean of x and y, least z) or "none"."""
    scale: str | float = "sphere"
    """"sphere": the farthest point lies at 1; "none"; or the length, in the unit of the file, that becomes 1."""
    reach: float | None = None
    """Points farther than this from the centre, in the unit of the file, are dropped."""
    channels: tuple[str, ...] = ("x", "y", "z")
    """The columns of a sample, the coordinates first."""
    most_bad: float = 0.1
    """The share of rows with NaN or infinity up to which these are dropped with a warning; more is an error."""


def prepare(
    cloud: Cloud, preparation: Preparation, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]:
    """Points (n, c) and, where the cloud has labels of points, labels (n,) of the same points."""
    raise NotImplementedError
