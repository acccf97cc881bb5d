"""The local attention of the geometry-aware adapters of a stage, and where their prompts lie.

m_j = max_i (U_i + LA(LN(N_j))_i),    i, i' in N_j
LA_i = W sum_i' a_ii' v_i' + b,       a_ii' = softmax_i' (scale q_i . k_i'),    [q; k; v]_i = LN(U_i) transformed
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.geometry import rows_of_all
from point_peft.parts.base import SharedState
from point_peft.parts.recomputing import recomputed

# Numbers in the largest tensor that is worked on at a time: on a CPU about as many as its caches hold, 6 MB.
CHUNK_ELEMENTS = 3 * 2**19
CHUNK_ELEMENTS_OF_OTHERS = 2**25


class LocalAttention(nn.Module):
    """Attention among the k tokens of each neighbourhood, with a narrow inner width."""

    def __init__(self, channels: int, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = width**-0.5  # as published: of the inner width, not of a head's
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * width, bias=False)
        self.proj = nn.Linear(width, channels)
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, U: Tensor, neighbour: Tensor, keep: Tensor) -> Tensor:
        """The m_j (b, s, c) of tokens U (b, n, c), whose numbers in N_j are `neighbour` (b, s, k).

        `keep` (b, s) is what LA is multiplied by. Norm, query, key and value are taken once per token, not once per
        neighbour.
        """
        b, k, keep = U.shape[0], neighbour.shape[2], rearrange(keep, "b s -> (b s) 1")
        rows = rows_of_all(neighbour, U.shape[1]).flatten()
        qkv = rearrange(self.qkv(self.norm(U)), "b n c -> (b n) c").index_select(0, rows)
        # As 3 by 16, not as 16 by 3: batches of such matrices are multiplied three times as fast on a CPU.
        q, key, v = rearrange(qkv, "(m k) (qkv h c) -> qkv (h m) c k", qkv=3, h=self.heads, k=k).unbind(0)
        a = torch.bmm(key.mT, self.scale * q).softmax(dim=1)
        mixed = rearrange(torch.bmm(v, a), "(h m) c k -> m k (h c)", h=self.heads) * keep[:, :, None]
        N = rearrange(U, "b n c -> (b n) c").index_select(0, rows)
        # The bias is the same for all neighbours, so it need not pass through their maximum.
        m = maximum(rearrange(N, "(m k) c -> m k c", k=k) + mixed @ self.proj.weight.T) + keep * self.proj.bias
        return rearrange(m, "(b s) c -> b s c", b=b)

    def pooled(self, U: Tensor, neighbour: Tensor) -> Tensor:
        """The m_j (b, s, c), some of them at a time; of what is made for each neighbour nothing is kept.

        Samples are taken apart, and neighbourhoods within a sample where it has too many of them.
        """
        (b, s, k), (_, n, c) = neighbour.shape, U.shape
        keep = self._keep(U, b, s)
        if torch.compiler.is_compiling():
            whole: Tensor = self(U, neighbour, keep)
            return whole
        limit = CHUNK_ELEMENTS if U.is_cpu else CHUNK_ELEMENTS_OF_OTHERS
        # Each part takes the norm of all tokens of its samples, so it has at least as many neighbours as these.
        few, some = max(1, limit // max(1, s * k * c)), max(1, limit // max(1, k * c), n // max(1, k))
        m = []
        for tokens, near, kept in zip(*(torch.split(x, few) for x in (U, neighbour, keep)), strict=True):
            pieces = zip(torch.split(near, some, dim=1), torch.split(kept, some, dim=1), strict=True)
            m.append(torch.cat([recomputed(self, tokens, *piece) for piece in pieces], dim=1))
        return torch.cat(m)

    def _keep(self, like: Tensor, b: int, s: int) -> Tensor:
        """Factors (b, s): ones, but while training, stochastic depth drops LA for whole neighbourhoods."""
        if not self.training or self.drop_path == 0.0:
            return like.new_ones(b, s)
        keep = 1.0 - self.drop_path
        return like.new_empty(b, s).bernoulli_(keep) / keep


def maximum(x: Tensor) -> Tensor:
    """The maximum (m, c) over k of (m, k, c); of equal ones a single one has the gradient, as published."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x.amax(dim=1)
    # As an image of k by 1 pixels, pooled to one: where the maximum is, in a tenth of the time of x.max(dim=1).
    image = rearrange(x.detach(), "m k c -> m c k 1")
    _, where = nn.functional.max_pool2d(image, (x.shape[1], 1), return_indices=True)
    return x.gather(1, rearrange(where, "m c 1 1 -> m 1 c")).squeeze(1)


class StageGeometry(SharedState):
    """State that the blocks of one stage share: the local attention, and the coordinates Q of their prompts."""

    def __init__(self, prefix: str, local_attention: LocalAttention, prompts: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.local_attention = local_attention
        self.prompt_coordinates = nn.Parameter(torch.empty(prompts, 3)) if prompts else None
        if self.prompt_coordinates is not None:
            nn.init.trunc_normal_(self.prompt_coordinates, std=0.02)
