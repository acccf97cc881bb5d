"""Families of models, as data: a `Preset` each for what structure does not tell; a variant says what differs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from point_peft.anatomy.description import Layout, Steps, Tap


@dataclass(frozen=True, kw_only=True)
class StagePreset:
    """One or more stages of a family.

    In paths, `{stage}` is the stage's number, `{first}` its first block and `{above}` what holds the list of blocks.
    """

    blocks: str
    """A regular expression for the paths of the blocks."""
    coordinates: Tap | None = None
    dropped: int = 0
    unknown: str = ""
    """The reason why there are no coordinates."""
    embedding: str | None = None
    """A positional embedding. If it is made from coordinates, it gets them in the order of the tokens, and they are
    seen there."""
    samples: tuple[Tap, ...] = ()
    """The last whose module exists counts."""
    points: Tap | None = None
    patch_tokens: tuple[str, ...] = ()
    """Modules that make the patch embedding; those that exist run one after another, the output of the last is it."""
    neighbourhoods: bool = False
    """True if the first of them gets nothing but neighbourhoods (b, g, k, 3)."""
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
    encoder: str = ""
    """A regular expression for further modules that a pre-training checkpoint of the family fills, such as its decoder.
    What else has parameters, blocks, stem, embeddings and final norms apart, is a head."""
    patches_read: bool = True
    """True if the heads of models of this family read the patch tokens, and not the prefix tokens alone."""
    reads: str | None = None
    """A regular expression for modules that may not be called, but their weights read by what holds them."""


def variant(preset: Preset, *, stage: Mapping[str, Any], **differs: Any) -> Preset:
    """A preset of one stage with other fields, and with other fields of its stage."""
    return replace(preset, stages=(replace(preset.stages[0], **stage),), **differs)


def _given(module: str, *steps: int | str, else_steps: Steps = ()) -> Tap:
    return Tap(module=module, side="input", steps=steps, else_steps=else_steps)


def _made(module: str, *steps: int | str) -> Tap:
    return Tap(module=module, side="output", steps=steps)


def _on_graphs(blocks: str, *samples: Tap) -> StagePreset:
    """A stage of torch-pointcloud's blocks on graphs of packed points."""
    return StagePreset(blocks=blocks, coordinates=_given("{first}", 1), samples=samples, layout="packed")


_GRAPH_ENCODER = _on_graphs(r"encoder\.blocks\.\d+\.blocks\.\d+", _given("{above}", 2), _made("{above}.downsample", 2))
_READ = r"(encoder|h_encoder\.token_embed\.\d+)\.second_conv\.0"
"""A layer that the reference backbones read in two halves; where it is called, as originally, its weight acts too."""
# Point-MAE, Point-BERT, ACT, PCP-MAE, ReCon with the official names; classification and part segmentation.
_POINT_MAE = Preset(
    name="Point-MAE family",
    requires=("blocks.blocks.0", "group_divider", "encoder", "pos_embed", "norm"),
    absent=("h_encoder", "generator_blocks"),
    stages=(
        StagePreset(
            blocks=r"blocks\.blocks\.\d+",
            coordinates=_made("group_divider", 1),
            points=_given("group_divider"),
            embedding="pos_embed",
            patch_tokens=("encoder", "reduce_dim"),
            neighbourhoods=True,
        ),
    ),
    stem=("group_divider", "encoder", "reduce_dim"),
    tokens=("cls_token", "img_token", "text_token"),
    positions=("cls_pos", "img_pos", "text_pos"),
    final_norms=("norm",),
    encoder=r"lm_head",
    reads=_READ,
)
# The encoder gets sequence-first tokens [sos, cls, patches] with a causal mask; the generator is not the backbone.
_POINT_GPT = Preset(
    name="PointGPT",
    requires=("blocks.layers.0", "blocks.ln_f", "group_divider", "encoder", "pos_embed"),
    stages=(
        StagePreset(
            blocks=r"blocks\.layers\.\d+",
            coordinates=_made("group_divider", 1),
            points=_given("group_divider"),
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
    # Neither the generator nor `norm` has a part in the prediction.
    encoder=r"pos_embed|generator_blocks|blocks\.increase_dim|norm",
    reads=_READ,
)
# Its part segmentation taps blocks, which make their masks themselves; nothing reads what `blocks.ln_f` makes.
_POINT_GPT_SEGMENTATION = variant(
    _POINT_GPT,
    name="PointGPT part segmentation",
    requires=(*_POINT_GPT.requires, "norm", "propagation_0"),
    absent=("blocks.cls_norm", "cls_norm"),
    stage={"masks": ()},
    final_norms=("norm",),
    encoder=r"pos_embed|generator_blocks|blocks\.(?:increase_dim|ln_f)",
)
# ShapeLLM's ReCon++: a start token takes the place of the last patch; queries of images and text look at the patches
# after every block, in blocks of their own.
_RECON_PLUS = Preset(
    name="ReCon++",
    requires=("encoder.blocks.local_blocks.0", "encoder.blocks.global_blocks.0", "group_divider", "embed"),
    absent=("decoder_pos_embed",),
    stages=(
        StagePreset(
            blocks=r"encoder\.blocks\.local_blocks\.\d+",
            coordinates=_made("group_divider", 1),
            dropped=1,
            points=_given("group_divider"),
            masks=((1,),),
        ),
        StagePreset(
            blocks=r"encoder\.blocks\.global_blocks\.\d+",
            unknown="their tokens are queries, which lie nowhere in space",
        ),
    ),
    stem=("group_divider", "embed"),
    tokens=("encoder.sos",),
    positions=("encoder.sos_pos",),
    final_norms=("encoder.ln_f2",),
    encoder=r"encoder|decoder|pos_embed|norm",
)
# Point-M2AE and I2P-MAE: three stages of their own widths, without prefix tokens.
_POINT_M2AE = Preset(
    name="Point-M2AE family",
    requires=("h_encoder.encoder_blocks.0.blocks.0", "group_dividers.0", "h_encoder.token_embed.0"),
    stages=(
        StagePreset(
            blocks=r"h_encoder\.encoder_blocks\.\d+\.blocks\.\d+",
            coordinates=_made("group_dividers.{stage}", 1),
            embedding="h_encoder.encoder_pos_embeds.{stage}",
            points=_given("group_dividers.{stage}"),
            patch_tokens=("h_encoder.token_embed.{stage}",),
            masks=((1,),),
        ),
    ),
    stem=("group_dividers.0", "group_dividers.1", "group_dividers.2", "h_encoder.token_embed.0"),
    final_norms=("norm", "h_encoder.encoder_norms.2"),
    encoder=r"h_encoder|h_decoder|decoder_pos_embeds|token_prop|decoder_norm|rec_head",
    reads=_READ,
)
_POINT_VIT = Preset(
    name="openpoints PointViT",
    requires=("encoder.blocks.0", "encoder.patch_embed", "encoder.proj", "encoder.pos_embed", "encoder.norm"),
    stages=(
        StagePreset(
            blocks=r"encoder\.blocks\.\d+",
            coordinates=_made("encoder.patch_embed", 0, 1),
            embedding="encoder.pos_embed",
            patch_tokens=("encoder.proj",),
        ),
    ),
    stem=("encoder.patch_embed", "encoder.proj"),
    tokens=("encoder.cls_token",),
    positions=("encoder.cls_pos",),
    final_norms=("encoder.norm",),
    encoder=r"encoder",
)
# Blocks of PTv1 and PTv2 in their authors' code get [coordinates, features, ends of samples].
_PTV1 = Preset(
    name="PTv1",
    # The first stage of those that classify has no block.
    requires=("enc2.1.transformer2", "enc1.0"),
    stages=(
        StagePreset(
            blocks=r"(?:enc|dec)\d+\.\d+",
            coordinates=_given("{first}", 0, 0),
            samples=(_given("{first}", 0, 2),),
            layout="packed",
            tokens=(0, 1),
            outputs=((1,),),
        ),
    ),
    encoder=r"(?:enc|dec)\d+",
)
# torch-pointcloud's PTv3, and the encoders of its make that are pre-trained on scenes: Sonata, Concerto.
_SERIALISED = Preset(
    name="torch-pointcloud PTv3 family",
    requires=("encoder.blocks.0.blocks.0.cpe_conv", "encoder.stem", "head"),
    stages=(
        StagePreset(
            blocks=r"(?:encoder|decoder)\.blocks\.\d+\.blocks\.\d+",
            coordinates=_given("{first}", 2),
            samples=(_given("{first}", 3),),
            layout="packed",
            outputs=((0,), (1, "features")),
            mlp_norm="norm2",
        ),
    ),
    encoder=r"encoder|decoder",
)
# The blocks of Utonia are told positions beside cells.
_ROTATED = variant(
    _SERIALISED,
    name="torch-pointcloud Utonia",
    requires=(*_SERIALISED.requires, "encoder.blocks.0.blocks.0.attn.rope"),
    stage={"coordinates": _given("{first}", "pos")},
)
PRESETS: tuple[Preset, ...] = (
    _POINT_MAE,
    _POINT_GPT_SEGMENTATION,
    _POINT_GPT,
    _RECON_PLUS,
    _POINT_M2AE,
    # Uni3D: timm's blocks, called by the model itself; EVA attention reads the weight of its fused projection.
    variant(
        _POINT_MAE,
        name="Uni3D",
        requires=("visual.blocks.0", "group_divider", "encoder", "pos_embed", "visual.fc_norm"),
        absent=(),
        stage={
            "blocks": r"visual\.blocks\.\d+",
            "patch_tokens": ("encoder", "encoder2trans"),
            "neighbourhoods": False,
            "position": "once",
        },
        stem=("group_divider", "encoder", "encoder2trans"),
        tokens=("cls_token",),
        positions=("cls_pos",),
        final_norms=("visual.norm", "visual.fc_norm"),
        encoder=r"visual",
        patches_read=False,
        reads=r"visual\.blocks\.\d+\.attn\.qkv",
    ),
    _POINT_VIT,
    # torch-pointcloud's: grouping is a function, what it gives is first seen as the input of the positional embedding.
    variant(
        _POINT_MAE,
        name="torch-pointcloud Point-MAE",
        requires=("blocks.blocks.0", "encoder", "pos_embed", "norm_f", "head"),
        absent=("group_divider",),
        stage={"coordinates": _given("pos_embed")},
        final_norms=("norm_f",),
    ),
    variant(
        _POINT_VIT,
        name="torch-pointcloud Point-BERT",
        requires=("encoder.blocks.0", "encoder.encoder", "encoder.reduce_dim", "encoder.pos_embed", "head"),
        stage={
            "coordinates": _given("encoder.pos_embed"),
            "patch_tokens": ("encoder.encoder", "encoder.reduce_dim"),
            "neighbourhoods": True,
        },
        stem=("encoder.encoder", "encoder.reduce_dim"),
    ),
    variant(
        _POINT_GPT,
        name="torch-pointcloud PointGPT",
        requires=("blocks.layers.0", "blocks.ln_f", "encoder", "pos_embed", "head"),
        absent=("group_divider",),
        stage={"coordinates": _given("pos_embed")},
    ),
    variant(
        _POINT_M2AE,
        name="torch-pointcloud Point-M2AE",
        requires=("h_encoder.encoder_blocks.0.blocks.0", "h_encoder.encoder_pos_embeds.0", "head"),
        absent=("group_dividers",),
        stage={"coordinates": _given("h_encoder.encoder_pos_embeds.{stage}"), "embedding": None},
    ),
    # PTv3 and Sonata of Pointcept: a mutable mapping goes from module to module.
    Preset(
        name="PTv3 family",
        requires=("enc.enc0.block0", "embedding"),
        stages=(
            StagePreset(
                blocks=r"(?:enc\.enc|dec\.dec)\d+\.block\d+",
                coordinates=_given("{first}", 0, "coord"),
                samples=(_given("{first}", 0, "batch", else_steps=(0, "offset")),),
                layout="packed",
                tokens=(0, "feat"),
                outputs=(("feat",), ("sparse_conv_feat", "features")),
            ),
        ),
        stem=("embedding",),
        encoder=r"enc|dec",
    ),
    _PTV1,
    variant(_PTV1, name="Pointcept PTv1", requires=("enc2.1.transformer", "enc1.0"), stage={}),
    variant(
        _PTV1,
        name="PTv2",
        requires=("patch_embed.blocks.blocks.0", "enc_stages.0.blocks.blocks.0"),
        stage={"blocks": r"(?:patch_embed|enc_stages\.\d+|dec_stages\.\d+)\.blocks\.blocks\.\d+"},
        encoder=r"patch_embed|enc_stages|dec_stages",
    ),
    _ROTATED,
    _SERIALISED,
    # The encoder alone, as its `from_pretrained` returns it, or in a model of the user's.
    *(
        variant(
            preset,
            name=f"{preset.name}, encoder",
            requires=tuple(path.removeprefix("encoder.") for path in preset.requires if path != "head"),
            stage={"blocks": r"blocks\.\d+\.blocks\.\d+"},
            encoder=r"blocks|stem",
        )
        for preset in (_ROTATED, _SERIALISED)
    ),
    Preset(
        name="torch-pointcloud PTv2",
        requires=("encoder.blocks.0.blocks.0.attn.q", "stem", "head"),
        stages=(_GRAPH_ENCODER, _on_graphs(r"decoder\.blocks\.\d+\.blocks\.\d+", _given("{above}", 3))),
        encoder=r"stem|encoder|decoder",
    ),
    Preset(
        name="torch-pointcloud PTv1",
        requires=("encoder.blocks.0.blocks.0.transformer", "embeddings", "head"),
        stages=(
            _GRAPH_ENCODER,
            _on_graphs(r"decoder\.global_block", _given("decoder.global_transition", 1)),
            _on_graphs(r"decoder\.blocks\.\d+\.blocks\.\d+", _given("{above}.upsample", 5)),
        ),
        encoder=r"embeddings|encoder|decoder",
    ),
)
