"""The plain point transformer of Point-MAE and its relatives, with the tensor names of their public checkpoints."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import reduce
from torch import Tensor, nn

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


class PointTransformer(nn.Module):
    """Classify clouds `(b, n, 3)` into logits `(b, cls_dim)`.

    The defaults are Point-MAE's. The relatives differ by an argument:

    - ACT: none; its `reduce_dim` has no parameters because the widths are equal.
    - Point-BERT: `encoder_dims=256, num_group=64, head_norm=False`. A `reduce_dim` layer exists exactly when
      `encoder_dims != trans_dim`.
    - PCP-MAE: `pos_features="sine"`: the positional embedding reads as many sine features as `trans_dim`, which is its
      hidden width too.
    - ReCon: `prefix_tokens=("cls", "img", "text")`. Its contrast branch is left out: its weights are read into the
      plain transformer, as is the custom in the field, and those of the branch are reported as unexpected.
    - Points with features, such as normals or colours: `in_channels=3 + f`, for clouds `(b, n, 3 + f)`.

    The prefix tokens lie before the patch tokens. The head reads the prefix tokens and the maximum over the patches.
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
        cls_dim: int = 15,
        prefix_tokens: Sequence[str] = ("cls",),
        pos_features: Literal["xyz", "sine"] = "xyz",
        head_norm: bool = True,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_heads(trans_dim, num_heads)
        self.trans_dim = trans_dim
        self.depth = depth
        self.prefix_tokens = tuple(prefix_tokens)
        self.pos_features = pos_features
        self.in_channels = in_channels

        self.group_divider = group_divider(num_group, group_size, in_channels)
        self.encoder = Encoder(encoder_dims, inputs=in_channels)
        self.reduce_dim = nn.Identity() if encoder_dims == trans_dim else nn.Linear(encoder_dims, trans_dim)
        for name in self.prefix_tokens:
            self.register_parameter(f"{name}_token", nn.Parameter(torch.empty(1, 1, trans_dim)))
            self.register_parameter(f"{name}_pos", nn.Parameter(torch.empty(1, 1, trans_dim)))
        self.pos_embed = position_layers(pos_features, trans_dim)
        self.blocks = TransformerEncoder(trans_dim, depth, num_heads, drop_path_rate)
        self.norm = nn.LayerNorm(trans_dim)
        self.cls_head_finetune = _head(trans_dim * (len(self.prefix_tokens) + 1), cls_dim, head_norm)

        self.apply(init_weights)
        for name in self.prefix_tokens:
            nn.init.trunc_normal_(self.get_parameter(f"{name}_token"), std=0.02)
            nn.init.trunc_normal_(self.get_parameter(f"{name}_pos"), std=0.02)

    def forward(self, points: Tensor) -> Tensor:
        """Logits (b, cls_dim) of clouds (b, n, in_channels)."""
        return self.forward_head(self.forward_features(points))

    def forward_features(self, points: Tensor) -> Tensor:
        """Tokens (b, prefix + g, c) of clouds (b, n, in_channels), after the final norm."""
        neighborhood, center = self.group_divider(*split_features(points, self.in_channels))
        patches = self.reduce_dim(self.encoder(neighborhood))
        pos = self.pos_embed(center if self.pos_features == "xyz" else sine_features(center, self.trans_dim))
        tokens = self._prepend("token", patches)
        tokens = self.blocks(tokens, self._prepend("pos", pos), (self.depth - 1,))[0]
        normed: Tensor = self.norm(tokens)
        return normed

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Logits (b, cls_dim) of tokens (b, prefix + g, c)."""
        count = len(self.prefix_tokens)
        pooled = torch.cat([tokens[:, :count].flatten(1), reduce(tokens[:, count:], "b g c -> b c", "max")], dim=1)
        logits: Tensor = self.cls_head_finetune(pooled)
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the backward pass run each block again, or the forward keep what is computed within it.

        Training then takes much less memory and somewhat more time; outputs and gradients stay the same.
        """
        self.blocks.grad_checkpointing = enable

    def _prepend(self, kind: str, patches: Tensor) -> Tensor:
        # getattr and not get_parameter: the parameters of a DataParallel replica are plain tensors.
        prefix: list[Tensor] = [getattr(self, f"{name}_{kind}") for name in self.prefix_tokens]
        return torch.cat([*(token.expand(patches.shape[0], -1, -1) for token in prefix), patches], dim=1)


def _head(width: int, cls_dim: int, head_norm: bool) -> nn.Sequential:
    if not head_norm:
        return nn.Sequential(nn.Linear(width, 256), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(256, cls_dim))
    return nn.Sequential(
        nn.Linear(width, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(256, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(256, cls_dim),
    )


def _check_heads(trans_dim: int, num_heads: int) -> None:
    if trans_dim % num_heads:
        raise PointPeftError(f"trans_dim {trans_dim} is not divisible by num_heads {num_heads}")
