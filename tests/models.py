"""Tiny backbones that every method is tested on. One enters by being registered here; the suite takes it from there.

Six are this library's, two are torch-pointcloud's, unmodified, and one (`Compact`) is written here as a user might:
separate query, key and value layers, an attention mask, grouping that is random in training, gradient checkpointing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft import geometry
from point_peft.backbones import PointTransformer, PointTransformerPartSeg
from point_peft.backbones.layers import Encoder, Group

POINTS = 96
"""Points in each cloud."""
CLASSES = 5
LABELS = 4
WIDTH = 24
"""Channels c of most of the backbones."""

Args = tuple[Any, ...]
Checkpointing = Literal["inside", "block", "container"]
"""What is run again in the backward pass: the inside of each block, each block with its hooks, all blocks."""


@dataclass(frozen=True, kw_only=True)
class TinyBackbone:
    """How to make a backbone and what to feed it. Outputs, by `select`, begin with the batch dimension."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Args]
    """(batch, seed) -> arguments of the model."""
    slice: Callable[[Args, int], Args]
    """Arguments for one sample of a batch."""
    select: Callable[[Any], Tensor]
    """The output as (b, ...)."""
    heads: tuple[str, ...]
    """The modules that a default adapter has to itself."""
    other_head: tuple[str, Callable[[], nn.Module]]
    """The last of them, and a replacement for seven classes."""
    random_in_training: bool = False

    def build(self) -> nn.Module:
        """A fresh copy in eval mode, always of the same values."""
        return copy.deepcopy(_prototype(self))


BACKBONES: dict[str, TinyBackbone] = {}


@functools.cache
def _prototype(backbone: TinyBackbone) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = backbone.make()
        enliven(model)
    return model.eval()


def enliven(model: nn.Module) -> None:
    """Values at which every tensor matters: no zero biases, no unit scales, no fresh running statistics."""
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not tensor.is_floating_point():
                    tensor.fill_(7)
                elif name == "running_var":
                    tensor.uniform_(0.5, 1.5)
                elif "norm" in type(module).__name__.lower() and name == "weight":
                    tensor.normal_(1.0, 0.1)
                elif tensor.ndim > 1:
                    tensor.normal_(0.0, (tensor.numel() / tensor.shape[0]) ** -0.5)
                else:
                    tensor.normal_(0.0, 0.1)


def register(
    *,
    inputs: Callable[[int, int], Args],
    slice: Callable[[Args, int], Args],
    heads: tuple[str, ...],
    other_head: Callable[[], nn.Module],
    select: Callable[[Any], Tensor] = lambda output: output,
    random_in_training: bool = False,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Enter the decorated function, which makes a model, under its name."""

    def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        BACKBONES[make.__name__] = TinyBackbone(
            name=make.__name__,
            make=make,
            inputs=inputs,
            slice=slice,
            select=select,
            heads=heads,
            other_head=(heads[-1], other_head),
            random_in_training=random_in_training,
        )
        return make

    return enter


# ---- inputs ----------------------------------------------------------------------------------------------------------


def clouds(batch: int, seed: int) -> Args:
    """Points (b, n, 3)."""
    return (torch.rand(batch, POINTS, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1,)


def labels(batch: int, seed: int) -> Tensor:
    """One-hot object labels (b, LABELS)."""
    return torch.eye(LABELS)[torch.randint(LABELS, (batch,), generator=torch.Generator().manual_seed(seed))]


def labelled_clouds(batch: int, seed: int) -> Args:
    return (*clouds(batch, seed), labels(batch, seed))


def packed_clouds(batch: int, seed: int) -> Args:
    """(features, positions (b * n, 3), sample numbers (b * n)), as torch-pointcloud wants them."""
    return None, clouds(batch, seed)[0].flatten(0, 1), torch.arange(batch).repeat_interleave(POINTS)


def packed_labelled_clouds(batch: int, seed: int) -> Args:
    return (*packed_clouds(batch, seed), labels(batch, seed))


def slice_batch(args: Args, i: int) -> Args:
    return tuple(value[i : i + 1] for value in args)


def slice_packed(args: Args, i: int) -> Args:
    features, positions, samples, *rest = args
    own = samples == i
    return features, positions[own], samples[own] - i, *(value[i : i + 1] for value in rest)


# ---- this library's --------------------------------------------------------------------------------------------------


def _transformer(**options: Any) -> PointTransformer:
    sizes = {"trans_dim": WIDTH, "depth": 2, "num_heads": 4, "num_group": 16, "group_size": 8, "encoder_dims": WIDTH}
    return PointTransformer(**{**sizes, "cls_dim": CLASSES, **options})


def _linear_head(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(width, 7))


_classification: dict[str, Any] = {"inputs": clouds, "slice": slice_batch, "heads": ("cls_head_finetune",)}


@register(**_classification, other_head=_linear_head(2 * WIDTH))
def point_mae() -> nn.Module:
    return _transformer(depth=3)


@register(**_classification, other_head=_linear_head(2 * WIDTH))
def point_bert() -> nn.Module:
    return _transformer(encoder_dims=16, num_group=12, head_norm=False)


@register(**_classification, other_head=_linear_head(2 * WIDTH))
def pcp_mae() -> nn.Module:
    return _transformer(pos_features="sine")


@register(**_classification, other_head=_linear_head(4 * WIDTH))
def recon() -> nn.Module:
    return _transformer(prefix_tokens=("cls", "img", "text"))


@register(
    inputs=labelled_clouds,
    slice=slice_batch,
    heads=("label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3"),
    other_head=lambda: nn.Conv1d(256, 7, 1),
)
def part_seg() -> nn.Module:
    return PointTransformerPartSeg(
        trans_dim=WIDTH,
        depth=3,
        num_heads=4,
        num_group=16,
        group_size=8,
        encoder_dims=WIDTH,
        cls_dim=CLASSES,
        num_labels=LABELS,
        taps=(0, 2),
    )


# ---- torch-pointcloud's ----------------------------------------------------------------------------------------------

_tp_sizes: dict[str, Any] = {
    "in_channels": 0,
    "num_classes": CLASSES,
    "embed_dim": WIDTH,
    "num_heads": 4,
    "num_groups": 16,
    "group_size": 8,
    "encoder_local_channels": (16, 32),
    "encoder_global_channels": (32,),
    "pos_embed_channels": (16,),
}


@register(
    inputs=packed_clouds,
    slice=slice_packed,
    heads=("head",),
    other_head=_linear_head(2 * WIDTH),
    random_in_training=True,
)
def torch_pointcloud() -> nn.Module:
    supply_pyg_operators()
    from torch_pointcloud.models.point_mae import PointMAEClassification

    return PointMAEClassification(**_tp_sizes, depth=2)


@register(
    inputs=packed_labelled_clouds,
    slice=slice_packed,
    select=lambda output: output.unflatten(0, (-1, POINTS)),
    heads=("label_conv", "propagation_0", "head"),
    other_head=lambda: nn.Sequential(nn.Linear(1024 + 6 * WIDTH + 64, 7)),
    random_in_training=True,
)
def torch_pointcloud_part_seg() -> nn.Module:
    supply_pyg_operators()
    from torch_pointcloud.models.point_mae import PointMAEPartSegmentation

    return PointMAEPartSegmentation(**_tp_sizes, num_categories=LABELS, depth=12)


def supply_pyg_operators() -> None:
    """torch_geometric's `fps` and `knn` need pyg-lib, which PyPI lacks: put in their places what serves here."""
    import torch_geometric.nn.pool

    torch_geometric.nn.pool.fps = fps
    torch_geometric.nn.pool.knn = knn


def fps(
    src: Tensor,
    batch: Tensor | None = None,
    ratio: float = 0.5,
    random_start: bool = True,
    batch_size: int | None = None,
) -> Tensor:
    """Indices of ceil(ratio * n) farthest points of each sample, in order of choice; the first may be random."""
    batch = torch.zeros(len(src), dtype=torch.int64) if batch is None else batch
    chosen = []
    for sample in range(int(batch.max()) + 1 if batch_size is None else batch_size):
        own = (batch == sample).nonzero()[:, 0]
        first = int(torch.randint(len(own), ())) if random_start else 0
        order = torch.cat([own[first : first + 1], own[:first], own[first + 1 :]])
        count = -int(-ratio * len(own) // 1)
        chosen.append(order[geometry.farthest_point_sample(src[order][None], count)[0]])
    return torch.cat(chosen)


def knn(
    x: Tensor, y: Tensor, k: int, batch_x: Tensor | None = None, batch_y: Tensor | None = None, **options: Any
) -> Tensor:
    """(query, neighbour) index pairs (2, m * k) of the k points of x nearest to each point of y, nearest first."""
    batch_x = torch.zeros(len(x), dtype=torch.int64) if batch_x is None else batch_x
    batch_y = torch.zeros(len(y), dtype=torch.int64) if batch_y is None else batch_y
    distance = (y[:, None] - x[None]).square().sum(2).masked_fill(batch_y[:, None] != batch_x[None], float("inf"))
    near = distance.topk(k, largest=False).indices
    return torch.stack([torch.arange(len(y)).repeat_interleave(k), near.flatten()])


# ---- one written here ------------------------------------------------------------------------------------------------


class RandomGroup(Group):
    """Grouping that begins at a random point while training."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(points.shape[1]) if self.training else torch.arange(points.shape[1])
        return super().forward(points[:, order])


class CompactAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        mixed: Tensor = self.out((self.q(tokens) @ self.k(tokens).mT * 0.2 + mask).softmax(2) @ self.v(tokens))
        return mixed


class CompactBlock(nn.Module):
    def __init__(self, width: int, again: bool, reentrant: bool) -> None:
        super().__init__()
        self.norm_a = nn.LayerNorm(width)
        self.attention = CompactAttention(width)
        self.norm_b = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2 * width, width))
        self.again = again
        self.reentrant = reentrant

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.again and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.inside, tokens, mask, use_reentrant=self.reentrant)
            return out
        return self.inside(tokens, mask)

    def inside(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm_a(tokens), mask)
        out: Tensor = tokens + self.mlp(self.norm_b(tokens))
        return out


class CompactEncoder(nn.Module):
    def __init__(self, width: int, depth: int, again: Checkpointing | None, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CompactBlock(width, again == "inside", reentrant) for _ in range(depth))
        self.again = again
        self.reentrant = reentrant

    def forward(self, tokens: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
        again = self.again == "block" and torch.is_grad_enabled()
        for block in self.blocks:
            args = (block, tokens + pos, mask)
            tokens = checkpoint(*args, use_reentrant=self.reentrant) if again else block(*args[1:])
        return tokens


class Compact(nn.Module):
    """A small classifier of clouds (b, n, 3) whose blocks take an attention mask and may be gradient-checkpointed."""

    def __init__(self, *, again: Checkpointing | None = None, reentrant: bool = False, spare: bool = False) -> None:
        super().__init__()
        self.group_divider = RandomGroup(16, 8)
        self.encoder = Encoder(WIDTH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Sequential(nn.Linear(3, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = CompactEncoder(WIDTH, 3, again, reentrant)
        self.norm = nn.LayerNorm(WIDTH)
        self.cls_head_finetune = nn.Sequential(nn.Linear(2 * WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.again = again
        self.reentrant = reentrant
        self.layout = "right"
        """What is wrong with the tokens that the blocks get, for tests that want it so."""
        if spare:
            self.spare = nn.Linear(4, 4)
            self.spares = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, points: Tensor) -> Tensor:
        neighborhood, center = self.group_divider(points)
        tokens = torch.cat([self.cls_token.expand(len(points), -1, -1), self.encoder(neighborhood)], dim=1)
        pos = torch.cat([self.cls_pos.expand(len(points), -1, -1), self.pos_embed(center)], dim=1)
        tokens, pos = self._spoil(tokens), self._spoil(pos)
        count = torch.arange(tokens.shape[1])
        mask = (count[:, None] - count).abs() * -0.02
        if self.again is not None and self.reentrant and torch.is_grad_enabled() and not tokens.requires_grad:
            tokens = tokens.detach().requires_grad_()  # this kind of checkpointing needs an input with a gradient
        if self.again == "container" and torch.is_grad_enabled():
            tokens = checkpoint(self.blocks, tokens, pos, mask, use_reentrant=self.reentrant)
        else:
            tokens = self.blocks(tokens, pos, mask)
        tokens = self.norm(tokens)
        logits: Tensor = self.cls_head_finetune(torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], dim=1))
        return logits

    def _spoil(self, tokens: Tensor) -> Tensor:
        if self.layout == "one token more":
            return torch.cat([tokens, tokens[:, :1]], dim=1)
        if self.layout == "sequence first":
            return tokens.transpose(0, 1)
        if self.layout == "flat":
            return tokens.flatten(0, 1)
        return tokens


@register(**_classification, other_head=_linear_head(2 * WIDTH), random_in_training=True)
def compact() -> nn.Module:
    return Compact()


def compact_like(plain: nn.Module, **options: Any) -> Compact:
    """A `Compact` of other options with the values of a plain one."""
    model = Compact(**options)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model.eval()
