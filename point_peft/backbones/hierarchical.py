"""The hierarchical point transformer of Point-M2AE and I2P-MAE, with the tensor names of their public checkpoints."""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Literal

import torch
from einops import reduce
from torch import Tensor, nn

from point_peft import geometry
from point_peft.backbones.layers import Block, Encoder, group, init_weights, run_block
from point_peft.errors import PointPeftError


class IndexedGroup(nn.Module):
    """Split clouds (b, n, 3) into groups around farthest points; no parameters.

    Returns the neighbourhoods (b, g, k, 3), each centred on its centre, the centres (b, g, 3) and the indices
    (b, g, k) of the neighbours among the points of their own cloud.
    """

    def __init__(self, num_group: int, group_size: int) -> None:
        super().__init__()
        self.num_group = num_group
        self.group_size = group_size

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return group(points, self.num_group, self.group_size)


class EncoderBlocks(nn.Module):
    """The blocks of one level; the positions (b, g, c) are added to the tokens (b, g, c) again before every block."""

    def __init__(self, dim: int, num_heads: int, rates: Sequence[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, rate) for rate in rates)
        self.grad_checkpointing = False

    def forward(self, tokens: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            tokens = run_block(block, tokens + pos, mask, again=self.grad_checkpointing)
        return tokens


class HierarchicalEncoder(nn.Module):
    """Tokens of every level: a level embeds its groups of points, or of tokens of the level below, and relates them.

    A token sees those of its level whose centres are nearer than the level's radius; radius 0 stands for all.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        radii: Sequence[float],
        num_heads: int,
        drop_path_rate: float,
        *,
        output_norms: bool,
    ) -> None:
        super().__init__()
        self.radii = tuple(radii)
        self.token_embed = nn.ModuleList([Encoder(dims[0])])
        for below, dim in pairwise(dims):
            self.token_embed.append(Encoder(dim, inputs=below, widths=(below, below, dim)))
        self.encoder_pos_embeds = nn.ModuleList(
            nn.Sequential(nn.Linear(3, dim), nn.GELU(), nn.Linear(dim, dim)) for dim in dims
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.encoder_blocks = nn.ModuleList(
            EncoderBlocks(dim, num_heads, list(islice(rates, depth))) for dim, depth in zip(dims, depths, strict=True)
        )
        if output_norms:
            self.encoder_norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        self.output_norms = output_norms

    def forward(self, neighborhood: Tensor, centers: Sequence[Tensor], index: Sequence[Tensor]) -> list[Tensor]:
        """Tokens (b, g_i, c_i) of every level i.

        Of the groups are read the neighbourhoods (b, g_0, k_0, 3) of the first level, the centres (b, g_i, 3) of all
        levels, and above the first the indices (b, g_i, k_i) of the members among the tokens of the level below.
        """
        levels: list[Tensor] = []
        for i, (embed, embed_pos, blocks) in enumerate(
            zip(self.token_embed, self.encoder_pos_embeds, self.encoder_blocks, strict=True)
        ):
            tokens = embed(geometry.gather(levels[-1], index[i]) if levels else neighborhood)
            levels.append(blocks(tokens, embed_pos(centers[i]), distant(centers[i], self.radii[i])))
        if self.output_norms:
            levels = [norm(tokens) for norm, tokens in zip(self.encoder_norms, levels, strict=True)]
        return levels

    def set_grad_checkpointing(self, enable: bool) -> None:
        for blocks in self.encoder_blocks:
            assert isinstance(blocks, EncoderBlocks)
            blocks.grad_checkpointing = enable


class HierarchicalPointTransformer(nn.Module):
    """Classify clouds `(b, n, 3)` into logits `(b, cls_dim)`.

    Level 0 groups the points, every other level the centres of the level below, so that a token stands for ever more
    of the cloud. There is no prefix token. The defaults are Point-M2AE's for ModelNet40. The relatives differ by
    arguments:

    - Point-M2AE for ScanObjectNN: `group_sizes=(32, 16, 16), pooling="concat", cls_dim=15`.
    - I2P-MAE: for ModelNet40 `group_sizes=(48, 24, 24), local_radius=(0.24, 0.48, 0.96)`; for ScanObjectNN as
      Point-M2AE's, with `local_radius=(0.48, 0.96, 1.92)`.

    The head reads the mean and the maximum over the tokens of the last level: their sum, or with `pooling="concat"`
    both, and then the maximum leaves out the first token, as that of the published models does.

    Numbers were compared with torch-pointcloud's Point-M2AE, not with the official model. I2P-MAE's sizes and radii are
    those of its published configurations; that its encoder is Point-M2AE's, name by name, is our reading, as are its
    two poolings. Its pre-training checkpoint was not at hand: what that holds beside `h_encoder.` is reported as
    unexpected. Distances for the radii are exact here; where they are taken by a matrix product, pairs within about
    1e-6 of the radius may be decided otherwise.
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
        cls_dim: int = 40,
        pooling: Literal["sum", "concat"] = "sum",
    ) -> None:
        super().__init__()
        check_levels(num_groups, group_sizes, encoder_dims, encoder_depths, local_radius, num_heads)
        if pooling not in ("sum", "concat"):
            raise PointPeftError(f"pooling must be 'sum' or 'concat', got {pooling!r}")
        self.pooling = pooling

        self.group_dividers = group_dividers(num_groups, group_sizes)
        self.h_encoder = HierarchicalEncoder(
            encoder_dims, encoder_depths, local_radius, num_heads, drop_path_rate, output_norms=False
        )
        width = encoder_dims[-1]
        self.norm = nn.LayerNorm(width)
        self.cls_head_finetune = nn.Sequential(
            nn.Linear(width if pooling == "sum" else 2 * width, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(256, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(256, cls_dim),
        )
        self.apply(init_weights)

    def forward(self, points: Tensor) -> Tensor:
        """Logits (b, cls_dim) of clouds (b, n, 3)."""
        return self.forward_head(self.forward_features(points))

    def forward_features(self, points: Tensor) -> Tensor:
        """Tokens (b, g, c) of the last level for clouds (b, n, 3), after the final norm."""
        neighborhoods, centers, index = zip(*group_levels(self.group_dividers, points), strict=True)
        normed: Tensor = self.norm(self.h_encoder(neighborhoods[0], centers, index)[-1])
        return normed

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Logits (b, cls_dim) of tokens (b, g, c)."""
        mean = reduce(tokens, "b g c -> b c", "mean")
        if self.pooling == "sum":
            pooled = mean + reduce(tokens, "b g c -> b c", "max")
        else:
            pooled = torch.cat([mean, reduce(tokens[:, 1:], "b g c -> b c", "max")], dim=1)
        logits: Tensor = self.cls_head_finetune(pooled)
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the backward pass run each block again, or the forward keep what is computed within it.

        Training then takes much less memory and somewhat more time; outputs and gradients stay the same.
        """
        self.h_encoder.set_grad_checkpointing(enable)


def distant(center: Tensor, radius: float) -> Tensor | None:
    """Mask (b, g, g) that is True where two of the centres (b, g, 3) lie `radius` or more apart; None for radius 0."""
    return geometry.squared_distance(center, center) >= radius**2 if radius else None


def group_dividers(num_groups: Sequence[int], group_sizes: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(IndexedGroup(count, size) for count, size in zip(num_groups, group_sizes, strict=True))


def group_levels(dividers: nn.ModuleList, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Groups that each divider makes of the centres of the one before it, the first of the points (b, n, 3)."""
    for divider in dividers:
        neighborhood, points, index = divider(points)
        yield neighborhood, points, index


def check_levels(
    num_groups: Sequence[int],
    group_sizes: Sequence[int],
    dims: Sequence[int],
    depths: Sequence[int],
    radii: Sequence[float],
    num_heads: int,
) -> None:
    """Raise if these are not the options of one or more levels that can lie upon one another."""
    options = {
        "num_groups": num_groups,
        "group_sizes": group_sizes,
        "encoder_dims": dims,
        "encoder_depths": depths,
        "local_radius": radii,
    }
    if not num_groups or len({len(values) for values in options.values()}) > 1:
        listed = ", ".join(f"{name} {tuple(values)}" for name, values in options.items())
        raise PointPeftError(f"every level needs one value of each option, got {listed}")
    for name, values in options.items():
        least = 0 if name == "local_radius" else 1
        if min(values) < least:
            raise PointPeftError(f"{name} must be {least} or more, got {tuple(values)}")
    for level in range(1, len(num_groups)):
        below, count, size = num_groups[level - 1], num_groups[level], group_sizes[level]
        if max(count, size) > below:
            raise PointPeftError(
                f"level {level} cannot make {count} groups of {size} from the {below} of the one below"
            )
    for dim in dims:
        if dim % num_heads:
            raise PointPeftError(f"encoder_dims {tuple(dims)}: {dim} is not divisible by num_heads {num_heads}")
