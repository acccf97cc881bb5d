"""The layer of a selective state-space model, for models whose package of it needs CUDA.

A. Gu, T. Dao: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, https://arxiv.org/abs/2312.00752.
Parameters have the names and the shapes of the package, and two of its linear layers are not called, as there: their
weights are read.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn


class Mamba(nn.Module):
    """h_t = exp(d_t A) h_(t-1) + d_t B_t u_t,   y_t = C_t h_t + D u_t,   with d_t, B_t, C_t made of the token u_t."""

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, use_fast_path: bool) -> None:
        super().__init__()
        inner, self.d_state, self.rank = expand * d_model, d_state, -(-d_model // 16)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, padding=d_conv - 1, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(repeat(torch.arange(1.0, d_state + 1), "n -> c n", c=inner).log())
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l, c), each of what came before it."""
        u, gate = rearrange(tokens @ self.in_proj.weight.T, "b l (two c) -> two b c l", two=2)
        u = nn.functional.silu(self.conv1d(u)[..., : tokens.shape[1]])
        made = self.x_proj(rearrange(u, "b c l -> b l c"))
        low, B, C = made.split([self.rank, self.d_state, self.d_state], dim=2)
        step = nn.functional.softplus(low @ self.dt_proj.weight.T + self.dt_proj.bias)
        decay = torch.exp(step[..., None] * -self.A_log.exp())
        h = torch.zeros_like(decay[:, 0])
        out = []
        for t in range(tokens.shape[1]):
            h = decay[:, t] * h + torch.einsum("bc,bn,bc->bcn", step[:, t], B[:, t], u[..., t])
            out.append(torch.einsum("bcn,bn->bc", h, C[:, t]) + self.D * u[..., t])
        y: Tensor = self.out_proj(torch.stack(out, dim=1) * nn.functional.silu(rearrange(gate, "b c l -> b l c")))
        return y
