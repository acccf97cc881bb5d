"""What the structure of known families of models does not tell, as data: one `Preset` a family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from point_peft.anatomy import (
    Anatomy,
    Block,
    Layout,
    PrefixParameter,
    Read,
    Stage,
    Steps,
    Tap,
    block_width,
    find_blocks,
    linear_shape,
    prefix_rows,
    stage_groups,
)


@dataclass(frozen=True, kw_only=True)
class StagePreset:
    """One or more stages of a family.

    In paths, `{stage}` is the stage's number, `{first}` its first block and `{above}` what holds the list of blocks.
    """

    blocks: str
    """A regular expression for the paths of the blocks."""
    coordinates: Tap
    embedding: str | None = None
    """A positional embedding. If it is made from coordinates, it gets them in the order of the tokens, and they are
    seen there."""
    samples: tuple[Tap, ...] = ()
    """The last whose module exists counts."""
    points: Tap | None = None
    patch_tokens: tuple[str, ...] = ()
    """Modules that make the patch embedding; those that exist run one after another, the output of the last is it."""
    neighbourhoods: bool = False
    """Whether the first of them gets nothing but neighbourhoods (b, g, k, 3)."""
    layout: Layout = "bgc"
    tokens: Steps = (0,)
    outputs: tuple[Steps, ...] = ((),)
    position: Literal["every_block", "once"] = "every_block"
    masks: tuple[Steps, ...] = ()
    mlp_norm: str | None = None
    """The norm ahead of the MLP in each block, where it is not the second of the block's own."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A family of models, told by modules that it has and has not. Paths that a model lacks are left out.

    The modules may lie under a common prefix, as in a model that wraps the backbone.
    """

    name: str
    requires: tuple[str, ...]
    """Modules that a model must have to be of this family."""
    absent: tuple[str, ...] = ()
    stages: tuple[StagePreset, ...]
    stem: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    """Parameters of the prefix tokens, in the order of their rows."""
    positions: tuple[str, ...] = ()
    """Parameters of their positions, in the order of their rows."""
    final_norms: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    patches_read: bool = True
    """Whether the heads of models of this family read the patch tokens, and not the prefix tokens alone."""
    reads: str | None = None
    """A regular expression for modules that are not called: their parent reads their weights."""


_PART_SEGMENTATION = ("label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3")
_HIERARCHICAL_PARTS = (
    "label_conv",
    *(f"propagations.{level}" for level in range(3)),
    "convs1",
    "bns1",
    "convs2",
    "bns2",
    "convs3",
    "bns3",
    "convs4",
)
_GROUPED = Tap(module="group_divider", side="output", steps=(1,))
_CLOUD = Tap(module="group_divider", side="input")
_BESIDE = Tap(module="{first}", side="input", steps=(1,))
_GRAPH_ENCODER = StagePreset(
    blocks=r"encoder\.blocks\.\d+\.blocks\.\d+",
    coordinates=_BESIDE,
    samples=(
        Tap(module="{above}", side="input", steps=(2,)),
        Tap(module="{above}.downsample", side="output", steps=(2,)),
    ),
    layout="packed",
)
_SCENE_HEADS = ("seg_head", "cls_head")
_EMBEDDED = Tap(module="pos_embed", side="input")

PRESETS: tuple[Preset, ...] = (
    # Point-MAE, Point-BERT, ACT, PCP-MAE, ReCon with the official names; classification and part segmentation.
    Preset(
        name="Point-MAE family",
        requires=("blocks.blocks.0", "group_divider", "encoder", "pos_embed", "norm"),
        absent=("h_encoder", "generator_blocks"),
        stages=(
            StagePreset(
                blocks=r"blocks\.blocks\.\d+",
                coordinates=_GROUPED,
                points=_CLOUD,
                embedding="pos_embed",
                patch_tokens=("encoder", "reduce_dim"),
                neighbourhoods=True,
            ),
        ),
        stem=("group_divider", "encoder", "reduce_dim"),
        tokens=("cls_token", "img_token", "text_token"),
        positions=("cls_pos", "img_pos", "text_pos"),
        final_norms=("norm",),
        heads=(
            "cls_head_finetune",
            "label_conv",
            "propagation_0",
            "convs1",
            "bns1",
            "convs2",
            "bns2",
            "convs3",
            "convs1_cls",
            "bns1_cls",
            "convs2_cls",
            "bns2_cls",
            "convs3_cls",
        ),
    ),
    # The encoder gets sequence-first tokens [sos, cls, patches] with a causal mask; the generator is not the backbone.
    Preset(
        name="PointGPT",
        requires=("blocks.layers.0", "blocks.ln_f", "group_divider", "encoder", "pos_embed"),
        stages=(
            StagePreset(
                blocks=r"blocks\.layers\.\d+",
                coordinates=_GROUPED,
                points=_CLOUD,
                patch_tokens=("encoder",),
                neighbourhoods=True,
                layout="gbc",
                masks=((1,),),
            ),
        ),
        stem=("group_divider", "encoder"),
        # As in the original, the positions of the two tokens are exchanged.
        tokens=("blocks.sos", "cls_token"),
        positions=("cls_pos", "sos_pos"),
        final_norms=("blocks.ln_f",),
        heads=("blocks.cls_norm", "blocks.cls_head_finetune", "cls_norm", "cls_head_finetune", *_PART_SEGMENTATION),
    ),
    # Point-M2AE and I2P-MAE: three stages of their own widths, without prefix tokens.
    Preset(
        name="Point-M2AE family",
        requires=("h_encoder.encoder_blocks.0.blocks.0", "group_dividers.0", "h_encoder.token_embed.0"),
        stages=(
            StagePreset(
                blocks=r"h_encoder\.encoder_blocks\.\d+\.blocks\.\d+",
                coordinates=Tap(module="group_dividers.{stage}", side="output", steps=(1,)),
                embedding="h_encoder.encoder_pos_embeds.{stage}",
                points=Tap(module="group_dividers.{stage}", side="input"),
                patch_tokens=("h_encoder.token_embed.{stage}",),
                masks=((1,),),
            ),
        ),
        stem=("group_dividers.0", "group_dividers.1", "group_dividers.2", "h_encoder.token_embed.0"),
        final_norms=("norm", "h_encoder.encoder_norms.2"),
        heads=("h_encoder.encoder_norms.0", "h_encoder.encoder_norms.1", "cls_head_finetune", *_HIERARCHICAL_PARTS),
    ),
    # Uni3D: timm's blocks, called by the model itself; EVA attention reads the weight of its fused projection.
    Preset(
        name="Uni3D",
        requires=("visual.blocks.0", "group_divider", "encoder", "pos_embed", "visual.fc_norm"),
        stages=(
            StagePreset(
                blocks=r"visual\.blocks\.\d+",
                coordinates=_GROUPED,
                points=_CLOUD,
                embedding="pos_embed",
                patch_tokens=("encoder", "encoder2trans"),
                position="once",
            ),
        ),
        stem=("group_divider", "encoder", "encoder2trans"),
        tokens=("cls_token",),
        positions=("cls_pos",),
        final_norms=("visual.norm", "visual.fc_norm"),
        heads=("trans2embed",),
        patches_read=False,
        reads=r"visual\.blocks\.\d+\.attn\.qkv",
    ),
    # openpoints' PointViT.
    Preset(
        name="openpoints PointViT",
        requires=("encoder.blocks.0", "encoder.patch_embed", "encoder.proj", "encoder.pos_embed", "encoder.norm"),
        stages=(
            StagePreset(
                blocks=r"encoder\.blocks\.\d+",
                coordinates=Tap(module="encoder.patch_embed", side="output", steps=(0, 1)),
                embedding="encoder.pos_embed",
                patch_tokens=("encoder.proj",),
            ),
        ),
        stem=("encoder.patch_embed", "encoder.proj"),
        tokens=("encoder.cls_token",),
        positions=("encoder.cls_pos",),
        final_norms=("encoder.norm",),
        heads=("prediction",),
    ),
    # torch-pointcloud's Point-MAE: grouping is a function, what it gives is first seen as the input of pos_embed.
    Preset(
        name="torch-pointcloud Point-MAE",
        requires=("blocks.blocks.0", "encoder", "pos_embed", "norm_f", "head"),
        absent=("group_divider",),
        stages=(
            StagePreset(
                blocks=r"blocks\.blocks\.\d+",
                coordinates=_EMBEDDED,
                embedding="pos_embed",
                patch_tokens=("encoder",),
                neighbourhoods=True,
            ),
        ),
        stem=("encoder",),
        tokens=("cls_token",),
        positions=("cls_pos",),
        final_norms=("norm_f",),
        heads=("label_conv", "propagation_0", "head"),
    ),
    Preset(
        name="torch-pointcloud Point-BERT",
        requires=("encoder.blocks.0", "encoder.encoder", "encoder.reduce_dim", "encoder.pos_embed", "head"),
        stages=(
            StagePreset(
                blocks=r"encoder\.blocks\.\d+",
                coordinates=Tap(module="encoder.pos_embed", side="input"),
                embedding="encoder.pos_embed",
                patch_tokens=("encoder.encoder", "encoder.reduce_dim"),
                neighbourhoods=True,
            ),
        ),
        stem=("encoder.encoder", "encoder.reduce_dim"),
        tokens=("encoder.cls_token",),
        positions=("encoder.cls_pos",),
        final_norms=("encoder.norm",),
        heads=("head",),
    ),
    Preset(
        name="torch-pointcloud PointGPT",
        requires=("blocks.layers.0", "blocks.ln_f", "encoder", "pos_embed", "head"),
        absent=("group_divider",),
        stages=(
            StagePreset(
                blocks=r"blocks\.layers\.\d+",
                coordinates=_EMBEDDED,
                patch_tokens=("encoder",),
                neighbourhoods=True,
                layout="gbc",
                masks=((1,),),
            ),
        ),
        stem=("encoder",),
        tokens=("blocks.sos", "cls_token"),
        positions=("cls_pos", "sos_pos"),
        final_norms=("blocks.ln_f",),
        heads=("cls_norm", "head"),
    ),
    Preset(
        name="torch-pointcloud Point-M2AE",
        requires=("h_encoder.encoder_blocks.0.blocks.0", "h_encoder.encoder_pos_embeds.0", "head"),
        absent=("group_dividers",),
        stages=(
            StagePreset(
                blocks=r"h_encoder\.encoder_blocks\.\d+\.blocks\.\d+",
                coordinates=Tap(module="h_encoder.encoder_pos_embeds.{stage}", side="input"),
                patch_tokens=("h_encoder.token_embed.{stage}",),
                masks=((1,),),
            ),
        ),
        stem=("h_encoder.token_embed.0",),
        final_norms=("norm", "h_encoder.encoder_norms.2"),
        heads=("h_encoder.encoder_norms.0", "h_encoder.encoder_norms.1", *_HIERARCHICAL_PARTS, "head"),
    ),
    # PTv3 and Sonata of Pointcept: a mutable mapping goes from module to module.
    Preset(
        name="PTv3 family",
        requires=("enc.enc0.block0", "embedding"),
        stages=(
            StagePreset(
                blocks=r"(?:enc\.enc|dec\.dec)\d+\.block\d+",
                coordinates=Tap(module="{first}", side="input", steps=(0, "coord")),
                samples=(Tap(module="{first}", side="input", steps=(0, "batch"), else_steps=(0, "offset")),),
                layout="packed",
                tokens=(0, "feat"),
                outputs=(("feat",), ("sparse_conv_feat", "features")),
            ),
        ),
        stem=("embedding",),
        heads=_SCENE_HEADS,
    ),
    # Blocks of PTv1 and PTv2 in their authors' code get [coordinates, features, ends of samples].
    Preset(
        name="PTv1",
        requires=("enc1.1.transformer2", "enc1.0"),
        stages=(
            StagePreset(
                blocks=r"(?:enc|dec)\d+\.\d+",
                coordinates=Tap(module="{first}", side="input", steps=(0, 0)),
                samples=(Tap(module="{first}", side="input", steps=(0, 2)),),
                layout="packed",
                tokens=(0, 1),
                outputs=((1,),),
            ),
        ),
        heads=("cls",),
    ),
    Preset(
        name="PTv2",
        requires=("patch_embed.blocks.blocks.0", "enc_stages.0.blocks.blocks.0"),
        stages=(
            StagePreset(
                blocks=r"(?:patch_embed|enc_stages\.\d+|dec_stages\.\d+)\.blocks\.blocks\.\d+",
                coordinates=Tap(module="{first}", side="input", steps=(0, 0)),
                samples=(Tap(module="{first}", side="input", steps=(0, 2)),),
                layout="packed",
                tokens=(0, 1),
                outputs=((1,),),
            ),
        ),
        heads=_SCENE_HEADS,
    ),
    Preset(
        name="torch-pointcloud PTv3",
        requires=("encoder.blocks.0.blocks.0.cpe_conv", "encoder.stem", "head"),
        stages=(
            StagePreset(
                blocks=r"(?:encoder|decoder)\.blocks\.\d+\.blocks\.\d+",
                coordinates=Tap(module="{first}", side="input", steps=(2,)),
                samples=(Tap(module="{first}", side="input", steps=(3,)),),
                layout="packed",
                outputs=((0,), (1, "features")),
                mlp_norm="norm2",
            ),
        ),
        heads=("head",),
    ),
    Preset(
        name="torch-pointcloud PTv2",
        requires=("encoder.blocks.0.blocks.0.attn.q", "stem", "head"),
        stages=(
            _GRAPH_ENCODER,
            StagePreset(
                blocks=r"decoder\.blocks\.\d+\.blocks\.\d+",
                coordinates=_BESIDE,
                samples=(Tap(module="{above}", side="input", steps=(3,)),),
                layout="packed",
            ),
        ),
        heads=("head",),
    ),
    Preset(
        name="torch-pointcloud PTv1",
        requires=("encoder.blocks.0.blocks.0.transformer", "embeddings", "head"),
        stages=(
            _GRAPH_ENCODER,
            StagePreset(
                blocks=r"decoder\.global_block",
                coordinates=_BESIDE,
                samples=(Tap(module="decoder.global_transition", side="input", steps=(1,)),),
                layout="packed",
            ),
            StagePreset(
                blocks=r"decoder\.blocks\.\d+\.blocks\.\d+",
                coordinates=_BESIDE,
                samples=(Tap(module="{above}.upsample", side="input", steps=(5,)),),
                layout="packed",
            ),
        ),
        heads=("head",),
    ),
)


def prefixes(modules: Mapping[str, nn.Module], preset: Preset) -> list[str]:
    """The prefixes of paths under which a model's modules hold a backbone of this family; "" for the model itself."""
    first = preset.requires[0]
    found = [path.removesuffix(first) for path in modules if path.endswith(first)]
    return [
        prefix
        for prefix in found
        if (not prefix or prefix.endswith("."))
        and all(prefix + other in modules for other in preset.requires)
        and not any(prefix + other in modules for other in preset.absent)
    ]


def from_preset(model: nn.Module, modules: Mapping[str, nn.Module], preset: Preset, prefix: str) -> Anatomy | None:
    """The anatomy of a model, with all its modules, that has a backbone of this family under a prefix."""
    found = find_blocks(modules)
    stages: list[Stage] = []
    for entry in preset.stages:
        pattern = re.compile(re.escape(prefix) + f"(?:{entry.blocks})")
        blocks = [block for path, block in found.items() if pattern.fullmatch(path)]
        groups = stage_groups(model, blocks)
        stages += [_stage(model, modules, entry, prefix, number, group) for number, group in enumerate(groups)]
    if not stages:
        return None
    parameters: list[PrefixParameter] = []
    known = dict(model.named_parameters())
    role: Literal["token", "position"]
    for role, names in (("token", preset.tokens), ("position", preset.positions)):
        row = 0
        for name in names:
            if prefix + name in known:
                parameters.append(PrefixParameter(name=prefix + name, role=role, row=row))
                row += prefix_rows(known[prefix + name])
    rows = sum(prefix_rows(known[parameter.name]) for parameter in parameters if parameter.role == "token")
    heads = [prefix + name for name in preset.heads if prefix + name in modules] + _beside(modules, prefix)
    heads = heads or _unclaimed(modules, preset, prefix, found)
    return Anatomy(
        source=f"preset {preset.name}",
        stages=tuple(replace(stage, prefix_tokens=rows, prompts=stage.layout != "packed") for stage in stages),
        stem=tuple(prefix + path for path in preset.stem if prefix + path in modules),
        prefix_parameters=tuple(parameters),
        final_norms=tuple(prefix + path for path in preset.final_norms if _normalises(modules.get(prefix + path))),
        heads=tuple(heads),
        patches_read=preset.patches_read,
        reads=tuple(
            Read(module=path, reader=path.rpartition(".")[0])
            for path in modules
            if preset.reads is not None and re.fullmatch(re.escape(prefix) + preset.reads, path)
        ),
    )


def _beside(modules: Mapping[str, nn.Module], prefix: str) -> list[str]:
    """The modules with parameters that a model has beside the backbone that it wraps: heads of its own."""
    beside: list[str] = []
    inner = prefix.rstrip(".")
    while inner:
        outer, _, name = inner.rpartition(".")
        beside += [
            f"{outer}.{child}" if outer else child
            for child, module in modules[outer].named_children()
            if child != name and next(module.parameters(), None) is not None
        ]
        inner = outer
    return beside


def _unclaimed(modules: Mapping[str, nn.Module], preset: Preset, prefix: str, blocks: Iterable[str]) -> list[str]:
    """For a head by another name: what a backbone has with parameters that is neither blocks nor what feeds them."""
    embeddings = [entry.embedding for entry in preset.stages if entry.embedding is not None]
    claimed = {name.split(".")[0] for name in (*preset.requires, *preset.stem, *preset.final_norms, *embeddings)}
    return [
        prefix + name
        for name, module in modules[prefix.rstrip(".")].named_children()
        if name not in claimed
        and next(module.parameters(), None) is not None
        and not any(block.startswith(f"{prefix}{name}.") for block in blocks)
    ]


def _normalises(module: nn.Module | None) -> bool:
    """Whether a final norm is there, and not an identity in its place."""
    return module is not None and not isinstance(module, nn.Identity)


def _stage(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    entry: StagePreset,
    prefix: str,
    number: int,
    blocks: tuple[Block, ...],
) -> Stage:
    def path(template: str) -> str:
        first = blocks[0].path
        above = first.rpartition(".")[0].rpartition(".")[0]
        named = template.format(stage=number, first=first, above=above)
        return named if template.startswith(("{first}", "{above}")) else prefix + named

    def tap(entry: Tap) -> Tap:
        return replace(entry, module=path(entry.module))

    where = tap(entry.coordinates)
    embedding = path(entry.embedding) if entry.embedding is not None else None
    if embedding is not None and embedding in modules and _made_from_coordinates(modules[embedding]):
        where = Tap(module=embedding, side="input")
    else:
        embedding = None
    samples = [tap(one) for one in entry.samples if path(one.module) in modules]
    patches = [path(name) for name in entry.patch_tokens if path(name) in modules]
    if entry.mlp_norm is not None:
        blocks = tuple(replace(block, mlp_norm=f"{block.path}.{entry.mlp_norm}") for block in blocks)
    return Stage(
        blocks=blocks,
        width=block_width(model, blocks[0]),
        layout=entry.layout,
        tokens=entry.tokens,
        outputs=entry.outputs,
        coordinates=where,
        samples=samples[-1] if samples else None,
        # Where the grouping is a function, the clouds are what the model gets.
        points=tap(entry.points) if entry.points is not None and path(entry.points.module) in modules else None,
        tokenizer=tuple(patches) if entry.neighbourhoods else (),
        position_embedding=embedding,
        patch_tokens=Tap(module=patches[-1], side="output", steps=()) if patches else None,
        position=entry.position,
        masks=entry.masks,
    )


def _made_from_coordinates(embedding: nn.Module) -> bool:
    """Whether the first layer of a positional embedding reads three channels."""
    shapes = [shape for module in embedding.modules() if (shape := linear_shape(module))]
    return bool(shapes) and shapes[0][1] == 3


def known_anatomy(model: nn.Module) -> Anatomy | None:
    """The anatomy by the first preset that fits, None if none does, or if the model holds two backbones."""
    modules = dict(model.named_modules())
    for preset in PRESETS:
        fitting = (from_preset(model, modules, preset, prefix) for prefix in prefixes(modules, preset))
        found = [anatomy for anatomy in fitting if anatomy is not None]
        if found:
            return found[0] if len(found) == 1 else None
    return None
