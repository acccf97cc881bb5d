"""A scene of 100,000 points on a packed encoder like PTv3: every registered method that adapts it."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.clock import Learner
from point_peft import METHODS, AnatomyError, get_peft_model
from tests.zoo import CLASSES, pointcept
from tools.methods import Row

CELLS = 512
"""Cells along a side of the grid: of 2 cm, 10 m."""


@dataclass(frozen=True, kw_only=True)
class SceneBench:
    """An encoder and decoder with the layout of Pointcept's PTv3, and a scene for it."""

    points: int = 100_000
    narrow: int = 48
    """Channels of the first stage; Sonata's."""
    wide: int = 96
    """Channels of the second stage."""
    patch: int = 64
    """Tokens that attend to each other."""

    @property
    def name(self) -> str:
        """Its description, for the page."""
        stages = f"{self.narrow} and {self.wide} channels, patches of {self.patch} tokens"
        return f"for a scene of {self.points:,} points an encoder and decoder like PTv3, {stages}"

    def make(self) -> nn.Module:
        """The plain model."""
        return pointcept.PointTransformerV3(self.narrow, self.wide)

    def scene(self) -> dict[str, Tensor]:
        """Points on the floor and two walls of a room of 8 by 6 by 3 m, the same every time."""
        generator = torch.Generator().manual_seed(0)
        coordinates = torch.rand(self.points, 3, generator=generator) * torch.tensor([8.0, 6.0, 3.0])
        side = torch.randint(3, (self.points,), generator=generator)
        coordinates[torch.arange(self.points), side] = 0.0
        return {
            "coord": coordinates,
            "grid_coord": (coordinates / 0.02).long(),
            "feat": torch.randn(self.points, 6, generator=generator),
            "batch": torch.zeros(self.points, dtype=torch.int64),
            "offset": torch.tensor([self.points]),
        }

    def learner(self, row: Row | None, device: torch.device) -> Learner:
        """A row's adapter on a fresh model, or None for all of the model, with the scene. Raises `AnatomyError`."""
        torch.manual_seed(0)
        model = self.make() if row is None else get_peft_model(self.make(), row.config)
        scene = {name: value.to(device) for name, value in self.scene().items()}
        return Learner(model.to(device), (scene,), torch.arange(self.points, device=device) % CLASSES)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within it the model has this bench's grid and patches, which are constants of its file."""
        with mock.patch.multiple(pointcept, GRID=CELLS, PATCH=self.patch):
            yield

    def rows(self, methods: Set[str]) -> list[Row]:
        """One row for each of these methods that adapts the model."""
        every = [Row(method=name) for name in sorted(METHODS) if name in methods]
        return [row for row in every if self._adapts(row)]

    def _adapts(self, row: Row) -> bool:
        try:
            get_peft_model(self.make(), row.config)
        except AnatomyError:
            return False
        return True


SCENE = SceneBench()
QUICK_SCENE = SceneBench(points=300, narrow=16, wide=24, patch=16)
