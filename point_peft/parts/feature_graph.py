"""Graphs of tokens in the space of their features: edge convolutions, as in DGCNN."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import reduce
from torch import Tensor, nn

from point_peft import geometry
from point_peft.parts.batch_norm import batch_norm

SLOPE = 0.2
"""Of LeakyReLU, as in DGCNN."""


class EdgeConv(nn.Module):
    """max over b in kNN(y_a) of LeakyReLU(BN(W [y_b - y_a ; y_a])), for tokens y (b, g, c)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.edge = nn.Linear(2 * inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, tokens: Tensor, k: int, *, recomputing: bool) -> Tensor:
        # W [y_b - y_a ; y_a] = W_1 y_b + (W_2 - W_1) y_a: once for each token, and then gathered.
        of_edge, of_token = self.edge.weight.chunk(2, dim=1)
        neighbours = nn.functional.linear(tokens, of_edge)
        centre = nn.functional.linear(tokens, of_token - of_edge)
        near = geometry.feature_knn(tokens, k)
        edges = geometry.gather(neighbours, near) + centre[:, :, None]
        normed = batch_norm(self.norm, edges, recomputing=recomputing)
        pooled: Tensor = reduce(nn.functional.leaky_relu(normed, SLOPE), "b g k c -> b g c", "max")
        return pooled


class EdgeNetwork(nn.Module):
    """Edge convolutions of some widths, one after another, and a layer on all that they give: (b, g, c) to (b, g, e).

    Each has a graph of its own, of the `neighbours` nearest of the tokens that it gets, at most of all.
    """

    def __init__(self, channels: int, widths: Sequence[int], outputs: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.convolutions = nn.ModuleList(EdgeConv(*pair) for pair in pairwise((channels, *widths)))
        self.joined = nn.Linear(sum(widths), outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, tokens: Tensor, *, recomputing: bool) -> Tensor:
        k = min(self.neighbours, tokens.shape[1])
        levels: list[Tensor] = []
        for convolution in self.convolutions:
            levels.append(convolution(levels[-1] if levels else tokens, k, recomputing=recomputing))
        joined = batch_norm(self.norm, self.joined(torch.cat(levels, dim=2)), recomputing=recomputing)
        return nn.functional.leaky_relu(joined, SLOPE)
