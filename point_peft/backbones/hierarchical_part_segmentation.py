"""Part segmentation with the hierarchical point transformer, with the tensor names of public checkpoints."""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from point_peft.backbones.hierarchical import HierarchicalEncoder, check_levels, group_dividers, group_levels
from point_peft.backbones.layers import init_weights
from point_peft.backbones.part_segmentation import FeaturePropagation, one_hot_columns


class HierarchicalPointTransformerPartSeg(nn.Module):
    """Segment clouds `(b, n, 3)` of a known object label into log-probabilities of parts `(b, n, cls_dim)`.

    The label is one-hot, `(b, num_labels)` or `(b, 1, num_labels)`. The tokens of every level are normalised and
    carried to the points. The defaults are Point-M2AE's for ShapeNetPart.

    Numbers were compared with torch-pointcloud's Point-M2AE, which returns logits; the logarithm of the softmax, and
    that the coordinates come before the carried features, as in Point-MAE's part segmentation, are our reading of the
    official model.
    """

    def __init__(
        self,
        *,
        num_groups: Sequence[int] = (512, 256, 64),
        group_sizes: Sequence[int] = (16, 8, 8),
        encoder_dims: Sequence[int] = (96, 192, 384),
        encoder_depths: Sequence[int] = (5, 5, 5),
        local_radius: Sequence[float] = (0.32, 0.64, 1.28),
        num_heads: int = 6,
        drop_path_rate: float = 0.1,
        cls_dim: int = 50,
        num_labels: int = 16,
    ) -> None:
        super().__init__()
        check_levels(num_groups, group_sizes, encoder_dims, encoder_depths, local_radius, num_heads)
        self.num_labels = num_labels

        self.group_dividers = group_dividers(num_groups, group_sizes)
        self.h_encoder = HierarchicalEncoder(
            encoder_dims, encoder_depths, local_radius, num_heads, drop_path_rate, output_norms=True
        )
        self.label_conv = nn.Sequential(
            nn.Conv1d(num_labels, 64, 1, bias=False), nn.BatchNorm1d(64), nn.LeakyReLU(0.2, inplace=True)
        )
        self.propagations = nn.ModuleList(FeaturePropagation(dim, (4 * encoder_dims[-1], 1024)) for dim in encoder_dims)
        self.convs1 = nn.Conv1d(2 * 1024 * len(encoder_dims) + 64, 1024, 1)
        self.bns1 = nn.BatchNorm1d(1024)
        self.dp1 = nn.Dropout(0.5)
        self.convs2 = nn.Conv1d(1024, 512, 1)
        self.bns2 = nn.BatchNorm1d(512)
        self.convs3 = nn.Conv1d(512, 256, 1)
        self.bns3 = nn.BatchNorm1d(256)
        self.convs4 = nn.Conv1d(256, cls_dim, 1)

        self.apply(init_weights)

    def forward(self, points: Tensor, label: Tensor) -> Tensor:
        """Log-probabilities (b, n, cls_dim) for clouds (b, n, 3) with one-hot object labels (b, 1, num_labels)."""
        label = one_hot_columns(label, points.shape[0], self.num_labels).to(self.convs1.weight.dtype)
        neighborhoods, centers, index = zip(*group_levels(self.group_dividers, points), strict=True)
        levels = self.h_encoder(neighborhoods[0], centers, index)

        carried = zip(self.propagations, centers, levels, strict=True)
        local = torch.cat([propagate(points, center, tokens) for propagate, center, tokens in carried], dim=1)
        whole = reduce(local, "b c n -> b c 1", "max") + reduce(local, "b c n -> b c 1", "mean")
        whole = torch.cat([whole, self.label_conv(label)], dim=1)
        features = torch.cat([whole.expand(-1, -1, local.shape[2]), local], dim=1)

        features = self.dp1(torch.relu_(self.bns1(self.convs1(features))))
        features = torch.relu_(self.bns2(self.convs2(features)))
        features = torch.relu_(self.bns3(self.convs3(features)))
        logits: Tensor = rearrange(self.convs4(features), "b c n -> b n c")
        return logits.log_softmax(dim=2)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the backward pass run each block again, or the forward keep what is computed within it.

        Training then takes much less memory and somewhat more time; outputs and gradients stay the same.
        """
        self.h_encoder.set_grad_checkpointing(enable)
