"""The encoder of neighbourhoods, a small PointNet: it tells the first adapted block which points lie around a token.

t_i <- t_i + W3 GELU(LN(max_j W2 GELU(LN(W1 [(p_j - c_i) / r_i; c_i; r_i])))),    r_i = max_j |p_j - c_i|

p_j are every d-th of the d k points nearest to the centre c_i of token i (dilated neighbours). The patch embedding is
frozen, and made for the points of the pre-training; what it has lost of others, the blocks behind it cannot find again.
W3 starts at zero.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from point_peft import geometry
from point_peft.errors import AdapterError
from point_peft.parts.base import Call
from point_peft.parts.recomputing import recomputed


class NeighbourhoodEncoder(nn.Module):
    """A term (b, g, c) added to the tokens of one block; `width` are the channels inside, at last twice as many."""

    def __init__(self, channels: int, width: int, points: int, dilation: int, stage: int) -> None:
        super().__init__()
        self.points = points
        self.dilation = dilation
        self.stage = stage
        """The number of the stage where the clouds are seen."""
        self.embed = nn.Linear(7, width)
        self.norm = nn.LayerNorm(width)
        self.features = nn.Linear(width, 2 * width)
        self.pooled_norm = nn.LayerNorm(2 * width)
        self.proj = nn.Linear(2 * width, channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def of(self, call: Call, centres: Tensor) -> Tensor:
        """The tokens (b, g, c) of the neighbourhoods of centres (b, g, 3) in the clouds of this forward."""
        clouds = call.forward.seen.points.get(self.stage)
        if clouds is None:
            raise AdapterError(
                f"block '{call.path}' gets what lies around its tokens, and in this forward no cloud was seen: call "
                "the model, or set neighbourhood_width=0"
            )

        dtype = self.embed.weight.dtype

        def local() -> Tensor:
            with torch.no_grad():
                points, queries = clouds[..., :3].to(dtype), centres.to(dtype)
                # A cloud with fewer points has less dilated neighbourhoods.
                dilation = max(1, min(self.dilation, points.shape[1] // self.points))
                nearest = geometry.knn(queries, points, min(self.points * dilation, points.shape[1]))
                near = geometry.gather(points, nearest[..., ::dilation])
                offset = near - queries[:, :, None]
                reach = reduce(offset.norm(dim=3), "b g k -> b g 1 1", "max")
                # All points may coincide, as in a cloud that repeats one.
                scaled = offset / reach.clamp_min(torch.finfo(offset.dtype).tiny)
                around = torch.cat([rearrange(queries, "b g c -> b g 1 c"), reach], dim=3)
                return torch.cat([scaled, around.expand(-1, -1, scaled.shape[2], -1)], dim=3)

        x = call.forward.once(("neighbourhood points", call.path, self.points, self.dilation, dtype), local)
        tokens: Tensor = recomputed(self, x)
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b, g, c) of points (b, g, k, 7)."""
        gelu = nn.functional.gelu
        pooled = reduce(self.features(gelu(self.norm(self.embed(x)))), "b g k c -> b g c", "max")
        tokens: Tensor = self.proj(gelu(self.pooled_norm(pooled)))
        return tokens
