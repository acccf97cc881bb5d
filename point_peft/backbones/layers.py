"""The pieces of a point transformer: grouping, patch encoder, attention, block.

The names of their tensors are those of public checkpoints.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft import geometry
from point_peft.errors import PointPeftError

# Numbers in the widest tensor that the encoder works on at a time: on a CPU as many as its caches hold, 4 MB.
CHUNK_ELEMENTS = 2**20


class Group(nn.Module):
    """Split clouds (b, n, 3) into groups around farthest points; no parameters.

    Returns the neighbourhoods (b, g, k, 3), each centred on its centre, and the centres (b, g, 3).
    """

    def __init__(self, num_group: int, group_size: int) -> None:
        super().__init__()
        self.num_group = num_group
        self.group_size = group_size

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        neighborhood, center, _ = group(points, self.num_group, self.group_size)
        return neighborhood, center


class FeatureGroup(nn.Module):
    """Split clouds (b, n, 3) with features (b, n, f), such as normals or colours, into groups as `Group` does.

    In the neighbourhoods (b, g, k, 3 + f) the features come behind the coordinates.
    """

    def __init__(self, num_group: int, group_size: int) -> None:
        super().__init__()
        self.num_group = num_group
        self.group_size = group_size

    def forward(self, points: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        neighborhood, center, index = group(points, self.num_group, self.group_size)
        return torch.cat([neighborhood, geometry.gather(features, index)], dim=3), center


def group(points: Tensor, num_group: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split clouds (b, n, 3) into groups around farthest points.

    Returns the neighbourhoods (b, g, k, 3), each centred on its centre, the centres (b, g, 3) and the indices
    (b, g, k) of the neighbours among the points, nearest first. Raises where there are no clouds or too few points.
    """
    if points.ndim != 3 or points.shape[2] != 3:
        raise PointPeftError(f"points must be (b, n, 3), got {tuple(points.shape)}")
    if points.shape[0] == 0 or points.shape[1] < max(num_group, group_size):
        raise PointPeftError(
            f"points (b, n, 3) are {tuple(points.shape)}; allowed: one cloud or more, each of at least "
            f"{max(num_group, group_size)} points, because this backbone makes {num_group} groups of {group_size}"
        )
    center = geometry.gather(points, geometry.farthest_point_sample(points, num_group))
    index = geometry.knn(center, points, group_size)
    return geometry.gather(points, index) - center[:, :, None], center, index


class Encoder(nn.Module):
    """A small PointNet that turns each neighbourhood (b, g, k, inputs) into one token (b, g, c).

    `widths` are those inside: of the first layer, of the features that the maximum is taken over, and of the layer
    after it. The weights of `second_conv.0` are read in two halves, so that module itself is not called. On a CPU, in
    eval mode, the layers run for some groups at a time.
    """

    def __init__(self, channels: int, *, inputs: int = 3, widths: tuple[int, int, int] = (128, 256, 512)) -> None:
        super().__init__()
        first, local, second = widths
        self.first_conv = nn.Sequential(
            nn.Conv1d(inputs, first, 1), nn.BatchNorm1d(first), nn.ReLU(inplace=True), nn.Conv1d(first, local, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(2 * local, second, 1),
            nn.BatchNorm1d(second),
            nn.ReLU(inplace=True),
            nn.Conv1d(second, channels, 1),
        )

    def forward(self, neighborhood: Tensor) -> Tensor:
        b, g, _, _ = neighborhood.shape
        groups = rearrange(neighborhood, "b g k c -> (b g) k c")
        folds = self._folds
        tokens_of = self._folded() if folds else self._layer_by_layer
        chunks = self._chunks(groups) if folds or not self.training else [groups]
        tokens = torch.cat([tokens_of(part) for part in chunks])
        return rearrange(tokens, "(b g) c -> b g c", b=b, g=g)

    def _layer_by_layer(self, groups: Tensor) -> Tensor:
        """One token (bg, c) for each of the groups (bg, k, inputs)."""
        bg, k, _ = groups.shape
        # All points in one row: the convolutions have width one, and a long row is faster than many short ones.
        local = self.first_conv(rearrange(groups, "bg k c -> 1 c (bg k)"))
        whole = reduce(local, "1 c (bg k) -> 1 c bg", "max", bg=bg, k=k)
        # The second part sees [maximum of the group ; point]. What the maximum adds is the same for all points of a
        # group, so that half of the first convolution runs once a group.
        first, *rest = self.second_conv.children()
        assert isinstance(first, nn.Conv1d)
        of_whole, of_local = torch.chunk(first.weight, 2, dim=1)
        points = rearrange(nn.functional.conv1d(local, of_local, first.bias), "1 c (bg k) -> 1 c bg k", bg=bg, k=k)
        tokens = rearrange(points.add_(nn.functional.conv1d(whole, of_whole)[..., None]), "1 c bg k -> 1 c (bg k)")
        for layer in rest:
            tokens = layer(tokens)
        pooled: Tensor = reduce(tokens, "1 c (bg k) -> bg c", "max", bg=bg, k=k)
        return pooled

    @property
    def _folds(self) -> bool:
        """True while a model is trained and the statistics of this part of it are held, as those of a frozen one.

        In eval mode all layers run one by one: rounding is then the same whether the encoder is frozen or not. And so
        they do where somebody listens to them; what holds the statistics does so before a norm.
        """
        norms = self.first_conv[1], self.second_conv[1]
        layers = (*self.first_conv.modules(), *self.second_conv.modules())
        heard = any(m._forward_hooks or (m._forward_pre_hooks and m not in norms) for m in layers)
        held = self.training and not any(norm.training for norm in norms)
        return held and not heard and not torch.compiler.is_compiling()

    def _chunks(self, groups: Tensor) -> Sequence[Tensor]:
        """Some of the groups (bg, k, inputs) at a time, where none depends on another.

        What is traced may be run on another number of groups.
        """
        batch_statistics = any(norm.training for norm in (self.first_conv[1], self.second_conv[1]))
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if batch_statistics or traced or not groups.is_cpu:
            return [groups]
        assert isinstance(self.second_conv[0], nn.Conv1d)
        return torch.split(groups, max(1, CHUNK_ELEMENTS // (groups.shape[1] * self.second_conv[0].out_channels)))

    def _folded(self) -> Callable[[Tensor], Tensor]:
        """`_layer_by_layer` with the norms folded into the weights, once for all chunks."""
        one, shift_one = _linear(self.first_conv[0], self.first_conv[1])
        two, shift_two = _linear(self.first_conv[3])
        three, shift_three = _linear(self.second_conv[0], self.second_conv[1])
        four, shift_four = _linear(self.second_conv[3])
        of_whole, of_local = torch.chunk(three, 2, dim=1)

        def tokens_of(groups: Tensor) -> Tensor:
            k = groups.shape[1]
            points = rearrange(groups, "bg k c -> (bg k) c")
            local = torch.addmm(shift_two, torch.addmm(shift_one, points, one.T).relu_(), two.T)
            of_group = torch.addmm(shift_three, reduce(local, "(bg k) c -> bg c", "max", k=k), of_whole.T)
            tokens = rearrange(local @ of_local.T, "(bg k) c -> bg k c", k=k).add_(of_group[:, None]).relu_()
            tokens = torch.addmm(shift_four, rearrange(tokens, "bg k c -> (bg k) c"), four.T)
            pooled: Tensor = reduce(tokens, "(bg k) c -> bg c", "max", k=k)
            return pooled

        return tokens_of


def _linear(conv: nn.Module, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution of width one, with the norm behind it, whose statistics are held."""
    assert isinstance(conv, nn.Conv1d) and conv.bias is not None
    weight = rearrange(conv.weight, "o i 1 -> o i")
    if norm is None:
        return weight, conv.bias
    assert (
        isinstance(norm, nn.BatchNorm1d | nn.SyncBatchNorm)
        and norm.running_var is not None
        and norm.running_mean is not None
    )
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return weight * gain[:, None], (conv.bias - norm.running_mean) * gain + norm.bias


class DropPath(nn.Module):
    """Drop a residual branch (b, ...) for whole samples while training, and scale up the others to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        mask = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep)
        return branch * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class Attention(nn.Module):
    """Multi-head self-attention over tokens (b, l, c); the fused projection has no bias.

    In a mask (b, l, l), boolean or of numbers, what is not zero is ignored: query i does not see key j where [i, j] is.
    A query must see something.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        # Three parts of the channels: their gradients are put together in one copy, those of a new first axis in two.
        parts = self.qkv(tokens).chunk(3, dim=2)
        q, k, v = (rearrange(part, "b l (h c) -> b h l c", h=self.num_heads) for part in parts)
        seen = None if mask is None else mask.logical_not()[:, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out: Tensor = self.proj(rearrange(mixed, "b h l c -> b l (h c)"))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to each token of (b, l, c)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(tokens)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block on tokens (b, l, c), with or without an attention mask (b, l, l)."""

    def __init__(self, dim: int, num_heads: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), mask))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens


def run_block(block: nn.Module, *args: Tensor | None, again: bool) -> Tensor:
    """The output of a block; with `again` nothing within it is kept for the backward pass, which runs it once more."""
    output: Tensor = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
    return output


class TransformerEncoder(nn.Module):
    """A chain of blocks; the positions (b, l, c) are added to the tokens (b, l, c) again before every block."""

    def __init__(self, dim: int, depth: int, num_heads: int, drop_path_rate: float) -> None:
        super().__init__()
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, num_heads, rate) for rate in rates)
        self.grad_checkpointing = False

    def forward(self, tokens: Tensor, pos: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """The tokens as they are after each of the blocks numbered in `taps`, in the order of the blocks."""
        tapped = []
        for i, block in enumerate(self.blocks):
            tokens = run_block(block, tokens + pos, again=self.grad_checkpointing)
            if i in taps:
                tapped.append(tokens)
        return tapped


def group_divider(num_group: int, group_size: int, in_channels: int) -> Group | FeatureGroup:
    """The grouping of points with `in_channels` values each; what `split_features` gives is its input."""
    if in_channels < 3:
        raise PointPeftError(f"in_channels is {in_channels}; allowed: 3 or more, the coordinates and then the features")
    return Group(num_group, group_size) if in_channels == 3 else FeatureGroup(num_group, group_size)


def split_features(points: Tensor, in_channels: int) -> tuple[Tensor, ...]:
    """The coordinates (b, n, 3) of points (b, n, 3 + f), and where there are any their features (b, n, f)."""
    if points.ndim != 3 or points.shape[2] != in_channels:
        raise PointPeftError(
            f"points must be (b, n, {in_channels}), got {tuple(points.shape)}: in_channels={in_channels} says how many "
            "values a point has, first its coordinates"
        )
    return (points,) if in_channels == 3 else (points[..., :3], points[..., 3:])


def sine_features(center: Tensor, channels: int) -> Tensor:
    """Sines and cosines (b, g, channels) of coordinates (b, g, 3): sin x, cos x, sin y, cos y, sin z, cos z.

    A sixth of the channels each; the frequencies fall geometrically from 1 towards 1/10000.
    """
    count = channels // 6
    frequency = 10000.0 ** -(torch.arange(count, device=center.device, dtype=torch.float32) / count)
    angle = center.float()[..., None] * frequency
    features = rearrange([angle.sin(), angle.cos()], "wave b g xyz f -> b g (xyz wave f)")
    return features.to(center.dtype)


def position_layers(pos_features: str, channels: int) -> nn.Sequential:
    """The positional embedding, which reads coordinates (b, g, 3), or as many sine features as it has channels."""
    if pos_features not in ("xyz", "sine"):
        raise PointPeftError(f"pos_features must be 'xyz' or 'sine', got {pos_features!r}")
    if pos_features == "sine" and channels % 6:
        raise PointPeftError(f"pos_features='sine' needs a trans_dim divisible by 6, got {channels}")
    read, hidden = (3, 128) if pos_features == "xyz" else (channels, channels)
    return nn.Sequential(nn.Linear(read, hidden), nn.GELU(), nn.Linear(hidden, channels))


def init_weights(module: nn.Module) -> None:
    """The usual start of a vision transformer, for `model.apply`: narrow normal linear weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
