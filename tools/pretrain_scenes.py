"""Pre-train the small scene encoder on procedural scenes, by masked cells.

    python -m tools.pretrain_scenes                  # writes tools/scene_encoder.safetensors

What a cell holds is hidden in half of the columns: its features are replaced by one learned row. At every cell the
encoder, un-pooled and concatenated as a probe reads it, is to tell the geometry around it, by one linear layer: heights
above the lowest and below the highest cell within several reaches, the share of its neighbours that lie below it, how
flat, straight and steep its neighbourhoods are, and how dense. C. Wei et al. predict features of what is hidden in
images like that: "Masked Feature Prediction for Self-Supervised Visual Pre-Training", CVPR 2022,
https://arxiv.org/abs/2112.09133. No label and no measured scene goes into it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.ndimage import maximum_filter  # type: ignore[import-untyped]
from scipy.spatial import cKDTree  # type: ignore[import-untyped]
from torch import Tensor, nn
from tqdm import tqdm

from point_peft.profiles import Concatenated, levels_of
from tools.pretrain import set_rate
from tools.scene_encoder import CHANNELS, IN_CHANNELS, WEIGHTS, Cells, Floats, cells_of, encoder, inputs
from tools.scenes import scene

REACHES = (1.2, 2.4, 4.8, 9.6, 24.0)
"""Metres within which the lowest and the highest cell are looked for."""
NEIGHBOURS = (12, 48)
BLOCK = 6
"""Cells along the side of a column that is hidden or not."""
HIDDEN = 0.5


def geometry_around(points: Floats) -> Floats:
    """What is told of every cell (n, t), by the means (n, 3) of all cells, metres."""
    told = []
    for reach in REACHES:
        low, high = _extremes(points, reach)
        told += [np.log1p(points[:, 2] - low), np.log1p(high - points[:, 2])]
    tree = cKDTree(points)
    for k in NEIGHBOURS:
        distance, near = tree.query(points, k=min(k, len(points)))
        around = points[near]
        told.append((around[:, :, 2] < points[:, None, 2]).mean(axis=1))
        told.append(np.log(distance[:, -1] + 0.1))
        centred = around - around.mean(axis=1, keepdims=True)
        values, vectors = np.linalg.eigh(np.einsum("nki,nkj->nij", centred, centred))
        spread = np.sqrt(np.clip(values, 0, None)) / np.sqrt(np.clip(values[:, 2:], 1e-9, None))
        told += [1 - spread[:, 1], spread[:, 1] - spread[:, 0], np.abs(vectors[:, 2, 0])]
    return np.stack(told, axis=1)


def _extremes(points: Floats, reach: float) -> tuple[Floats, Floats]:
    """The lowest and the highest height (n,) in the square columns around that of each point."""
    place = np.floor((points[:, :2] - points[:, :2].min(axis=0)) / reach).astype(np.int64)
    shape = tuple(place.max(axis=0) + 1)
    found = []
    for sign in (-1.0, 1.0):
        most = np.full(shape, -np.inf)
        np.maximum.at(most, (place[:, 0], place[:, 1]), sign * points[:, 2])
        found.append(sign * maximum_filter(most, size=3)[place[:, 0], place[:, 1]])
    return found[0], found[1]


def sample(seed: int) -> tuple[Cells, Floats]:
    """The cells of one scene and what is told of them."""
    cells = cells_of(scene(seed))
    return cells, geometry_around(cells.centroids)


class Pretraining(nn.Module):
    """The encoder and what is thrown away afterwards: the row for hidden cells and the layer that tells."""

    def __init__(self, told: int) -> None:
        super().__init__()
        self.encoder = encoder()
        self.mask = nn.Parameter(torch.zeros(IN_CHANNELS))
        self.unpool = Concatenated()
        self.tell = nn.Linear(sum(CHANNELS), told)

    def forward(self, features: Tensor, grid: Tensor, hidden: Tensor) -> Tensor:
        """(n, t) of features (n, c), cells (n, 3) and which are hidden (n,)."""
        seen = torch.where(hidden[:, None], self.mask, features)
        batch = torch.zeros(len(grid), dtype=torch.int64)
        told: Tensor = self.tell(self.unpool(levels_of(self.encoder(**inputs(seen, grid, batch)))))
        return told


def turned(cells: Cells, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Features and grid, turned by a right angle about z and mirrored by chance: cells stay cells."""
    features, grid = cells.features.clone(), cells.grid.clone()
    for axis in (0, 1):
        if random.random() < 0.5:
            features[:, [axis, 3 + axis]] *= -1
            grid[:, axis] = grid[:, axis].max() - grid[:, axis]
    if random.random() < 0.5:
        features, grid = features[:, [1, 0, 2, 4, 3, 5]], grid[:, [1, 0, 2]]
    return features, grid


def hidden_cells(grid: Tensor, random: np.random.Generator) -> Tensor:
    """Cells (n,) in the columns that chance hides."""
    column = (grid[:, :2] + torch.from_numpy(random.integers(0, BLOCK, 2))) // BLOCK
    number = column[:, 0] * (int(column[:, 1].max()) + 1) + column[:, 1]
    return torch.from_numpy(random.random(int(number.max()) + 1) < HIDDEN)[number]


def main(argv: Sequence[str] | None = None) -> None:
    """Make the scenes, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1500, help="of one scene each")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # spconv's kernels are right on one thread
    start = time.monotonic()
    with multiprocessing.get_context("fork").Pool() as pool:
        seeds = range(args.seed * args.scenes, (args.seed + 1) * args.scenes)
        made = list(tqdm(pool.imap(sample, seeds, chunksize=4), total=args.scenes, desc="scenes", mininterval=5))
    every = np.concatenate([told for _, told in made])
    mean, std = every.mean(axis=0), every.std(axis=0)
    model = Pretraining(every.shape[1]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    random, course = np.random.default_rng(args.seed), []
    bar = tqdm(range(args.steps), desc="pre-training", mininterval=10)
    for step in bar:
        set_rate(optimizer, args.lr, step, args.steps)
        cells, told = made[random.integers(len(made))]
        features, grid = turned(cells, random)
        hidden = hidden_cells(grid, random)
        target = torch.from_numpy((told - mean) / std).float()
        loss = nn.functional.smooth_l1_loss(model(features, grid, hidden), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        course.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(course[-100:]):.4f}", refresh=False)
    halves = {name: value.half() for name, value in model.encoder.state_dict().items()}
    save_file(halves, args.out, metadata={"scenes": str(args.scenes), "steps": str(args.steps), "seed": str(args.seed)})
    print(
        f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {(time.monotonic() - start) / 60:.0f} minutes; loss "
        f"{np.mean(course[:100]):.3f} in the first 100 steps, {np.mean(course[-100:]):.3f} in the last"
    )


if __name__ == "__main__":
    main()
