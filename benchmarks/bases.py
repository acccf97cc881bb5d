"""The backbones that are measured: a published class as it is, and the reference encoder of point_peft."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.clock import Learner
from benchmarks.scene_steps import SceneBench
from tests.zoo import supply_pyg_operators
from tools.methods import BASE, QUICK, Bench, Row


def torch_pointcloud_is_there() -> bool:
    """Whether the package of the published class is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch_geometric", "torch_pointcloud"))


def point_mae(**sizes: Any) -> nn.Module:
    """torch-pointcloud's Point-MAE, by default of the size that was published for ScanObjectNN."""
    supply_pyg_operators()
    kind = importlib.import_module("torch_pointcloud.models.point_mae").PointMAEClassification
    model: nn.Module = kind(0, 15, **{"num_groups": 128, **sizes})
    return model


@dataclass(frozen=True, kw_only=True)
class PackedBench(Bench):
    """A backbone whose clouds lie in one row of points, each with the number of its sample."""

    def inputs(self, batch: int) -> tuple[Any, ...]:
        return None, self.clouds(batch).flatten(0, 1), torch.arange(batch).repeat_interleave(self.points)


PUBLISHED = PackedBench(
    name="torch-pointcloud's Point-MAE, unmodified", make=point_mae, points=2048, bank_rows=BASE.bank_rows
)
REFERENCE = replace(BASE, name="point_peft's PointTransformer")
QUICK_REFERENCE = replace(QUICK, make=partial(QUICK.make, depth=2, num_group=8), points=32)
QUICK_PUBLISHED = replace(
    PUBLISHED,
    name="torch-pointcloud's Point-MAE, tiny",
    make=partial(point_mae, embed_dim=48, depth=2, num_heads=4, num_groups=8, group_size=8),
    points=64,
    bank_rows=QUICK.bank_rows,
)


def learner(bench: Bench, row: Row | None, batch: int, device: torch.device) -> Learner:
    """A row's adapter on a fresh backbone, or None for the backbone itself, with a batch to be trained and tried on."""
    model = bench.make() if row is None else bench.adapt(row)
    inputs = tuple(value if value is None else value.to(device) for value in bench.inputs(batch))
    return Learner(model.to(device), inputs, torch.arange(batch, device=device))


def described(benches: Sequence[Bench | SceneBench]) -> str:
    """Names and sizes."""
    sizes = [sum(parameter.numel() for parameter in bench.make().parameters()) / 1e6 for bench in benches]
    return "; ".join(f"{bench.name}, {size:.1f} M parameters" for bench, size in zip(benches, sizes, strict=True))
