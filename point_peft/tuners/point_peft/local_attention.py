"""The local attention of the geometry-aware adapters of a stage, and where their prompts lie.

m_j = max_i (U_i + LA(LN(N_j))_i),    i, i' in N_j
LA_i = W sum_i' a_ii' v_i' + b,       a_ii' = softmax_i' (scale q_i . k_i'),    [q; k; v]_i = LN(U_i) transformed
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from point_peft.geometry import rows_of_all
from point_peft.parts.base import SharedState
from point_peft.parts.recomputing import recomputed

# Attention weights (h, m, k, k) made at a time, and numbers (m, k, c) whose maximum is taken at a time, which then lie
# in a core's cache (1 MB); on other devices than a CPU both are the last.
CHUNK_ELEMENTS = 3 * 2**19
PART_ELEMENTS = 2**18
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

    def forward(self, U: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
        """Values that each neighbour i takes up, sum_i' a_ii' v_i', (m k, w), of tokens U (b, n, c).

        `rows` (m, k) are the neighbours' numbers among all tokens, `keep` (m,) is what LA is multiplied by. Norm,
        query, key and value are taken once per token, not once per neighbour.
        """
        qkv = rearrange(self.qkv(self.norm(U)), "b n c -> (b n) c").index_select(0, rows.flatten())
        # As 3 by 16, not as 16 by 3: batches of such matrices are multiplied three times as fast on a CPU.
        q, key, v = rearrange(qkv, "(m k) (qkv h c) -> qkv (h m) c k", qkv=3, h=self.heads, k=rows.shape[1]).unbind(0)
        a = torch.bmm(key.mT, self.scale * q).softmax(dim=1)
        taken = rearrange(torch.bmm(v, a), "(h m) c k -> m k (h c)", h=self.heads) * keep[:, None, None]
        return rearrange(taken, "m k c -> (m k) c")

    def pooled(self, U: Tensor, neighbour: Tensor) -> Tensor:
        """The m_j (b, s, c) of tokens U (b, n, c), whose numbers in N_j are `neighbour` (b, s, k); some s at a time."""
        (b, s, k), n = neighbour.shape, U.shape[1]
        keep = self._keep(U, b, s)
        if torch.compiler.is_compiling():
            return self._pooled(U, neighbour, keep)
        limit = CHUNK_ELEMENTS if U.is_cpu else CHUNK_ELEMENTS_OF_OTHERS
        # Each part takes the norm of all tokens, so it has at least as many neighbours as these.
        some = max(1, limit // max(1, b * self.heads * k * k), n // max(1, k))
        parts = zip(torch.split(neighbour, some, dim=1), torch.split(keep, some, dim=1), strict=True)
        return torch.cat([self._pooled(U, *part) for part in parts], dim=1)

    def _pooled(self, U: Tensor, neighbour: Tensor, keep: Tensor) -> Tensor:
        rows = rearrange(rows_of_all(neighbour, U.shape[1]), "b s k -> (b s) k")
        keep = rearrange(keep, "b s -> (b s)")
        taken = recomputed(self, U, rows, keep)
        # The bias is the same for all neighbours, so it need not pass through their maximum.
        m = largest(rearrange(U, "b n c -> (b n) c"), taken, self.proj.weight, rows) + keep[:, None] * self.proj.bias
        return rearrange(m, "(b s) c -> b s c", b=U.shape[0])

    def _keep(self, like: Tensor, b: int, s: int) -> Tensor:
        """Factors (b, s): ones, but while training, stochastic depth drops LA for whole neighbourhoods."""
        if not self.training or self.drop_path == 0.0:
            return like.new_ones(b, s)
        keep = 1.0 - self.drop_path
        return like.new_empty(b, s).bernoulli_(keep) / keep


def largest(U: Tensor, taken: Tensor, W: Tensor, rows: Tensor) -> Tensor:
    """max_i (U_i + W taken_i), (m, c), over neighbourhoods `rows` (m, k) of tokens U (n, c); `taken` is (m k, w)."""
    taken, W = taken.to(U.dtype), W.to(U.dtype)
    if torch.compiler.is_compiling():
        N = U.index_select(0, rows.flatten()) + taken @ W.mT
        return rearrange(N, "(m k) c -> m k c", k=rows.shape[1]).amax(dim=1)
    m: Tensor = _Largest.apply(U, taken, W, rows, torch.is_grad_enabled())[0]  # type: ignore[no-untyped-call]
    return m


class _Largest(torch.autograd.Function):
    """`largest` in parts that fit into a core's cache; of each maximum the number of its neighbour is kept, in a byte.

    Of equal neighbours the last one gets the gradient. In plain torch, checkpointed, a training step of a published
    Point-MAE takes 1.10 [1.02, 1.10] times as long (9 interleaved rounds, two cores): see docs/speed.md.
    """

    @staticmethod
    def forward(U: Tensor, taken: Tensor, W: Tensor, rows: Tensor, numbered: bool) -> tuple[Tensor, Tensor]:
        (count, k), c = rows.shape, U.shape[1]
        m, number = U.new_empty(count, c), rows.new_empty(count, c, dtype=torch.uint8 if k <= 256 else torch.int64)
        numbers = torch.arange(k, dtype=torch.float32, device=U.device)[:, None]
        room = _room(U, k)
        for first in range(0, count, len(room)):
            part = slice(first, first + len(room))
            near = rows[part].flatten()
            N = torch.index_select(U, 0, near, out=room.flatten(0, 1)[: len(near)])
            N = N.addmm_(taken[first * k :][: len(near)], W.mT).view(-1, k, c)
            torch.amax(N, 1, out=m[part])
            if numbered:
                number[part] = N.eq_(m[part, None]).float().mul_(numbers).amax(dim=1)
        return m, number

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        U, taken, W, rows, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(taken, W, rows, output[1])
        ctx.tokens = U.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_m: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        taken, W, rows, number = ctx.saved_tensors
        (count, k), c = rows.shape, W.shape[0]
        to_U = to_m.new_zeros(ctx.tokens, c).scatter_add_(0, rows.gather(1, number.long()), to_m)
        to_taken, to_W = torch.empty_like(taken), torch.zeros_like(W.mT)
        room = _room(to_m, k)
        for first in range(0, count, len(room)):
            part, each = slice(first, first + len(room)), slice(first * k, (first + len(room)) * k)
            to_N = room[: len(to_m[part])].zero_().scatter_(1, number[part, None].long(), to_m[part, None])
            torch.mm(to_N.flatten(0, 1), W, out=to_taken[each])
            to_W.addmm_(taken[each].mT, to_N.flatten(0, 1))
        return to_U, to_taken, to_W.mT, None, None


def _room(like: Tensor, k: int) -> Tensor:
    """Memory (m, k, c) that the parts use in turn, for fresh memory is slow: k tokens of as many neighbourhoods."""
    c = like.shape[1]
    return like.new_empty(max(1, (PART_ELEMENTS if like.is_cpu else CHUNK_ELEMENTS_OF_OTHERS) // max(1, k * c)), k, c)


class StageGeometry(SharedState):
    """State that the blocks of one stage share: the local attention, and the coordinates Q of their prompts."""

    token_parameters = frozenset({"prompt_coordinates"})

    def __init__(self, prefix: str, local_attention: LocalAttention, prompts: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.local_attention = local_attention
        self.prompt_coordinates = nn.Parameter(torch.empty(prompts, 3)) if prompts else None
        if self.prompt_coordinates is not None:
            nn.init.trunc_normal_(self.prompt_coordinates, std=0.02)
