"""The side network of STAG: what it reads of the backbone's tokens, its graph convolution, what it gives back."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.parts.base import SharedState
from point_peft.running.forward import Forward


class SideNetwork(SharedState):
    """The down-projections and graph modules that the blocks of one stage share, by the number of their first block."""

    def __init__(
        self, prefix: str, channels: int, width: int, down: Iterable[str], graph: Iterable[str], *, gated: bool
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.down = nn.ModuleDict({name: nn.Linear(channels, width) for name in down})
        self.graph = nn.ModuleDict({name: GraphModule(channels, width, gated=gated) for name in graph})


class GraphModule(nn.Module):
    """One step of the side tokens among their neighbours, and what they displace the backbone's tokens by."""

    def __init__(self, channels: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.own = nn.Linear(width, width)
        self.neighbour = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.up = nn.Linear(width, channels)
        self.gate = nn.Parameter(torch.zeros(())) if gated else None

    def forward(self, side: Tensor, neighbour: Tensor) -> tuple[Tensor, Tensor]:
        """Side tokens (b, g, w) after the step, and displacements (b, g, c); `neighbour` (b, g, k) are indices."""
        # Unlike amax, max keeps only the indices for the backward pass.
        near = geometry.gather(self.neighbour(side), neighbour).max(dim=2).values
        side = self.mix(self.own(side) + near)
        displaced = nn.functional.relu(self.up(side))
        return side, displaced if self.gate is None else self.gate * displaced


def neighbours(forward: Forward, stage: int, k: int) -> Tensor:
    """Indices (b, g, k) of the patch tokens nearest to each, or packed (1, n, k); once per forward."""
    points = forward.seen.coordinates[stage]
    if stage in forward.seen.samples:
        return forward.once(("stag", stage, k), lambda: _packed(points, forward.seen.samples[stage], k))
    return forward.once(("stag", stage, k), lambda: geometry.knn(points, points, min(k, points.shape[1])))


def _packed(points: Tensor, samples: Tensor, k: int) -> Tensor:
    order, ends = geometry.gathered(samples, len(points))
    points = points.detach()[order]
    nearest = order[geometry.ragged_knn(points, ends, points, ends, k)]
    return nearest[order.argsort()][None]
