"""The prompt generator of IDPT: a DGCNN on the patch tokens."""

import torch
from einops import reduce
from torch import Tensor, nn

from point_peft import geometry
from point_peft.parts.batch_norm import BatchNorm

SLOPE = 0.2
"""Of LeakyReLU, as in DGCNN."""


class EdgeConv(nn.Module):
    """max over b in kNN(y_a) of LeakyReLU(BN(W [y_b - y_a ; y_a])), for tokens y (b, g, c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.edge = nn.Linear(2 * channels, channels, bias=False)
        self.norm = BatchNorm(channels)

    def forward(self, tokens: Tensor, k: int, *, recomputing: bool) -> Tensor:
        # W [y_b - y_a ; y_a] = W_1 y_b + (W_2 - W_1) y_a: once for each token, and then gathered.
        of_edge, of_token = self.edge.weight.chunk(2, dim=1)
        neighbours = nn.functional.linear(tokens, of_edge)
        centre = nn.functional.linear(tokens, of_token - of_edge)
        near = geometry.feature_knn(tokens, k)
        edges = geometry.gather(neighbours, near) + centre[:, :, None]
        normed = self.norm.normalise(edges, recomputing=recomputing)
        pooled: Tensor = reduce(nn.functional.leaky_relu(normed, SLOPE), "b g k c -> b g c", "max")
        return pooled


class PromptGenerator(nn.Module):
    """Three edge convolutions, a linear layer on all they give, and the maximum over tokens: (b, g, c) to (b, c)."""

    def __init__(self, channels: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.convolutions = nn.ModuleList(EdgeConv(channels) for _ in range(3))
        self.joined = nn.Linear(3 * channels, channels, bias=False)
        self.norm = BatchNorm(channels)

    def forward(self, tokens: Tensor, *, recomputing: bool) -> Tensor:
        k = min(self.neighbours, tokens.shape[1])
        levels: list[Tensor] = []
        for convolution in self.convolutions:
            levels.append(convolution(levels[-1] if levels else tokens, k, recomputing=recomputing))
        joined = self.norm.normalise(self.joined(torch.cat(levels, dim=2)), recomputing=recomputing)
        prompt: Tensor = reduce(nn.functional.leaky_relu(joined, SLOPE), "b g c -> b c", "max")
        return prompt
