"""What the library understands of a backbone: blocks, stages, token layout, coordinates, heads.

The blocks are found by their structure (an attention, a norm and a linear layer outside the attention), names play no
part. What structure does not tell, such as where the token coordinates come from, is data: one `Preset` a family of
models. For a model that no preset describes, `describe` with example inputs traces one forward (see `tracing`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from point_peft.errors import AnatomyError

Layout = Literal["bgc", "gbc"]
"""How the tokens that a block receives are laid out: (b, g, c) or, sequence first, (g, b, c)."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A place where a tensor can be seen while the model runs: a module's n-th input or output."""

    module: str
    side: Literal["input", "output"]
    index: int = 0

    def __str__(self) -> str:
        return f"{self.side} {self.index} of '{self.module}'"


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block; every entry is a module path."""

    path: str
    attention: str
    qkv: tuple[str, ...]
    projection: str | None
    norms: tuple[str, ...]
    mlp: str | None
    mlp_linears: tuple[str, ...]

    @property
    def attention_kind(self) -> str:
        """How query, key and value are made: by one linear layer, by several, or inside nn.MultiheadAttention."""
        return {0: "nn.MultiheadAttention", 1: "one fused projection"}.get(len(self.qkv), "split projections")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Blocks of one width that see the same tokens."""

    blocks: tuple[Block, ...]
    width: int
    layout: Layout = "bgc"
    prefix_tokens: int | None = None
    """Tokens before the patch tokens (CLS and the like); None: the token count less the number of coordinates."""
    coordinates: Tap | None = None
    """Where the coordinates (b, g, 3) of the patch tokens are seen, before the first block."""
    patch_tokens: Tap | None = None
    """Where the patch embedding (b, g, c) is seen, before positions are added."""
    position: Literal["every_block", "once"] = "every_block"
    """Whether the positional embedding is added before every block or before the first only."""


@dataclass(frozen=True, kw_only=True)
class PrefixParameter:
    """A tensor of prefix tokens or of their positions, added to the tokens ahead of the blocks."""

    name: str
    role: Literal["token", "position"]
    row: int
    """The first of the token rows that it stands for."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What a backbone is made of. `str()` gives a readable summary."""

    source: str
    """The preset that supplied what structure does not tell, or `traced`."""
    stages: tuple[Stage, ...]
    stem: tuple[str, ...] = ()
    """Frozen modules ahead of the blocks whose outputs a second pass may reuse: grouping, patch embedding."""
    prefix_parameters: tuple[PrefixParameter, ...] = ()
    final_norms: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all stages in order."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    def stage_of(self, block: Block) -> int:
        """The index of the stage that a block belongs to."""
        return next(index for index, stage in enumerate(self.stages) if block in stage.blocks)

    @property
    def adaptable(self) -> dict[str, str]:
        """What can be adapted how: kind of part -> where it can go."""
        blocks, total = self.blocks, len(self.blocks)
        located = sum(len(stage.blocks) for stage in self.stages if stage.coordinates is not None)
        linears = sum(len(b.qkv) + len(b.mlp_linears) + (b.projection is not None and bool(b.qkv)) for b in blocks)
        prior = "backbone, stem" if self.stages[0].patch_tokens is not None else "backbone"
        return {
            "prompts, geometry": f"{located} of {total} blocks",
            "adapters after the MLP": f"{sum(b.mlp is not None for b in blocks)} of {total} blocks",
            "low-rank updates": f"{linears} linear layers in blocks",
            "prior from": prior if located else "none",
        }

    def __str__(self) -> str:
        lines = [f"backbone known by: {self.source}"]
        for index, stage in enumerate(self.stages):
            first = stage.blocks[0]
            prefix = "as many as exceed the coordinates" if stage.prefix_tokens is None else stage.prefix_tokens
            lines += [
                f"stage {index}: {len(stage.blocks)} blocks '{first.path}' … '{stage.blocks[-1].path}'",
                f"  tokens:      ({', '.join(stage.layout)}), c = {stage.width}, prefix tokens: {prefix}",
                f"  coordinates: {stage.coordinates or 'unknown: no geometry-aware method can be used'}",
                f"  patches:     {stage.patch_tokens or 'unknown'}; position added: {stage.position.replace('_', ' ')}",
                f"  attention:   '{first.attention}', {first.attention_kind} {_list(first.qkv)}",
                f"  projection:  {_list([first.projection])}",
                f"  MLP:         {_list([first.mlp])} with linears {_list(first.mlp_linears)}",
                f"  norms:       {_list(first.norms)}",
            ]
        parameters = [f"{parameter.name} ({parameter.role})" for parameter in self.prefix_parameters]
        lines += [
            f"stem:          {_list(self.stem)}",
            f"prefix:        {', '.join(parameters) or 'none'}",
            f"final norms:   {_list(self.final_norms)}",
            f"heads:         {_list(self.heads)}",
            "can be adapted:",
            *(f"  {kind}: {where}" for kind, where in self.adaptable.items()),
        ]
        return "\n".join(lines)


def _list(names: Sequence[str | None]) -> str:
    return ", ".join(f"'{name}'" for name in names if name) or "none"


# ---- structure -------------------------------------------------------------------------------------------------------


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, None for anything else.

    A linear layer is what has a two-dimensional weight and no children: `nn.Linear`, PyG's `Linear` and the like.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.Bilinear)):
        return None
    return None if any(module.children()) else (weight.shape[0], weight.shape[1])


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: it says so by its class name and has no children."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


def _attentions(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Paths of the attention modules, each with the paths of its query, key and value projections."""
    split = re.compile(r"(lin_|to_|w_?)?(q|k|v|kv|qk|src|dst|query|key|value)(_proj|_lin)?$")
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield path, ()
            continue
        linears = {name: shape for name, child in module.named_children() if (shape := linear_shape(child))}
        fused = [name for name, (out, width) in linears.items() if out == 3 * width]
        if len(fused) == 1 and len(linears) >= 2:
            yield path, (f"{path}.{fused[0]}",)
        elif not fused:
            projections = [name for name in linears if split.match(name)]
            if len(projections) >= 2:
                yield path, tuple(f"{path}.{name}" for name in projections)


def find_blocks(model: nn.Module) -> dict[str, Block]:
    """The transformer blocks of a model by path: the smallest ancestor of an attention with a norm and a linear."""
    modules = dict(model.named_modules())
    blocks: dict[str, Block] = {}
    for attention, qkv in _attentions(model):
        path = attention
        while path:
            path = path.rpartition(".")[0]
            outside = {
                name: module
                for name, module in modules.items()
                if name.startswith(path + "." if path else "") and not (name + ".").startswith(attention + ".")
            }
            norms = tuple(name for name, module in outside.items() if is_norm(module))
            linears = tuple(name for name, module in outside.items() if linear_shape(module))
            if norms and linears:
                break
        else:
            continue
        if not path or path in blocks:
            continue
        # nn.MultiheadAttention reads the weights of its projection and does not call it.
        called = not isinstance(modules[attention], nn.MultiheadAttention)
        inside = [
            name for name in modules if called and name.startswith(attention + ".") and linear_shape(modules[name])
        ]
        projection = [name for name in inside if name not in qkv]
        children = {f"{path}.{name}" for name, _ in modules[path].named_children()}
        holders = [name for name in children if any(linear.startswith(name + ".") for linear in linears)]
        blocks[path] = Block(
            path=path,
            attention=attention,
            qkv=qkv,
            projection=projection[0] if len(projection) == 1 else None,
            norms=tuple(name for name in norms if name in children),
            mlp=holders[0] if len(holders) == 1 else None,
            mlp_linears=tuple(name for name in linears if len(holders) == 1 and name.startswith(holders[0] + ".")),
        )
    # A block inside another block's attention search is the container of several blocks, not a block.
    return {path: b for path, b in blocks.items() if not any(other.startswith(path + ".") for other in blocks)}


def block_width(model: nn.Module, block: Block) -> int:
    """The number of channels c of a block's tokens, read from its norms."""
    for path in block.norms:
        weight = model.get_submodule(path)._parameters.get("weight")
        if weight is not None:
            return weight.shape[0]
    raise AnatomyError(f"cannot tell the token width of block '{block.path}': none of its norms has a weight")


# ---- presets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What the structure of a family of models does not tell. Paths that a model lacks are left out."""

    name: str
    requires: tuple[str, ...]
    """Modules that a model must have to be of this family."""
    absent: tuple[str, ...] = ()
    blocks: str
    """A regular expression for the paths of the blocks."""
    coordinates: Tap
    patch_tokens: tuple[str, ...]
    """Modules whose output is the patch embedding; the last that exists counts."""
    stem: tuple[str, ...]
    tokens: tuple[str, ...]
    positions: tuple[str, ...]
    final_norms: tuple[str, ...]
    heads: tuple[str, ...]
    layout: Layout = "bgc"
    position: Literal["every_block", "once"] = "every_block"


_PART_SEGMENTATION = ("label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3")

PRESETS: tuple[Preset, ...] = (
    # Point-MAE, Point-BERT, ACT, PCP-MAE, ReCon with the official names; classification and part segmentation.
    Preset(
        name="Point-MAE family",
        requires=("group_divider", "encoder", "pos_embed", "blocks.blocks.0", "norm"),
        absent=("h_encoder", "generator_blocks"),
        blocks=r"blocks\.blocks\.\d+",
        coordinates=Tap(module="group_divider", side="output", index=1),
        patch_tokens=("encoder", "reduce_dim"),
        stem=("group_divider", "encoder", "reduce_dim"),
        tokens=("cls_token", "img_token", "text_token"),
        positions=("cls_pos", "img_pos", "text_pos"),
        final_norms=("norm",),
        heads=("cls_head_finetune", *_PART_SEGMENTATION),
    ),
    # torch-pointcloud's Point-MAE and Point-BERT: grouping is a function, seen first as the input of pos_embed.
    Preset(
        name="torch-pointcloud ViT",
        requires=("encoder", "pos_embed", "blocks.blocks.0", "norm_f", "head"),
        absent=("group_divider",),
        blocks=r"blocks\.blocks\.\d+",
        coordinates=Tap(module="pos_embed", side="input", index=0),
        patch_tokens=("encoder", "reduce_dim"),
        stem=("encoder", "reduce_dim"),
        tokens=("cls_token",),
        positions=("cls_pos",),
        final_norms=("norm_f",),
        heads=("label_conv", "propagation_0", "head"),
    ),
)


def from_preset(model: nn.Module, preset: Preset) -> Anatomy | None:
    """The anatomy of a model of this family, None if the model is not of it."""
    modules = dict(model.named_modules())
    fits = all(path in modules for path in preset.requires) and not any(path in modules for path in preset.absent)
    found = find_blocks(model)
    blocks = [block for path, block in found.items() if re.fullmatch(preset.blocks, path)]
    if not fits or not blocks:
        return None
    parameters: list[PrefixParameter] = []
    role: Literal["token", "position"]
    for role, names in (("token", preset.tokens), ("position", preset.positions)):
        row = 0
        for name in names:
            tensor = dict(model.named_parameters(recurse=False)).get(name)
            if tensor is not None:
                parameters.append(PrefixParameter(name=name, role=role, row=row))
                row += prefix_rows(tensor)
    prefix = sum(prefix_rows(model.get_parameter(p.name)) for p in parameters if p.role == "token")
    patches = [path for path in preset.patch_tokens if path in modules]
    return Anatomy(
        source=f"preset {preset.name}",
        stages=(
            Stage(
                blocks=tuple(blocks),
                width=block_width(model, blocks[0]),
                layout=preset.layout,
                prefix_tokens=prefix,
                coordinates=preset.coordinates,
                patch_tokens=Tap(module=patches[-1], side="output") if patches else None,
                position=preset.position,
            ),
        ),
        stem=tuple(path for path in preset.stem if path in modules),
        prefix_parameters=tuple(parameters),
        final_norms=tuple(path for path in preset.final_norms if path in modules),
        heads=tuple(path for path in preset.heads if path in modules),
    )


def prefix_rows(tensor: Tensor) -> int:
    """How many token rows a prefix tensor (1, rows, c), (rows, c) or (c,) stands for."""
    return tensor.numel() // tensor.shape[-1]


def known_anatomy(model: nn.Module) -> Anatomy | None:
    """The anatomy by the first preset that fits, None if none does."""
    for preset in PRESETS:
        anatomy = from_preset(model, preset)
        if anatomy is not None:
            return anatomy
    return None
