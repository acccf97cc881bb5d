"""Small classifiers that differ from the usual one in a single respect each, which their docstrings name."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from point_peft import geometry
from point_peft.backbones.layers import Group

from .inputs import channels_first_clouds, clouds, featured_clouds, partly_filled_clouds, slice_batch, slice_dict
from .parts import GROUP_SIZE, GROUPS, HEADS, Layer, PatchNet, Positions, Tokenizer, first_and_largest
from .registry import CLASSES, WIDTH, Args, linear_head, register

_variant: dict[str, Any] = {
    "inputs": clouds,
    "slice": slice_batch,
    "heads": ("head",),
    "other_head": linear_head(2 * WIDTH),
}


class Classifier(nn.Module):
    """The usual: patches, one class token, positions added before each block, class token and maximum to the head."""

    def __init__(self, blocks: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.tokenizer: nn.Module = Tokenizer()
        self.positions = Positions()
        self.start = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.start_position = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(blocks or [Layer() for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        return self.classify(*self.tokenizer(points))

    def classify(self, tokens: Tensor, centres: Tensor) -> Tensor:
        tokens, positions = self.begin(tokens, centres)
        logits: Tensor = self.head(first_and_largest(self.norm(self.encode(tokens, positions, centres))))
        return logits

    def begin(self, tokens: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and positions (b, 1 + g, c) with those of the class token."""
        tokens = torch.cat([self.start.expand(len(tokens), -1, -1), tokens], dim=1)
        positions = torch.cat([self.start_position.expand(len(tokens), -1, -1), self.positions(centres)], dim=1)
        return tokens, positions

    def encode(self, tokens: Tensor, positions: Tensor, centres: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens + positions)
        return tokens


def with_start(between: Tensor) -> Tensor:
    """Bias between the centres (b, g, g), and zero between the class token and all: (b, 1 + g, 1 + g)."""
    return nn.functional.pad(between, (1, 0, 1, 0))


# ---- inputs and outputs ----------------------------------------------------------------------------------------------


class DictClassifier(Classifier):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        tokens, centres = self.tokenizer(batch["points"])
        tokens, positions = self.begin(tokens, centres)
        tokens = self.norm(self.encode(tokens, positions, centres))
        return {"tokens": tokens, "logits": self.head(first_and_largest(tokens))}


def _dict_clouds(batch: int, seed: int) -> Args:
    return ({"name": torch.arange(batch), "points": clouds(batch, seed)[0]},)


@register(**{**_variant, "inputs": _dict_clouds, "slice": slice_dict}, select=lambda output: output["logits"])
def dict_in_dict_out() -> nn.Module:
    """The clouds lie in a dict, and so do the logits."""
    return DictClassifier()


class ChannelsFirstClassifier(Classifier):
    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points.transpose(1, 2))


@register(**{**_variant, "inputs": channels_first_clouds})
def channels_first() -> nn.Module:
    """Clouds (b, 3, n)."""
    return ChannelsFirstClassifier()


class FeatureTokenizer(nn.Module):
    """Patches by the coordinates of points (b, n, 6), and tokens of both coordinates and features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PatchNet(6)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        xyz = points[:, :, :3].contiguous()
        centres = geometry.gather(xyz, geometry.farthest_point_sample(xyz, GROUPS))
        patches = geometry.gather(points, geometry.knn(centres, xyz, GROUP_SIZE))
        offset = nn.functional.pad(centres, (0, 3))
        return self.net(patches - offset[:, :, None]), centres


class FeatureClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = FeatureTokenizer()


@register(**{**_variant, "inputs": featured_clouds})
def point_features() -> nn.Module:
    """Points with features (b, n, 6): the centres are no rows of the input."""
    return FeatureClassifier()


# ---- blocks ----------------------------------------------------------------------------------------------------------


class MapLayer(Layer):
    """A block that gives the attention map (b, h, l, l) beside the tokens."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        fused = self.attention.qkv(self.norm_a(tokens))
        q, k, v = rearrange(fused, "b l (qkv h c) -> qkv b h l c", qkv=3, h=HEADS).unbind(0)
        attention = (q @ k.mT * q.shape[3] ** -0.5).softmax(3)
        tokens = tokens + self.attention.merge(rearrange(attention @ v, "b h l c -> b l (h c)"))
        return tokens + self.feed(self.norm_b(tokens)), attention


class MapClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__([MapLayer() for _ in range(2)])

    def encode(self, tokens: Tensor, positions: Tensor, centres: Tensor) -> Tensor:
        for block in self.blocks:
            tokens, _ = block(tokens + positions)
        return tokens


@register(**_variant)
def tuple_blocks() -> nn.Module:
    """Blocks return (tokens, attention map); the attention itself is never called as a module."""
    return MapClassifier()


class PositionLayer(nn.Module):
    """A block that adds the positions itself, to queries and keys only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm_b = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        normed = self.norm_a(x)
        x = x + self.attention(normed + pos, normed + pos, normed, need_weights=False)[0]
        out: Tensor = x + self.feed(self.norm_b(x))
        return out


class PositionClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__([PositionLayer() for _ in range(2)])

    def encode(self, tokens: Tensor, positions: Tensor, centres: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, positions)
        return tokens


@register(**_variant, kind="weights read")
def fused_positions() -> nn.Module:
    """block(x, pos): positions (b, l, c) are an argument, to grow with the tokens; x never holds them."""
    return PositionClassifier()


@register(**_variant)
def shared_block() -> nn.Module:
    """One block stands at two places of the list."""
    shared = Layer()
    return Classifier([shared, Layer(), shared])


# ---- masks -----------------------------------------------------------------------------------------------------------


class AllowedClassifier(Classifier):
    def encode(self, tokens: Tensor, positions: Tensor, centres: Tensor) -> Tensor:
        near = with_start(geometry.squared_distance(centres, centres)) < 1.0
        for block in self.blocks:
            tokens = block(tokens + positions, near[:, None])
        return tokens


@register(**_variant, kind="masked or sequence first")
def allowed_mask() -> nn.Module:
    """A boolean mask (b, 1, l, l) of each sample's own, True for what may be seen."""
    return AllowedClassifier()


class BiasLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_a = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm_b = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor, *, attn_mask: Tensor) -> Tensor:
        normed = self.norm_a(tokens)
        tokens = tokens + self.attention(normed, normed, normed, attn_mask=attn_mask, need_weights=False)[0]
        out: Tensor = tokens + self.feed(self.norm_b(tokens))
        return out


class BiasClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__([BiasLayer() for _ in range(2)])
        self.slope = nn.Parameter(torch.zeros(HEADS))

    def encode(self, tokens: Tensor, positions: Tensor, centres: Tensor) -> Tensor:
        distance = with_start(geometry.squared_distance(centres, centres))
        bias = -self.slope.exp()[:, None, None] * distance[:, None]
        for block in self.blocks:
            tokens = block(tokens + positions, attn_mask=bias.flatten(0, 1))
        return tokens


@register(**_variant, kind="weights read")
def head_masks() -> nn.Module:
    """An additive mask (b * h, l, l), one for each head of each sample, learned, and passed by its name."""
    return BiasClassifier()


class PaddedClassifier(Classifier):
    """Of clouds (b, n, 3) only the first points count, of each its own number (b); patches as many as they fill."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = PatchNet()

    def forward(self, points: Tensor, counts: Tensor) -> Tensor:  # type: ignore[override]
        parts = [Group(n // 6, GROUP_SIZE)(own[None, :n]) for own, n in zip(points, counts.tolist(), strict=True)]
        tokens = pad_sequence([self.tokenizer(patches)[0] for patches, _ in parts], batch_first=True)
        centres = pad_sequence([centre[0] for _, centre in parts], batch_first=True)
        tokens, positions = self.begin(tokens, centres)
        real = torch.arange(tokens.shape[1]) <= (counts // 6)[:, None]
        for block in self.blocks:
            tokens = block(tokens + positions, real[:, None, None])
        tokens = self.norm(tokens).masked_fill(~real[:, :, None], float("-inf"))
        logits: Tensor = self.head(first_and_largest(tokens))
        return logits


@register(**{**_variant, "inputs": partly_filled_clouds})
def padded_patches() -> nn.Module:
    """Samples of different numbers of patches, padded with zeros; a mask (b, 1, 1, l), True for what is real."""
    return PaddedClassifier()


# ---- training --------------------------------------------------------------------------------------------------------


class ShuffledTokenizer(Tokenizer):
    """Patches of randomly begun sampling, in random order, while training."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super().forward(points)
        patches, centres = self.sampler(points[:, torch.randperm(points.shape[1])])
        order = torch.randperm(GROUPS)
        return self.net(patches[:, order]), centres[:, order]


class ShuffledClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = ShuffledTokenizer()


@register(**_variant, random_in_training=True)
def random_groups() -> nn.Module:
    """In training the patches and their order are random: the centres are no longer what the sampler gave."""
    return ShuffledClassifier()
