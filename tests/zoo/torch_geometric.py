"""A stack of torch_geometric's PointTransformerConv on packed clouds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .inputs import packed_clouds, slice_packed
from .operators import knn_graph
from .registry import CLASSES, WIDTH, linear_head, register


class GraphBlock(nn.Module):
    """A pre-norm block on packed tokens (n, c), whose attention sees the neighbours in a graph."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.conv = conv
        self.norm2 = nn.LayerNorm(WIDTH)
        self.lin1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.lin2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, pos: Tensor, edge_index: Tensor) -> Tensor:
        x = x + self.conv(self.norm1(x), pos, edge_index)
        out: Tensor = x + self.lin2(torch.relu(self.lin1(self.norm2(x))))
        return out


class GraphTransformer(nn.Module):
    """Classifies packed clouds: features (n, 3) or None, positions (n, 3), sample numbers (n)."""

    def __init__(self, convs: list[nn.Module]) -> None:
        super().__init__()
        self.lin_in = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(GraphBlock(conv) for conv in convs)
        self.norm = nn.LayerNorm(WIDTH)
        self.lin_out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor | None, pos: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.nn import global_max_pool

        edge_index = knn_graph(pos, 8, batch)
        x = self.lin_in(pos if x is None else x)
        for layer in self.layers:
            x = layer(x, pos, edge_index)
        logits: Tensor = self.lin_out(global_max_pool(self.norm(x), batch))
        return logits


@register(
    needs=("torch_geometric",),
    inputs=packed_clouds,
    slice=slice_packed,
    heads=("lin_out",),
    other_head=linear_head(WIDTH),
    kind="packed",
)
def pyg_point_transformer() -> nn.Module:
    """Every point is a token; the coordinates are an argument of the blocks; softmax over the edges of a graph."""
    from torch_geometric.nn import PointTransformerConv

    def mlp(*widths: int) -> nn.Module:
        first, hidden, last = widths
        return nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last))

    return GraphTransformer(
        [PointTransformerConv(WIDTH, WIDTH, mlp(3, 16, WIDTH), mlp(WIDTH, 16, WIDTH)) for _ in range(2)]
    )
