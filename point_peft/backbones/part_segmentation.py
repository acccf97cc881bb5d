"""Part segmentation with the plain point transformer, with the tensor names of public checkpoints."""

from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from point_peft import geometry
from point_peft.backbones.layers import (
    Encoder,
    TransformerEncoder,
    group_divider,
    init_weights,
    position_layers,
    sine_features,
    split_features,
)
from point_peft.errors import PointPeftError


class FeaturePropagation(nn.Module):
    """Carry features of sources to queries: from the 3 nearest, joined with the coordinates, then 1x1 convolutions."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        inputs = (channels + 3, *widths)
        self.mlp_convs = nn.ModuleList(nn.Conv1d(inputs[i], width, 1) for i, width in enumerate(widths))
        self.mlp_bns = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)

    def forward(self, queries: Tensor, sources: Tensor, features: Tensor) -> Tensor:
        """Features (b, c', m) at queries (b, m, 3) from features (b, s, c) at sources (b, s, 3)."""
        carried = geometry.nearest_interpolate(features, sources, queries)
        out = rearrange(torch.cat([queries, carried], dim=2), "b m c -> b c m")
        for conv, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            out = torch.relu_(norm(conv(out)))
        return out


class PointTransformerPartSeg(nn.Module):
    """Segment clouds `(b, n, 3)` of a known object label into log-probabilities of parts `(b, n, cls_dim)`.

    The label is one-hot, `(b, num_labels)` or `(b, 1, num_labels)`. There is no prefix token. The tokens after the
    blocks numbered in `taps` are each normalised and joined; the defaults are Point-MAE's for ShapeNetPart. For PCP-MAE
    `pos_features="sine"`, see `PointTransformer`. Points with features, such as normals, are
    `(b, n, in_channels)`. A head of less than 1024 channels is our own, for small encoders.
    """

    def __init__(
        self,
        *,
        trans_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_group: int = 128,
        group_size: int = 32,
        encoder_dims: int = 384,
        drop_path_rate: float = 0.1,
        cls_dim: int = 50,
        num_labels: int = 16,
        taps: tuple[int, ...] = (3, 7, 11),
        pos_features: Literal["xyz", "sine"] = "xyz",
        in_channels: int = 3,
        head_width: int = 1024,
    ) -> None:
        super().__init__()
        if trans_dim % num_heads:
            raise PointPeftError(f"trans_dim {trans_dim} is not divisible by num_heads {num_heads}")
        if not taps or list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= depth:
            raise PointPeftError(f"taps must be ascending block numbers below depth {depth}, got {taps}")
        self.num_labels = num_labels
        self.taps = taps
        self.trans_dim = trans_dim
        self.pos_features = pos_features
        self.in_channels = in_channels

        self.group_divider = group_divider(num_group, group_size, in_channels)
        self.encoder = Encoder(encoder_dims, inputs=in_channels)
        self.reduce_dim = nn.Identity() if encoder_dims == trans_dim else nn.Linear(encoder_dims, trans_dim)
        self.pos_embed = position_layers(pos_features, trans_dim)
        self.blocks = TransformerEncoder(trans_dim, depth, num_heads, drop_path_rate)
        self.norm = nn.LayerNorm(trans_dim)

        joined = len(taps) * trans_dim
        self.label_conv = nn.Sequential(
            nn.Conv1d(num_labels, 64, 1, bias=False), nn.BatchNorm1d(64), nn.LeakyReLU(0.2, inplace=True)
        )
        self.propagation_0 = FeaturePropagation(joined, (4 * trans_dim, head_width))
        self.convs1 = nn.Conv1d(head_width + 2 * joined + 64, head_width // 2, 1)
        self.bns1 = nn.BatchNorm1d(head_width // 2)
        self.dp1 = nn.Dropout(0.5)
        self.convs2 = nn.Conv1d(head_width // 2, head_width // 4, 1)
        self.bns2 = nn.BatchNorm1d(head_width // 4)
        self.convs3 = nn.Conv1d(head_width // 4, cls_dim, 1)

        self.apply(init_weights)

    def forward(self, points: Tensor, label: Tensor) -> Tensor:
        """Log-probabilities (b, n, cls_dim) for clouds (b, n, in_channels) with labels (b, 1, num_labels)."""
        label = one_hot_columns(label, points.shape[0], self.num_labels).to(self.convs1.weight.dtype)
        coordinates, *features = split_features(points, self.in_channels)
        neighborhood, center = self.group_divider(coordinates, *features)
        tokens = self.reduce_dim(self.encoder(neighborhood))
        pos = self.pos_embed(center if self.pos_features == "xyz" else sine_features(center, self.trans_dim))
        tapped = self.blocks(tokens, pos, self.taps)
        joined = torch.cat([self.norm(tokens) for tokens in tapped], dim=2)

        whole = torch.cat([reduce(joined, "b g c -> b c 1", how) for how in ("max", "mean")], dim=1)
        whole = torch.cat([whole, self.label_conv(label)], dim=1)
        local = self.propagation_0(coordinates, center, joined)
        joint = torch.cat([local, whole.expand(-1, -1, local.shape[2])], dim=1)

        joint = self.dp1(torch.relu_(self.bns1(self.convs1(joint))))
        joint = torch.relu_(self.bns2(self.convs2(joint)))
        logits: Tensor = rearrange(self.convs3(joint), "b c n -> b n c")
        return logits.log_softmax(dim=2)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the backward pass run each block again, or the forward keep what is computed within it.

        Training then takes much less memory and somewhat more time; outputs and gradients stay the same.
        """
        self.blocks.grad_checkpointing = enable


def one_hot_columns(label: Tensor, b: int, num_labels: int) -> Tensor:
    """One-hot object labels (b, num_labels) or (b, 1, num_labels) as (b, num_labels, 1); raises on other shapes."""
    if label.shape not in ((b, num_labels), (b, 1, num_labels)):
        raise PointPeftError(
            f"label must be one-hot, ({b}, {num_labels}) or ({b}, 1, {num_labels}), got {tuple(label.shape)}"
        )
    return label.reshape(b, num_labels, 1)
