"""Models with the names and the layouts of PointGPT, written from their description."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.backbones.layers import Encoder, Group, sine_features
from point_peft.backbones.part_segmentation import FeaturePropagation

from .inputs import LABELS, clouds, labelled_clouds, slice_batch
from .registry import CLASSES, ENCODER_WIDTHS, WIDTH, linear_head, register

GROUPS = 16
GROUP_SIZE = 8


class PathGroup(Group):
    """Patches (b, g, k, 3) and centres (b, g, 3) in the order of a path that goes on to the nearest centre left."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        neighborhood, center = super().forward(points)
        distance = geometry.squared_distance(center, center)
        sample = torch.arange(len(center))
        left = torch.ones_like(distance[:, 0])
        path = [torch.zeros_like(sample)]
        for _ in range(1, self.num_group):
            left[sample, path[-1]] = float("inf")
            path.append((distance[sample, path[-1]] * left).nan_to_num(float("inf")).argmin(1))
        order = torch.stack(path, dim=1)
        return neighborhood[sample[:, None], order], center[sample[:, None], order]


class SinePositions(nn.Module):
    def forward(self, coordinates: Tensor) -> Tensor:
        return sine_features(coordinates, WIDTH)


def prefixed(token: Tensor, rest: Tensor) -> Tensor:
    """The token (1, 1, c) ahead of others (b, l, c)."""
    return torch.cat([token.expand(len(rest), -1, -1), rest], dim=1)


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class GPTBlock(nn.Module):
    """Tokens (l, b, c); the residuals start from the normalised tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 4)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        x = self.ln_1(x)
        attended, _ = self.attn(x, x, x, attn_mask=attn_mask, need_weights=False)
        x = x + attended
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Extractor(nn.Module):
    """The blocks, and the head with them."""

    def __init__(self) -> None:
        super().__init__()
        self.sos = nn.Parameter(torch.zeros(WIDTH))
        self.layers = nn.ModuleList(GPTBlock() for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.cls_norm = nn.LayerNorm(WIDTH)
        self.cls_head_finetune = nn.Sequential(nn.Linear(2 * WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, h: Tensor, pos: Tensor, attn_mask: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.cat([self.sos.expand(len(h), 1, -1), h], dim=1).transpose(0, 1)
        pos = pos.transpose(0, 1)
        for layer in self.layers:
            h = layer(h + pos, attn_mask)
        encoded = self.ln_f(h).transpose(0, 1)
        normed = self.cls_norm(encoded)
        return encoded, self.cls_head_finetune(torch.cat([normed[:, 1], normed[:, 2:].amax(1)], dim=1))


class Generator(nn.Module):
    """Points (b, g, k, 3) of the patches, from the encoded tokens and the directions to the next centres."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GPTBlock() for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.increase_dim = nn.Conv1d(WIDTH, 3 * GROUP_SIZE, 1)

    def forward(self, h: Tensor, pos: Tensor, attn_mask: Tensor) -> Tensor:
        h, pos = h.transpose(0, 1), pos.transpose(0, 1)
        for layer in self.layers:
            h = layer(h + pos, attn_mask)
        points: Tensor = self.increase_dim(self.ln_f(h).permute(1, 2, 0))
        return points.transpose(1, 2).reshape(len(points), -1, GROUP_SIZE, 3)


class Tokenized(nn.Module):
    """The modules and tokens ahead of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.group_divider = PathGroup(GROUPS, GROUP_SIZE)
        self.encoder = Encoder(WIDTH, widths=ENCODER_WIDTHS)
        self.pos_embed = SinePositions()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.sos_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))


class PointGPT(Tokenized):
    """Classifies clouds (b, n, 3); returns (logits, reconstructed patches)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Extractor()
        self.generator_blocks = Generator()

    def forward(self, pts: Tensor) -> tuple[Tensor, Tensor]:
        neighborhood, center = self.group_divider(pts)
        tokens = self.encoder(neighborhood)
        step = center[:, 1:] - center[:, :-1]
        direction = step / step.norm(dim=2, keepdim=True)
        pos = self.pos_embed(center)
        relative = self.pos_embed(torch.cat([center[:, :1], direction], dim=1))

        # The tokens are [sos, cls, patches]: the two positions stand the other way round.
        pos = prefixed(self.cls_pos, prefixed(self.sos_pos, pos))
        mask = causal_mask(pos.shape[1])
        encoded, logits = self.blocks(prefixed(self.cls_token, tokens), pos, mask)
        return logits, self.generator_blocks(encoded[:, 2:], relative, mask[2:, 2:])


@register(
    inputs=clouds,
    slice=slice_batch,
    select=lambda output: output[0],
    heads=("blocks.cls_norm", "blocks.cls_head_finetune"),
    other_head=linear_head(2 * WIDTH),
    unused=("generator_blocks",),
    kind="masked or sequence first",
)
def pointgpt() -> nn.Module:
    """Tokens (l, b, c), a causal mask, the class token second, a head inside `blocks`, a generator beside them."""
    return PointGPT()


class MaskedBlock(GPTBlock):
    """It makes its mask itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, causal_mask(len(x)))


class TappedExtractor(nn.Module):
    """The patch tokens as each block leaves them; what `ln_f` makes of the last is read by nothing in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.sos = nn.Parameter(torch.zeros(WIDTH))
        self.layers = nn.ModuleList(MaskedBlock() for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.increase_dim = nn.Sequential(nn.Conv1d(WIDTH, 3 * GROUP_SIZE, 1))

    def forward(self, h: Tensor, pos: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, pos = prefixed(self.sos[None, None], h).transpose(0, 1), pos.transpose(0, 1)
        tapped = []
        for layer in self.layers:
            h = layer(h + pos)
            tapped.append(h.transpose(0, 1)[:, 2:])
        return self.ln_f(h), tapped


class PointGPTPartSeg(Tokenized):
    """Segments clouds (b, n, 3) of a known label; returns log-probabilities (b, n, c)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = TappedExtractor()
        self.norm = nn.LayerNorm(WIDTH)
        self.label_conv = nn.Sequential(nn.Conv1d(LABELS, 8, 1, bias=False), nn.BatchNorm1d(8), nn.LeakyReLU(0.2))
        self.propagation_0 = FeaturePropagation(2 * WIDTH, (16,))
        self.convs1, self.bns1 = nn.Conv1d(16 + 2 * WIDTH + 8, 16, 1), nn.BatchNorm1d(16)
        self.convs2, self.bns2 = nn.Conv1d(16, 16, 1), nn.BatchNorm1d(16)
        self.convs3 = nn.Conv1d(16, CLASSES, 1)

    def forward(self, pts: Tensor, label: Tensor) -> Tensor:
        neighborhood, center = self.group_divider(pts)
        pos = prefixed(self.cls_pos, prefixed(self.sos_pos, self.pos_embed(center)))
        _, tapped = self.blocks(prefixed(self.cls_token, self.encoder(neighborhood)), pos)
        joined = torch.cat([self.norm(tokens) for tokens in tapped], dim=2)
        local = self.propagation_0(pts, center, joined)
        whole = torch.cat([joined.amax(1, keepdim=True).mT, self.label_conv(label[:, :, None])], dim=1)
        features = torch.cat([local, whole.expand(-1, -1, local.shape[2])], dim=1)
        features = self.bns1(self.convs1(features)).relu()
        features = self.bns2(self.convs2(features)).relu()
        logits: Tensor = self.convs3(features).mT
        return logits.log_softmax(2)


@register(
    inputs=labelled_clouds,
    slice=slice_batch,
    heads=("label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3"),
    other_head=lambda: nn.Conv1d(16, 7, 1),
    unused=("blocks.ln_f", "blocks.increase_dim"),
    kind="masked or sequence first",
)
def pointgpt_part_seg() -> nn.Module:
    """Blocks are tapped, and the norm that classification reads runs for nothing."""
    return PointGPTPartSeg()
