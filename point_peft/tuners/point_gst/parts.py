"""The spectral adapter of PointGST, and the part that adds what it makes of a block's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.anatomy.description import Stage
from point_peft.parts.base import Call
from point_peft.parts.sequence import SequencePart, noted_stream
from point_peft.running.nested import Args, Kwargs
from point_peft.tuners.point_gst.graph import Graphs, graphs_of

Transform = Literal["fourier", "published"]


class SpectralAdapter(nn.Module):
    """W_up (SiLU(h) + sum over scales of U a(U^T h)), h = W_down x, a(z) = z + SiLU(W_a LN(z)); W_a for all scales."""

    def __init__(self, channels: int, rank: int, transform: Transform, *, scales: int) -> None:
        super().__init__()
        self.published = transform == "published"
        self.down = nn.Linear(channels, rank)
        self.up = nn.Linear(rank, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.norms = nn.ModuleList(nn.LayerNorm(rank) for _ in range(scales))
        self.mix = nn.Linear(rank, rank) if scales else None
        if self.mix is not None:
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)

    def forward(self, ahead: Tensor, patches: Tensor, scales: Sequence[Graphs]) -> Tensor:
        """The change (b, e + g, c) of tokens ahead (b, e, c) and patch tokens (b, g, c) with these graphs."""
        low = self.down(torch.cat([ahead, patches], dim=1))
        narrow, own = nn.functional.silu(low), low[:, ahead.shape[1] :]
        rows = rearrange(own, "b g r -> (b g) r")
        spectral = [self._adapt(rows, graphs, norm) for graphs, norm in zip(scales, self.norms, strict=True)]
        if spectral:
            mixed = rearrange(torch.stack(spectral).sum(dim=0), "(b g) r -> b g r", b=patches.shape[0])
            narrow = narrow + nn.functional.pad(mixed, (0, 0, ahead.shape[1], 0)).to(narrow.dtype)
        change: Tensor = self.up(narrow)
        return change

    def _adapt(self, tokens: Tensor, graphs: Graphs, norm: nn.Module) -> Tensor:
        """U a(U^T h) for tokens h (n, r); as published, U^T a(U h)."""
        assert self.mix is not None
        basis = graphs.vectors.to(tokens.dtype)
        basis = basis.mT if self.published else basis
        spectrum = basis.mT @ graphs.split(tokens)
        spectrum = spectrum + nn.functional.silu(self.mix(norm(spectrum)))
        return graphs.join(basis @ spectrum.to(basis.dtype))


class SpectralPart(SequencePart):
    """Adds to a block's output what the adapter makes of its tokens after the attention."""

    prefix = "point_gst"

    def __init__(self, stage: Stage, number: int, adapter: SpectralAdapter, local_size: int) -> None:
        super().__init__(stage, number)
        self.adapter = adapter
        self.local_size = local_size

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        got = self.returned(call, output)
        stream = noted_stream(call, self, got)
        ahead = got.prefix.shape[1]
        scales = graphs_of(call.forward, self.number, self.local_size) if len(self.adapter.norms) else ()
        change = self.adapter(stream[:, :ahead], stream[:, ahead:], scales).to(got.patches.dtype)
        return self.without_prompts(output, got.prefix + change[:, :ahead], got.patches + change[:, ahead:])
