"""A scene of a million points through an adapted encoder on a CPU: torch-pointcloud's sliding window cuts and stitches.

    python -m benchmarks.long_scene

It prints the time of inference and the most memory that the process held. The window is that of the training, columns
of 30 m with a quarter of overlap; the adapter works within each, so memory does not grow with the scene but for what
each of its points needs.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.scenes import of_points
from point_peft import METHODS, profiles
from tools.scene_encoder import cells_of, load
from tools.scenes import SIDE, scene

CLASSES = 2
WINDOW, OVERLAP = 30.0, 0.25


def points_of(count: int) -> Tensor:
    """At least so many points (n, 3): procedural scenes beside each other, cut to `count`."""
    found: list[np.ndarray[Any, Any]] = []
    total, side = 0, int(np.ceil((count / 4000) ** 0.5))
    while total < count:
        row, column = divmod(len(found), side)
        found.append(scene(len(found)) + np.array([row * SIDE, column * SIDE, 0]))
        total += len(found[-1])
    return torch.from_numpy(np.concatenate(found)[:count])


def main(argv: Sequence[str] | None = None) -> None:
    """Make the scene and the model, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--method", default="POINT_PEFT", choices=[name for name in METHODS if name != "LINEAR_PROBE"])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # spconv's kernels are right on one thread
    points = points_of(args.points)
    example = cells_of(points[:4000].numpy()).inputs()
    plain = profiles.per_point(load(), CLASSES, example_inputs=example)
    model = profiles.adapter(plain, METHODS[args.method](), example_inputs=example).eval()
    inferer: Any = importlib.import_module("torch_pointcloud.inferers").SlidingWindowInferer(
        block_size=WINDOW, overlap=OVERLAP, dims=(0, 1), softmax=True
    )

    def predict(window: dict[str, Any]) -> Tensor:
        cells = cells_of(window["pos"].numpy())
        return of_points(model, cells.features, cells.grid, cells)

    start = time.process_time()
    with torch.no_grad():
        shares = inferer({"pos": points, "batch": torch.zeros(len(points), dtype=torch.int64)}, predict)
    assert shares.shape == (len(points), CLASSES)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(points):,} points, {args.method}: {time.process_time() - start:.0f} s of one thread, "
        f"at most {held:.1f} GB held"
    )


if __name__ == "__main__":
    main()
