"""torch.nn.TransformerEncoder on the patches of clouds, with masks, batch first and sequence first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from point_peft.backbones.layers import Group

from .inputs import clouds, partly_filled_clouds, slice_batch
from .parts import GROUP_SIZE, HEADS, PatchNet, Positions, Tokenizer
from .registry import CLASSES, WIDTH, linear_head, register


def _encoder(*, batch_first: bool, norm_first: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    # Nested tensors, which are the default, raise a warning.
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


class BatchFirst(nn.Module):
    """Clouds (b, n, 3), of which each has its own number of points (b), and so of patches: the others are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PatchNet()
        self.positions = Positions()
        self.start = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.encoder = _encoder(batch_first=True, norm_first=True)
        self.classify = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, points: Tensor, counts: Tensor) -> Tensor:
        parts = [Group(n // 6, GROUP_SIZE)(own[None, :n]) for own, n in zip(points, counts.tolist(), strict=True)]
        patches = pad_sequence([patch[0] for patch, _ in parts], batch_first=True)
        centres = pad_sequence([centre[0] for _, centre in parts], batch_first=True)
        tokens = torch.cat([self.start.expand(len(points), -1, -1), self.net(patches) + self.positions(centres)], 1)
        padding = torch.arange(tokens.shape[1]) > (counts // 6)[:, None]
        tokens = self.encoder(tokens, src_key_padding_mask=padding)
        largest = tokens[:, 1:].masked_fill(padding[:, 1:, None], float("-inf")).amax(1)
        logits: Tensor = self.classify(torch.cat([tokens[:, 0], largest], dim=1))
        return logits


class SequenceFirst(nn.Module):
    """Tokens (l, b, c) of clouds (b, n, 3) under one mask (l, l) for all: token i is not to see those far after it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Tokenizer()
        self.positions = Positions()
        self.encoder = _encoder(batch_first=False, norm_first=False)
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        tokens, centres = self.tokenizer(points)
        tokens = (tokens + self.positions(centres)).transpose(0, 1)
        place = torch.arange(len(tokens))
        tokens = self.encoder(tokens, mask=place > place[:, None] + 4)
        logits: Tensor = self.classify(tokens.amax(0))
        return logits


@register(
    inputs=partly_filled_clouds,
    slice=slice_batch,
    heads=("classify",),
    other_head=linear_head(2 * WIDTH),
    kind="weights read",
)
def transformer_batch_first() -> nn.Module:
    """nn.TransformerEncoder with a key padding mask (b, l), True for padding: it changes with the batch mates.

    Without gradients in eval mode a layer runs as one fused operator, and what is inside is not called.
    """
    return BatchFirst()


@register(inputs=clouds, slice=slice_batch, heads=("classify",), other_head=linear_head(WIDTH), kind="weights read")
def transformer_sequence_first() -> nn.Module:
    """nn.TransformerEncoder, post-norm, tokens (l, b, c), a boolean mask (l, l), True for what is not seen."""
    return SequenceFirst()
