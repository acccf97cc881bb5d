"""PointGST: an adapter beside the MLP that works on the spectrum of the tokens on graphs of where they lie.

D. Liang, T. Feng, X. Zhou, Y. Zhang, Z. Zou, X. Bai: "Parameter-Efficient Fine-Tuning in Spectral Domain for Point
Cloud Learning", TPAMI 2025, https://arxiv.org/abs/2410.08114

The patch tokens of a sample are the nodes of a complete graph, and so are those of each group of 32 that follow one
another on a Z-order curve. The nearer two tokens lie, the heavier the edge between them. The eigenvectors U of a
graph's Laplacian take the place of sine waves: U^T h are the frequencies of features h on the graph. With tokens x
after the attention, at coordinates c, and r channels in the middle:

    W_ij = delta / |c_i - c_j|,  W_ii = 1       delta: the smallest distance in the sample that is not zero
    I - D^-1/2 W D^-1/2 = U diag(lambda) U^T    once per forward; D: the row sums of W
    h = W_down x                                c -> r
    a(z) = z + SiLU(W_a LN(z))                  at every frequency; W_a is the same for both scales, LN is not
    s = sum over scales of U a(U^T h)           patch tokens only
    y <- y + W_up (SiLU(h) + s)                 y: the tokens after the block

W_up and W_a start at zero: a fresh adapter is the backbone. Prefix tokens and their positions are trained too.

What the bases depend on: the coordinates of the sample and nothing else, neither batch mates nor the library that finds
eigenvectors. The sign of an eigenvector and the basis of a repeated eigenvalue (closer than 1e-6) are fixed by inner
products with fixed waves through the cloud; tokens at one place are told apart by their order. Other coordinates give
other bases: a change of 1e-7 moves an eigenvector by about that over the distance to the next eigenvalue, and may turn
the sign of one that is nearly orthogonal to the wave. No rule without such points exists.

When to use it: for classification and part segmentation with up to some hundred tokens a cloud, where there should be
neither prompts nor other clouds. On a CPU the bases of 128 tokens cost less than one block; their cost grows with the
cube of the number of tokens, and GPUs are slow at many small ones.

Deviations from the published code, each with its reason:

- U^T h and then U, the graph Fourier transform. The published code has them exchanged, which its authors say is a
  mistake; `transform="published"` does as it did.
- delta is that of the sample. Published, it is that of the batch, so that a sample's output depended on its batch
  mates; and distances are exact, not expanded, whose rounding gave delta there.
- Tokens at one place have the weight of one and the same. Published, their weight is infinite.
- Signs and bases of repeated eigenvalues are fixed. Published, they are what the machine's library gives.
- A number of tokens that the size of the groups does not divide is cut into groups of nearly equal size.
- Packed tokens (PTv3 and the like) are too many for one graph: their two scales are groups of 32 and of 16.
- Where the prediction is made from the prefix tokens alone, the last block's adapter has no spectral branch: nothing
  would read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.anatomy.description import Stage
from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.sequence import SequencePart, check_located, note_stream, noted_stream
from point_peft.running.nested import Args, Kwargs
from point_peft.schema import Count, at_least
from point_peft.tuners.point_gst.graph import Graphs, graphs_of

Transform = Literal["fourier", "published"]


@dataclass(frozen=True, kw_only=True)
class PointGSTConfig(TunerConfig):
    """PointGST; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "POINT_GST"

    rank: Count = 36
    """The channels r that are transformed."""
    local_size: Annotated[int, at_least(2)] = 32
    """Tokens in a local graph, at most."""
    transform: Transform = "fourier"
    """U a(U^T h), or with U and U^T exchanged, as published."""
    tuned_tokens: str | Sequence[str] | None = None
    """Prefix tokens and positions that are trained; None: all."""

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        plan = Blueprint()
        for index, stage, blocks in self.chosen_stages(backbone):
            check_located(stage, self.method, blocks[0].path)
            for block in blocks:
                # Where the prediction is made from the prefix tokens alone, nothing reads the last block's patches.
                scales = 2 if anatomy.patches_read or block != anatomy.blocks[-1] else 0
                adapter = SpectralAdapter(stage.width, self.rank, self.transform, scales=scales)
                plan.parts.append((block.path, SpectralPart(stage, index, adapter, self.local_size)))
                plan.parts.append(note_stream(block, self.method))
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan


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
