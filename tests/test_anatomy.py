"""Anatomy of a backbone: by structure, by presets, by one traced forward, and as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AdapterFileError,
    AnatomyError,
    BitFitConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftError,
    PointPeftModel,
    VPTConfig,
    describe,
    get_peft_model,
)
from point_peft.anatomy import Anatomy, Block, Stage, Tap
from point_peft.anatomy.checking import anatomy_from_json, check_anatomy
from point_peft.anatomy.presets import known_anatomy
from point_peft.anatomy.structure import find_blocks, linear_shape
from point_peft.backbones.layers import Encoder, Group, sine_features
from point_peft.files.format import read_folder
from point_peft.running.nested import fetch, fetch_argument
from point_peft.schema import to_json
from point_peft.tracing import understand
from point_peft.tracing.understanding import trace
from tests.zoo import BACKBONES, CLASSES, WIDTH, Compact, TinyBackbone, clouds
from tests.zoo.inputs import offset_dict, offset_list
from tests.zoo.parts import GROUP_SIZE, GROUPS, Layer, PatchNet, Positions, first_and_largest
from tests.zoo.pointcept import PointTransformerV3
from tests.zoo.vector_attention import PointceptV1Classifier

FUSED, SPLIT, TORCH = "one fused projection", "split projections", "nn.MultiheadAttention"


# ---- every registered backbone ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class S:
    """A stage, as the model's source has it."""

    first: str
    count: int
    layout: str
    width: int
    prefix: int | None
    coordinates: str
    """A place where they can be seen; detection may name another where the same tensor is seen."""
    position: str = "every_block"
    attention: str = FUSED
    prompts: bool = True


@dataclass(frozen=True)
class E:
    """Facts that the source of a model tells of it."""

    stages: tuple[S, ...]
    heads: frozenset[str]
    norms: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    """Parameters of the prefix tokens and of their positions, in the order of their rows."""


def expect(*stages: S, heads: str, norms: str = "", tokens: str = "", positions: str = "") -> E:
    return E(stages, frozenset(heads.split()), tuple(norms.split()), tuple(tokens.split()), tuple(positions.split()))


def packed(first: str, count: int, width: int, coordinates: str, attention: str = SPLIT) -> S:
    """Packed tokens have no prefix, take no prompts, and see positions in every block."""
    return S(first, count, "packed", width, 0, coordinates, attention=attention, prompts=False)


def graph(first: str, count: int, width: int) -> S:
    """Blocks of torch-pointcloud and PyG take the coordinates as their second argument."""
    return packed(first, count, width, f"input[1] of '{first}'")


def voxels(first: str, count: int, width: int) -> S:
    """Those of its PTv3 as their third."""
    return packed(first, count, width, f"input[2] of '{first}'", FUSED)


def listed(first: str, count: int, width: int) -> S:
    """The official PTv1 and PTv2 have them first in a list."""
    return packed(first, count, width, f"input[0][0] of '{first}'")


def point(first: str, count: int, width: int) -> S:
    """Pointcept's PTv3 has them in a mapping."""
    return packed(first, count, width, f"input[0].coord of '{first}'", FUSED)


def vit(blocks: str, count: int, prefix: int, coordinates: str, *, layout: str = "bgc", **other: Any) -> S:
    return S(blocks, count, layout, WIDTH, prefix, coordinates, **other)


def nowhere(first: str, attention: str) -> S:
    """Patches padded outside any module: their coordinates are not found, so neither is the prefix."""
    return S(first, 2, "bgc", WIDTH, None, "None", attention=attention, prompts=False)


def levels(name: str, widths: tuple[int, int, int], coordinates: str) -> tuple[S, ...]:
    return tuple(
        S(f"{name}.{level}.blocks.0", count, "bgc", width, 0, coordinates.format(level))
        for level, (width, count) in enumerate(zip(widths, (2, 1, 1), strict=True))
    )


GROUPED = "output[1] of 'group_divider'"
CLS = {"tokens": "cls_token", "positions": "cls_pos"}
THREE = {"tokens": "cls_token img_token text_token", "positions": "cls_pos img_pos text_pos"}
START = {"norms": "norm", "heads": "head", "tokens": "start", "positions": "start_position"}
PARTS = "label_conv propagation_0 convs1 bns1 convs2 bns2 convs3"
GPT = {"tokens": "blocks.sos cls_token", "positions": "cls_pos sos_pos", "norms": "blocks.ln_f"}
usual = expect(vit("blocks.0", 2, 1, "output[1] of 'tokenizer'"), **START)


def mae(count: int, prefix: int = 1, attention: str = FUSED) -> S:
    return vit("blocks.blocks.0", count, prefix, GROUPED, attention=attention)


def uni3d(attention: str) -> E:
    stage = vit("visual.blocks.0", 2, 1, GROUPED, position="once", attention=attention)
    return expect(stage, heads="trans2embed", norms="visual.fc_norm", **CLS)


EXPECTED: dict[str, E] = {
    "point_mae": expect(mae(3), heads="cls_head_finetune", norms="norm", **CLS),
    "point_bert": expect(mae(2), heads="cls_head_finetune", norms="norm", **CLS),
    "pcp_mae": expect(mae(2), heads="cls_head_finetune", norms="norm", **CLS),
    "recon": expect(mae(2, 3), heads="cls_head_finetune", norms="norm", **THREE),
    "recon_contrast": expect(mae(2, 3), heads="cls_head_finetune", norms="norm", **THREE),
    "compact": expect(mae(2, 1, SPLIT), heads="cls_head_finetune", norms="norm", **CLS),
    "part_seg": expect(mae(3, 0), heads=PARTS, norms="norm"),
    "point_m2ae": expect(
        *levels("h_encoder.encoder_blocks", (12, 24, 24), "output[1] of 'group_dividers.{}'"),
        heads="cls_head_finetune",
        norms="norm",
    ),
    "torch_pointcloud": expect(
        vit("blocks.blocks.0", 2, 1, "input[0] of 'pos_embed'"), heads="head", norms="norm_f", **CLS
    ),
    "torch_pointcloud_part_seg": expect(
        vit("blocks.blocks.0", 4, 0, "input[0] of 'pos_embed'"), heads="label_conv propagation_0 head", norms="norm_f"
    ),
    "torch_pointcloud_point_bert": expect(
        vit("encoder.blocks.0", 2, 1, "input[0] of 'encoder.pos_embed'"),
        heads="head",
        norms="encoder.norm",
        tokens="encoder.cls_token",
        positions="encoder.cls_pos",
    ),
    "torch_pointcloud_pointgpt": expect(
        vit("blocks.layers.0", 2, 2, "input[0] of 'pos_embed'", layout="gbc", attention=TORCH),
        heads="cls_norm head",
        **GPT,
    ),
    "torch_pointcloud_point_m2ae": expect(
        *levels("h_encoder.encoder_blocks", (12, 24, 48), "input[1][{}] of 'h_encoder'"), heads="head", norms="norm"
    ),
    "torch_pointcloud_point_m2ae_part_seg": expect(
        *levels("h_encoder.encoder_blocks", (12, 24, 48), "input[1][{}] of 'h_encoder'"),
        # The norms of the lower stages are the encoder's, as the last is.
        heads="propagations.0 propagations.1 propagations.2 label_conv head",
        norms="h_encoder.encoder_norms.2",
    ),
    "torch_pointcloud_ptv1": expect(
        graph("encoder.blocks.0.blocks.0", 2, 16), graph("encoder.blocks.1.blocks.0", 2, 24), heads="head"
    ),
    "torch_pointcloud_ptv1_seg": expect(
        graph("encoder.blocks.0.blocks.0", 2, 16),
        graph("encoder.blocks.1.blocks.0", 2, 24),
        graph("decoder.global_block", 1, 24),
        graph("decoder.blocks.0.blocks.0", 1, 16),
        heads="head",
    ),
    "torch_pointcloud_ptv2": expect(
        graph("encoder.blocks.0.blocks.0", 2, 16), graph("encoder.blocks.1.blocks.0", 2, 24), heads="head"
    ),
    "torch_pointcloud_ptv2_seg": expect(
        graph("encoder.blocks.0.blocks.0", 2, 16),
        graph("encoder.blocks.1.blocks.0", 2, 24),
        graph("decoder.blocks.0.blocks.0", 1, 16),
        heads="head",
    ),
    "torch_pointcloud_ptv3": expect(
        voxels("encoder.blocks.0.blocks.0", 2, 16), voxels("encoder.blocks.1.blocks.0", 2, 24), heads="head"
    ),
    "torch_pointcloud_ptv3_seg": expect(
        voxels("encoder.blocks.0.blocks.0", 2, 16),
        voxels("encoder.blocks.1.blocks.0", 2, 24),
        voxels("decoder.blocks.0.blocks.0", 1, 16),
        heads="head",
    ),
    **dict.fromkeys(
        ("torch_pointcloud_sonata", "torch_pointcloud_concerto"),
        expect(voxels("encoder.blocks.0.blocks.0", 2, 16), voxels("encoder.blocks.1.blocks.0", 2, 24), heads="head"),
    ),
    "torch_pointcloud_utonia": expect(
        *(
            packed(f"encoder.blocks.{i}.blocks.0", 2, width, f"input.pos of 'encoder.blocks.{i}.blocks.0'", FUSED)
            for i, width in enumerate((12, 24))
        ),
        heads="head",
    ),
    # An octree is no tensor: coordinates are not found, and of these blocks neither are samples.
    "torch_pointcloud_octformer": expect(
        packed("encoder.layers.0.blocks.0", 2, 16, "None", FUSED),
        packed("encoder.layers.1.blocks.0", 2, 24, "None", FUSED),
        heads="decoder head",
    ),
    "torch_pointcloud_3detr": expect(
        nowhere("encoder.layers.0", TORCH),
        nowhere("decoder.layers.0", TORCH),
        norms="decoder.norm",
        heads=" ".join(f"mlp_heads.{n}_head" for n in ("center", "size", "angle_cls", "angle_residual", "sem_cls")),
    ),
    "torch_pointcloud_point_mamba": expect(nowhere("encoder.blocks.0", "none"), norms="encoder.norm_f", heads="head"),
    "litept": expect(point("enc.enc1.block0", 2, 24), heads="seg_head"),
    "uni3d": uni3d(FUSED),
    "uni3d_swiglu": uni3d(SPLIT),
    "timm_vit": expect(vit("blocks.0", 2, 0, "output[1] of 'patches'", position="once"), heads="head", norms="norm"),
    "pyg_point_transformer": expect(graph("layers.0", 2, WIDTH), heads="lin_out", norms="norm"),
    "openpoints_point_vit": expect(
        vit("encoder.blocks.0", 2, 1, "output[0][1] of 'encoder.patch_embed'"),
        heads="prediction",
        norms="encoder.norm",
        tokens="encoder.cls_token",
        positions="encoder.cls_pos",
    ),
    "transformer_batch_first": expect(nowhere("encoder.layers.0", TORCH), heads="classify", norms="encoder.norm"),
    "transformer_sequence_first": expect(
        vit("encoder.layers.0", 2, 0, "output[1] of 'tokenizer'", layout="gbc", position="once", attention=TORCH),
        heads="classify",
        norms="encoder.norm",
    ),
    "pointgpt": expect(
        vit("blocks.layers.0", 2, 2, GROUPED, layout="gbc", attention=TORCH),
        heads="blocks.cls_norm blocks.cls_head_finetune",
        **GPT,
    ),
    "pointgpt_part_seg": expect(
        vit("blocks.layers.0", 2, 2, GROUPED, layout="gbc", attention=TORCH), heads=PARTS, **{**GPT, "norms": "norm"}
    ),
    # The second stage are queries.
    "recon_plus": expect(
        vit("encoder.blocks.local_blocks.0", 2, 1, GROUPED),
        S("encoder.blocks.global_blocks.0", 2, "bgc", WIDTH, None, "None", attention=SPLIT, prompts=False),
        heads="cls_head_finetune",
        norms="encoder.ln_f2",
        tokens="encoder.sos",
        positions="encoder.sos_pos",
    ),
    "pointcept_ptv3": expect(
        point("enc.enc0.block0", 2, 16),
        point("enc.enc1.block0", 2, 24),
        point("dec.dec0.block0", 1, 16),
        heads="seg_head",
    ),
    "official_ptv1": expect(
        listed("enc1.1", 1, 16), listed("enc2.1", 2, 24), listed("dec2.1", 1, 24), listed("dec1.1", 1, 16), heads="cls"
    ),
    "pointcept_ptv1": expect(
        listed("enc1.1", 1, 16), listed("enc2.1", 2, 24), listed("dec2.1", 1, 24), listed("dec1.1", 1, 16), heads="cls"
    ),
    "official_ptv2": expect(
        listed("patch_embed.blocks.blocks.0", 1, 16),
        listed("enc_stages.0.blocks.blocks.0", 2, 24),
        listed("dec_stages.0.blocks.blocks.0", 1, 16),
        heads="seg_head",
    ),
    "dict_in_dict_out": usual,
    "channels_first": usual,
    "point_features": usual,
    "tuple_blocks": usual,
    "allowed_mask": usual,
    "random_groups": usual,
    "head_masks": expect(vit("blocks.0", 2, 1, "output[1] of 'tokenizer'", attention=TORCH), **START),
    # Its positions go beside the tokens, so that these come to each block as the one before left them.
    "fused_positions": expect(
        vit("blocks.0", 2, 1, "output[1] of 'tokenizer'", position="once", attention=TORCH),
        **{**START, "positions": ""},
    ),
    # The third of the list is the first once more.
    "shared_block": expect(vit("blocks.0", 2, 1, "output[1] of 'tokenizer'"), **START),
    "padded_patches": expect(nowhere("blocks.0", FUSED), heads="head", norms="norm"),
}
"""A backbone without an entry is only asked for blocks."""

every_backbone = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)


def stage_of(stage: Stage) -> S:
    first = stage.blocks[0]
    kinds = {block.attention_kind for block in stage.blocks}
    assert len(kinds) == 1 and len({block.path.rpartition(".")[0] for block in stage.blocks}) == 1
    return S(
        first.path,
        len(stage.blocks),
        stage.layout,
        stage.width,
        stage.prefix_tokens,
        str(stage.coordinates),
        stage.position,
        first.attention_kind,
        stage.takes_prompts,
    )


@functools.cache
def traced_alone(backbone: TinyBackbone) -> Anatomy:
    """The anatomy that one traced forward tells, presets left out."""
    return trace(backbone.build(), backbone.inputs(3, 1), {})


def place(text: str) -> Tap | None:
    """The tap that `str` spells so."""
    match = re.fullmatch(r"(input|output)(\S*) of '(\S+)'", text)
    if match is None:
        return None
    steps = tuple(int(number) if number else name for number, name in re.findall(r"\[(\d+)\]|\.(\w+)", match[2]))
    tap = Tap(module=match[3], side="input" if match[1] == "input" else "output", steps=steps)
    assert str(tap) == text
    return tap


def rows(anatomy: Anatomy, role: str | None = None) -> dict[str, int]:
    return {entry.name: entry.row for entry in anatomy.prefix_parameters if role in (None, entry.role)}


@every_backbone
def test_detection_alone_finds_what_the_source_says(backbone: TinyBackbone) -> None:
    anatomy = traced_alone(backbone)
    assert anatomy.source == "traced" and anatomy.blocks
    check_anatomy(backbone.build(), anatomy)
    expected = EXPECTED.get(backbone.name)
    if expected is None:
        return
    assert len(anatomy.stages) == len(expected.stages)
    for stage, told in zip(anatomy.stages, expected.stages, strict=True):
        found = stage_of(stage)
        assert replace(found, coordinates=told.coordinates) == told
        same_tensors(backbone.build(), backbone.inputs(3, 1), stage.coordinates, place(told.coordinates))
    assert set(anatomy.heads) == expected.heads
    assert anatomy.final_norms == expected.norms
    tokens, positions = ({name: i for i, name in enumerate(names)} for names in (expected.tokens, expected.positions))
    if anatomy.stages[0].position == "once":
        # A position that is added once is like a token: nothing tells them apart.
        assert rows(anatomy) == {**tokens, **positions}
    else:
        assert (rows(anatomy, "token"), rows(anatomy, "position")) == (tokens, positions)


@every_backbone
def test_preset_and_traced_forward_agree(backbone: TinyBackbone) -> None:
    model, args = backbone.build(), backbone.inputs(3, 1)
    known = known_anatomy(model)
    if known is None:
        pytest.skip("no preset describes it")
    traced = traced_alone(backbone)
    names = ("coordinates", "samples", "patch_tokens")
    # Presets leave it to the shapes of arguments which of them are masks.
    apart: dict[str, Any] = {**dict.fromkeys(names), "masks": (), "padding_masks": ()}
    # What a preset says of the stem it must say rightly, but it need not say all.
    apart |= {"points": None, "tokenizer": (), "position_embedding": None, "unknown": ""}
    assert [bool(stage.unknown) for stage in known.stages] == [bool(stage.unknown) for stage in traced.stages]
    assert [replace(stage, **apart) for stage in known.stages] == [replace(stage, **apart) for stage in traced.stages]
    for one, two in zip(known.stages, traced.stages, strict=True):
        for name in names:
            same_tensors(model, args, getattr(one, name), getattr(two, name))
        if one.points is not None:
            same_tensors(model, args, one.points, two.points)
        idle = {path for path in one.tokenizer if isinstance(model.get_submodule(path), nn.Identity)}
        assert one.tokenizer == () or tuple(path for path in one.tokenizer if path not in idle) == two.tokenizer
        assert one.position_embedding in (None, two.position_embedding)
        assert set(one.masks) <= set(two.masks) and set(one.padding_masks) <= set(two.padding_masks)
    if known.stages[0].position == "once":
        assert rows(known) == rows(traced)
    else:
        assert set(known.prefix_parameters) == set(traced.prefix_parameters)
    assert known.final_norms == traced.final_norms
    assert set(known.heads) == set(traced.heads)
    assert known.patches_read == traced.patches_read
    assert set(known.reads) <= set(traced.reads)


def same_tensors(model: nn.Module, args: tuple[Any, ...], one: Tap | None, two: Tap | None) -> None:
    """Two places may differ, but the tensors seen there may not."""
    assert (one is None) == (two is None)
    if one is not None and two is not None and one != two:
        a, b = seen(model, args, one), seen(model, args, two)
        assert a.dtype == b.dtype and torch.equal(a, b)


def seen(model: nn.Module, args: tuple[Any, ...], tap: Tap) -> Tensor:
    """The value at a place when the module is called first."""
    found: list[Any] = []

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(fetch_argument(inputs, named, tap.steps))

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        found.append(fetch(output, tap.steps))

    module = model.get_submodule(tap.module)
    into = tap.side == "input"
    handle = module.register_forward_pre_hook(before, with_kwargs=True) if into else module.register_forward_hook(after)
    with handle, torch.no_grad():
        model(*args)
    assert isinstance(found[0], Tensor)
    return found[0].clone()


# ---- what tracing leaves behind --------------------------------------------------------------------------------------


class Noisy(Compact):
    """It draws random numbers, counts its calls, and fails if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.failing = False

    def forward(self, points: Tensor) -> Tensor:
        if self.failing:
            self.norm.register_forward_pre_hook(fail)
        return super().forward(points + 0.0 * torch.rand_like(points))


def fail(module: nn.Module, inputs: Any) -> None:
    raise LookupError("on purpose")


def idle(*given: Any) -> None:
    return None


@pytest.mark.parametrize("failing", [False, True])
def test_tracing_leaves_the_model_as_it_was(failing):
    model = Noisy().train()
    model.encoder.eval()
    model.blocks.blocks[1].norm_a.requires_grad_(False)
    model.blocks.blocks[0].register_forward_hook(idle)
    model.encoder.register_forward_pre_hook(idle, with_kwargs=True)
    if failing:
        model.norm.register_forward_pre_hook(fail)
    (points,) = clouds(2, 0)

    def state() -> list[Any]:
        return [
            [(name, tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()],
            [(name, tensor.clone(), False) for name, tensor in model.named_buffers()],
            [(name, module.training) for name, module in model.named_modules()],
            [dict(m._forward_pre_hooks) for m in model.modules()],
            [dict(m._forward_hooks) for m in model.modules()],
            [dict(m._forward_pre_hooks_with_kwargs) for m in model.modules()],
            [dict(m._forward_hooks_always_called) for m in model.modules()],
            [parameter.grad for parameter in model.parameters()],
            torch.is_grad_enabled(),
        ]

    before, generator, given = state(), torch.random.get_rng_state(), points.clone()
    if failing:
        with pytest.raises(LookupError, match=r"on purpose"):
            trace(model, (points,), {})
    else:
        trace(model, (points,), {})
    after = state()
    for ours, theirs in zip(before[:2], after[:2], strict=True):
        for (name, tensor, grad), (other, again, still) in zip(ours, theirs, strict=True):
            assert (name, grad) == (other, still) and torch.equal(tensor, again)
    assert before[2:] == after[2:]
    assert torch.equal(generator, torch.random.get_rng_state())
    assert torch.equal(points, given) and not points.requires_grad


def test_tracing_works_where_gradients_are_off():
    with torch.no_grad():
        without = trace(Compact(), clouds(2, 0), {})
    assert without == trace(Compact(), clouds(2, 0), {})
    with torch.inference_mode(False):
        assert trace(Compact().requires_grad_(False), clouds(2, 0), {}) == without


# ---- blocks by structure ---------------------------------------------------------------------------------------------


def linears(*names: str, out: int = 8) -> dict[str, nn.Module]:
    return {name: nn.Linear(8, out) for name in names}


class Made(nn.Module):
    """A module with these children, which is only looked at."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def fused() -> nn.Module:
    return Made({"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)})


def mlp(hidden: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(8, hidden), nn.GELU(), nn.Linear(hidden, 8))


def only(**children: nn.Module) -> Block:
    """The one block that is found in a list of one module with these children beside two norms."""
    model = Made({"layers": nn.ModuleList([Made({"one": nn.LayerNorm(8), **children, "two": nn.LayerNorm(8)})])})
    blocks = find_blocks(dict(model.named_modules()))
    assert list(blocks) == ["layers.0"]
    block = blocks["layers.0"]
    assert block.norms[0] == "layers.0.one"
    return block


def test_an_mlp_that_widens_threefold_is_no_attention():
    narrow = Made({"fc1": nn.Linear(8, 24), "fc2": nn.Linear(24, 8)})
    for block in (only(attn=fused(), mlp=narrow), only(mlp=narrow, attn=fused())):
        assert (block.attention, block.qkv) == ("layers.0.attn", ("layers.0.attn.qkv",))
        assert block.projection == "layers.0.attn.out" and block.mlp == "layers.0.mlp"
        assert block.linears == ("layers.0.mlp.fc1", "layers.0.mlp.fc2")
    assert find_blocks(dict(Made({"block": Made({"norm": nn.LayerNorm(8), "mlp": narrow})}).named_modules())) == {}


def test_query_key_and_value_may_be_mlps():
    def embedded() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())

    attention = Made({"linear_q": embedded(), "linear_k": embedded(), **linears("linear_v")})
    block = only(attn=attention, fc1=nn.Linear(8, 8))
    assert block.qkv == ("layers.0.attn.linear_q.0", "layers.0.attn.linear_k.0", "layers.0.attn.linear_v")
    assert block.attention_kind == SPLIT and block.projection is None and block.mlp is None


def test_the_layer_for_the_values_may_be_called_lin():
    conv = Made({"attn_nn": mlp(4), **linears("lin", "lin_src", "lin_dst")})
    block = only(conv=conv, lin1=nn.Linear(8, 16), lin2=nn.Linear(16, 8))
    assert set(block.qkv) == {"layers.0.conv.lin_src", "layers.0.conv.lin_dst", "layers.0.conv.lin"}
    assert block.mlp == "layers.0.lin2" and block.linears == ("layers.0.lin1", "layers.0.lin2")


def test_a_gated_mlp():
    attention = Made(linears("q_proj", "k_proj", "v_proj", "proj"))
    gated = Made({**linears("fc1_g", "fc1_x", out=16), "norm": nn.LayerNorm(16), "fc2": nn.Linear(16, 8)})
    block = only(attn=attention, mlp=gated)
    assert block.qkv == tuple(f"layers.0.attn.{name}_proj" for name in "qkv")
    assert block.projection == "layers.0.attn.proj" and block.mlp == "layers.0.mlp"
    assert block.linears == tuple(f"layers.0.mlp.{name}" for name in ("fc1_g", "fc1_x", "fc2"))


def test_two_attentions_in_a_block():
    """As in ReCon: the first is the block's, whatever the second is made of."""
    contrast = Made({**linears("q"), "kv": nn.Linear(8, 16), **linears("proj")})
    block = only(attn=fused(), mlp=mlp(), three=nn.LayerNorm(8), attn_contrast=contrast, mlp_contrast=mlp())
    assert (block.attention, block.mlp) == ("layers.0.attn", "layers.0.mlp")
    assert len(block.norms) == 3 and "layers.0.attn_contrast.kv" in block.linears
    other = only(attn_contrast=contrast, mlp=mlp(), three=nn.LayerNorm(8), attn=fused(), mlp_two=mlp())
    assert other.attention == "layers.0.attn_contrast" and other.mlp == "layers.0.mlp"


def test_a_layer_of_torch():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    blocks = find_blocks(dict(model.named_modules()))
    assert list(blocks) == ["layers.0", "layers.1"]
    block = blocks["layers.1"]
    assert (block.attention, block.qkv, block.projection) == ("layers.1.self_attn", (), "layers.1.self_attn.out_proj")
    assert block.attention_kind == TORCH and block.mlp == "layers.1.linear2"
    assert block.norms == ("layers.1.norm1", "layers.1.norm2")


def test_linear_layers_are_known_by_what_they_are():
    pyg = pytest.importorskip("torch_geometric.nn")
    assert linear_shape(nn.Linear(3, 5)) == linear_shape(pyg.Linear(3, 5)) == (5, 3)
    assert linear_shape(nn.Embedding(5, 3)) is None
    assert linear_shape(nn.LayerNorm(5)) is None


# ---- tracing: found and refused --------------------------------------------------------------------------------------


class Unknown(nn.Module):
    """A point transformer with names that no preset has: sequence first, positions added once, a dotted CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Group(16, 8)
        self.patchify = Encoder(24)
        self.where = nn.Linear(3, 24)
        self.extra = nn.ParameterDict({"summary": nn.Parameter(torch.randn(1, 1, 24))})
        self.trunk = nn.ModuleList(
            nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, norm_first=True) for _ in range(3)
        )
        self.last = nn.LayerNorm(24)
        self.classifier = nn.Linear(24, 4)

    def forward(self, points: Tensor) -> Tensor:
        neighborhood, center = self.sampler(points)
        tokens = self.patchify(neighborhood) + self.where(center)
        tokens = torch.cat([self.extra["summary"].expand(len(points), -1, -1), tokens], 1).transpose(0, 1)
        for block in self.trunk:
            tokens = block(tokens)
        logits: Tensor = self.classifier(self.last(tokens)[0])
        return logits


def test_an_unknown_model_is_traced():
    torch.manual_seed(0)
    model, (points,) = Unknown(), clouds(3, 0)
    with pytest.raises(AnatomyError, match=r"no preset describes .*: pass example_inputs"):
        get_peft_model(model, PointPEFTConfig(memory_bank=False))
    anatomy = describe(model, points)
    (stage,) = anatomy.stages
    assert [block.path for block in stage.blocks] == ["trunk.0", "trunk.1", "trunk.2"]
    assert (stage.layout, stage.prefix_tokens, stage.position, stage.width) == ("gbc", 1, "once", 24)
    same_tensors(model, (points,), stage.coordinates, Tap(module="sampler", side="output", steps=(1,)))
    assert [parameter.name for parameter in anatomy.prefix_parameters] == ["extra.summary"]
    assert (anatomy.final_norms, anatomy.heads) == (("last",), ("classifier",))
    assert not anatomy.patches_read and anatomy.uncalled == ()
    assert {(read.module, read.reader) for read in anatomy.reads} >= {
        (f"trunk.{i}.self_attn.out_proj", f"trunk.{i}.self_attn") for i in range(3)
    }


class Sorted(nn.Module):
    """The patches are sorted after the grouper, outside any module; features of positions are a function, or not."""

    def __init__(self, sine: bool = False, end: bool = False) -> None:
        super().__init__()
        self.sampler = Group(GROUPS, GROUP_SIZE)
        self.net = PatchNet()
        self.positions: nn.Module = nn.Linear(WIDTH, WIDTH) if sine else Positions()
        self.start = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(2 * WIDTH, CLASSES)
        self.sine = sine
        self.end = end

    def forward(self, points: Tensor) -> Tensor:
        patches, centres = self.sampler(points)
        if not self.end:
            order = centres[:, :, 0].argsort(1)[:, :, None]
            centres = centres.gather(1, order.expand(-1, -1, 3))
            patches = patches.gather(1, order[..., None].expand(-1, -1, GROUP_SIZE, 3))
        features = sine_features(centres, WIDTH) if self.sine else centres
        tokens = [self.start.expand(len(points), -1, -1), self.net(patches) + self.positions(features)]
        mixed = torch.cat(tokens[::-1] if self.end else tokens, dim=1)
        for block in self.blocks:
            mixed = block(mixed)
        logits: Tensor = self.head(first_and_largest(mixed))
        return logits


def test_sorted_centres_are_seen_where_they_are_sorted():
    (stage,) = trace(Sorted(), clouds(3, 0), {}).stages
    assert (str(stage.coordinates), stage.prefix_tokens) == ("input[0] of 'positions'", 1)


@pytest.mark.parametrize("options", [{"sine": True}, {"end": True}], ids=["centres in another order", "cls at the end"])
def test_coordinates_in_another_order_than_the_tokens_are_not_taken(options):
    (stage,) = trace(Sorted(**options), clouds(3, 0), {}).stages
    assert stage.coordinates is None and not stage.takes_prompts
    assert "consists of points of the input cloud in the order of the tokens" in stage.unknown
    with pytest.raises(AnatomyError, match=r"POINT_PEFT needs to know where the tokens .* lie in space: .*'blocks.0'"):
        get_peft_model(Sorted(**options), PointPEFTConfig(memory_bank=False), example_inputs=clouds(3, 0))


class ByItself(nn.Module):
    """A model that moves its clouds and makes its groups in its own forward, where no module is given the cloud."""

    def __init__(self, move: Callable[[Tensor], Tensor], chosen: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.move, self.chosen = move, chosen
        self.patch, self.positions = nn.Linear(3, WIDTH), Positions()
        self.start = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        points = self.move(points)
        centres = points[:, :: points.shape[1] // GROUPS][:, :GROUPS]
        centres = centres if self.chosen is None else self.chosen(centres)
        nearest = torch.cdist(centres, points).topk(GROUP_SIZE, largest=False).indices
        around = points[torch.arange(len(points))[:, None, None], nearest] - centres[:, :, None]
        tokens = self.patch(around).amax(dim=2) + self.positions(centres)
        tokens = torch.cat([self.start.expand(len(points), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(first_and_largest(tokens))
        return logits


def _unit_sphere(points: Tensor) -> Tensor:
    points = points - points.mean(dim=1, keepdim=True)
    size: Tensor = points.norm(dim=2).amax(dim=1)
    return points / size[:, None, None]


def _in_place(points: Tensor) -> Tensor:
    points = points.clone()
    points -= points.mean(dim=1, keepdim=True)
    points *= 2
    return points


def _unit_box(points: Tensor) -> Tensor:
    low = points.amin(dim=1, keepdim=True)
    return (points - low) / (points.amax(dim=1, keepdim=True) - low)


def _farthest(points: Tensor) -> Tensor:
    """Centred, and then compared with one point after another, as where the farthest are sought."""
    points = points - points.mean(dim=1, keepdim=True)
    for number in range(100):
        points = points + 0 * (points - points[:, number % points.shape[1]][:, None]).square().sum(2, keepdim=True)
    return points


@pytest.mark.parametrize(
    ("move", "axis"),
    [
        (_unit_sphere, 2),
        (_in_place, 2),
        (_unit_box, 2),
        (_farthest, 2),
        (lambda points: 3 * points[..., [2, 0, 1]], 2),
        (lambda points: (points - points.mean(dim=2, keepdim=True)).transpose(1, 2), 1),
    ],
    ids=["unit sphere", "in place", "unit box", "farthest", "other axes", "channels first"],
)
@pytest.mark.parametrize("flat", [False, True])
def test_clouds_that_the_model_moves_by_itself_are_followed(move: Any, axis: int, flat: bool) -> None:
    if flat and move is _unit_box:
        return  # it divides by a height of 0
    (points,) = clouds(3, 0)
    points = points * torch.tensor([1.0, 1.0, 0.0]) if flat else points
    model, given = ByItself(move).eval(), points if axis == 2 else points.transpose(1, 2)
    anatomy = trace(model, (given,), {})
    (stage,) = anatomy.stages
    assert (str(stage.coordinates), stage.prefix_tokens, stage.unknown) == ("input[0] of 'positions'", 1, "")
    assert stage.takes_prompts and [p.name for p in anatomy.prefix_parameters] == ["start"]
    without = model(given)
    adapted = get_peft_model(model, PointPEFTConfig(memory_bank=False), example_inputs=(given,))
    assert bool(adapted(given).isfinite().all()) and not torch.allclose(adapted(given), without)


@pytest.mark.parametrize(
    ("move", "chosen"),
    [(torch.tanh, None), (_unit_sphere, lambda centres: centres + 0.01), (lambda points: points[..., 3:], None)],
    ids=["bent", "beside the points", "normals"],
)
def test_what_else_a_model_makes_of_clouds_is_not_taken_for_coordinates(move: Any, chosen: Any) -> None:
    (points,) = clouds(3, 0)
    given = torch.cat([points, torch.rand(points.shape)], dim=2)  # normals behind the coordinates, for whoever asks
    (stage,) = trace(ByItself(move, chosen), (given if move(given).shape[2] == 3 else points,), {}).stages
    assert stage.coordinates is None and "were not found" in stage.unknown


def test_what_was_not_found_is_not_told_as_if_it_were_not_there() -> None:
    model, example = ByItself(torch.tanh).eval(), clouds(3, 0)
    anatomy = describe(model, *example)
    text = str(anatomy)
    for said in ("prefix tokens: not found", "positions:   not found", "masks:       not found", "prefix:        not"):
        assert said in text
    assert "prompts:     not tried" in text
    stage = replace(anatomy.stages[0], coordinates=Tap(module="positions", side="input"), prefix_tokens=1)
    known = replace(anatomy, stages=(stage,))
    adapted = get_peft_model(model, PointPEFTConfig(memory_bank=False, anatomy=known))
    hint = "nothing was put there; if it is attended there, state prompts=True in config.anatomy"
    assert hint in adapted.trainable_parameters_report()
    for how in (PointPEFTConfig(num_prompts=4, anatomy=known), VPTConfig(anatomy=known)):
        with pytest.raises(AnatomyError, match=hint):
            get_peft_model(adapted.unload(), how)
    stated = PointPEFTConfig(memory_bank=False, anatomy=replace(known, stages=(replace(stage, prompts=True),)))
    assert hint not in get_peft_model(adapted.unload(), stated).trainable_parameters_report()
    found = str(describe(BACKBONES["point_mae"].build(), *BACKBONES["point_mae"].inputs(3, 1)))
    assert "not found" not in found and "masks:       none" in found


@pytest.mark.parametrize("name", ["padded_patches", "transformer_batch_first"])
def test_padded_patches_are_not_taken(name):
    backbone = BACKBONES[name]
    anatomy = describe(backbone.build(), *backbone.inputs(3, 1))
    assert "coordinates: unknown: the coordinates of the tokens of " in str(anatomy)
    assert f"'{anatomy.blocks[0].path}' (3, " in anatomy.stages[0].unknown
    # What needs no coordinates works.
    get_peft_model(backbone.build(), LoraConfig(), example_inputs=backbone.inputs(3, 1))


def test_a_model_without_attention_has_linear_layers_and_says_so():
    name = "torch_pointcloud_point_mamba"
    if name not in BACKBONES:
        pytest.skip("its package is not installed")
    backbone = BACKBONES[name]
    args = backbone.inputs(3, 1)
    anatomy = describe(backbone.build(), *args)
    for said in ("attention:   none: of these blocks the linear layers alone", "'encoder.blocks.0' has no attention"):
        assert said in str(anatomy)
    # One of them by the attribute `T`.
    assert {read.module.rpartition(".")[2] for read in anatomy.reads} == {"in_proj", "dt_proj"} and not anatomy.uncalled
    model = get_peft_model(backbone.build(), LoraConfig(), example_inputs=args)
    names = {row.name.rpartition(".")[2] for row in model.get_layer_status() if "mamba" in row.name}
    assert names == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    with pytest.raises(AnatomyError, match=r"IA3 scales the keys and values .* 'encoder\.blocks\.0' has none"):
        get_peft_model(backbone.build(), IA3Config(), example_inputs=args)


@pytest.mark.parametrize("name", ["torch_pointcloud_sonata", "torch_pointcloud_utonia"])
def test_a_pre_trained_encoder_is_known_alone_and_under_a_head(name):
    if name not in BACKBONES:
        pytest.skip("its package is not installed")
    backbone = BACKBONES[name]
    encoder = backbone.build().get_submodule("encoder")
    models = (backbone.build(), encoder, Made({"a": encoder, "b": nn.Linear(24, 2)}))
    whole, alone, under = map(known_anatomy, models)
    assert whole is not None and alone is not None and under is not None
    assert alone.source == f"{whole.source}, encoder" and (alone.heads, under.heads) == ((), ("b",))
    for anatomy, prefix in ((alone, ""), (under, "a.")):
        paths = [path.path for path in anatomy.blocks]
        assert paths == [block.path.replace("encoder.", prefix, 1) for block in whole.blocks]
    args = backbone.inputs(2, 1)
    model = get_peft_model(encoder, PointPEFTConfig(modules_to_save=[]))
    features, *_ = model(args[0], *args[-2:], **({"pos": args[1]} if len(args) == 4 else {}))
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.adapters.parameters())


class PackedLayer(Layer):
    """A block on packed tokens (n, c) of one cloud."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens[None])[0]


class Thinned(nn.Module):
    """Packed tokens (n, c) of every second point, whose coordinates no module sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.layer = PackedLayer()
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, given: list[Tensor]) -> Tensor:
        logits: Tensor = self.out(self.layer(self.embed(given[0])[::2]))
        return logits


def test_unknown_coordinates_of_packed_tokens():
    (stage,) = trace(Thinned(), offset_list(3, 1), {}).stages
    assert (stage.layout, stage.coordinates, stage.samples) == ("packed", None, None)
    assert "the coordinates (144, 3) of the packed tokens (144, 24) of 'layer' were not found" in stage.unknown
    with pytest.raises(AnatomyError, match=r"needs to know where the tokens .* \(144, 24\) of 'layer'"):
        config = PointPEFTConfig(num_prompts=0, memory_bank=False)
        get_peft_model(Thinned(), config, example_inputs=offset_list(3, 1))


class Ordered(Thinned):
    """Packed tokens (n, c) in an order of their own, as along a curve."""

    def forward(self, given: list[Tensor]) -> Tensor:
        order = given[1][:, 0].argsort()
        logits: Tensor = self.out(self.layer(self.embed(5 * given[1])[order]))
        return logits


def test_points_that_the_model_alone_is_given_are_not_taken_for_coordinates_of_packed_tokens():
    """Nothing tells that they are in the order of the tokens."""
    (stage,) = trace(Ordered(), offset_list(3, 1), {}).stages
    assert (stage.layout, stage.coordinates) == ("packed", None) and "(288, 24) of 'layer'" in stage.unknown


@pytest.mark.parametrize("name", ["official_ptv1", "pointcept_ptv3", "pyg_point_transformer"])
def test_one_packed_cloud_does_not_tell_samples(name):
    if name not in BACKBONES:
        pytest.skip("its package is not installed")
    backbone = BACKBONES[name]
    anatomy = trace(backbone.build(), backbone.inputs(1, 1), {})
    for stage in anatomy.stages:
        assert "pass an example of two or more clouds, or state it in config.anatomy" in stage.unknown
    assert all(stage.samples is None and stage.coordinates is None for stage in anatomy.stages)
    assert f"'{anatomy.blocks[0].path}'" in anatomy.stages[0].unknown


class Blind(Unknown):
    """Its tokens have nothing to do with the points."""

    def forward(self, points: Tensor) -> Tensor:
        tokens = torch.randn(3, 17, 24)
        for block in self.trunk:
            tokens = block(tokens)
        logits: Tensor = self.classifier(self.last(tokens)[0])
        return logits


class Idle(Unknown):
    """Its blocks are called, but have no part in the output."""

    def forward(self, points: Tensor) -> Tensor:
        super().forward(points)
        logits: Tensor = self.classifier(torch.ones(len(points), 24))
        return logits


class Piecewise(Unknown):
    """Its blocks are never called: their parts are."""

    def forward(self, points: Tensor) -> Tensor:
        tokens = self.patchify(self.sampler(points)[0])
        for block in self.trunk:
            tokens = block.get_submodule("linear2")(block.get_submodule("linear1")(tokens))
        logits: Tensor = self.classifier(self.last(tokens)[:, 0])
        return logits


def test_what_cannot_be_traced_is_refused():
    points = torch.rand(2, 32, 3)
    with pytest.raises(AnatomyError, match=r"no transformer block was found in Linear"):
        describe(nn.Linear(3, 3), points)
    with pytest.raises(PointPeftError, match=r"no preset describes Linear: pass example.inputs"):
        describe(nn.Linear(3, 3))
    with pytest.raises(AnatomyError, match=r"no block of Idle \('trunk.0' …\) has an influence"):
        describe(Idle(), points)
    with pytest.raises(AnatomyError, match=r"the blocks of Piecewise \('trunk.0' …\) were never called"):
        describe(Piecewise(), points)
    assert "coordinates: unknown: the coordinates of the tokens of 'trunk.0' (3, 17, 24) were not found" in str(
        describe(Blind(), points)
    )
    with pytest.raises(AnatomyError, match=r"needs to know where the tokens .* lie .*'trunk.0' \(3, 17, 24\)"):
        get_peft_model(Blind(), PointPEFTConfig(), example_inputs=points)


def test_describe_reads_well():
    text = str(describe(BACKBONES["point_mae"].build()))
    assert "stage 0: 3 blocks 'blocks.blocks.0' … 'blocks.blocks.2'" in text
    assert "prefix tokens: 1" in text and "'cls_head_finetune'" in text
    assert f"coordinates: {described('point_mae').stages[0].coordinates}" in text
    assert "prompts: 3 of 3 blocks" in text
    anatomy = describe(BACKBONES["official_ptv1"].build())
    assert "tokens:      (n, c), c = 16, prefix tokens: 0" in str(anatomy)
    assert "samples:     input[0][2] of 'enc1.1'" in str(anatomy)
    assert anatomy.adaptable["prompts"] == "0 of 5 blocks" and anatomy.adaptable["prior from"] == "none"


# ---- presets under a prefix ------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A model that has a backbone, and heads of its own beside it."""

    def __init__(self, backbone: nn.Module, **heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        for name, head in heads.items():
            self.add_module(name, head)

    def forward(self, *args: Any) -> Any:
        return self.backbone(*args)


@every_backbone
def test_a_preset_fits_under_a_prefix(backbone: TinyBackbone) -> None:
    known = known_anatomy(backbone.build())
    if known is None:
        pytest.skip("no preset describes it")
    wrapped = known_anatomy(Wrapper(backbone.build()))
    assert wrapped is not None
    check_anatomy(Wrapper(backbone.build()), wrapped)
    assert all(block.path.startswith("backbone.") for block in wrapped.blocks)
    assert anatomy_from_json(json.loads(json.dumps(to_json(wrapped)).replace('"backbone.', '"'))) == known


def test_where_a_start_token_takes_the_place_of_the_last_patch_its_coordinates_are_left_out():
    """As in ReCon++: as many tokens as centres, each with the centre of the one before."""
    backbone, config = BACKBONES["recon_plus"], PointPEFTConfig(memory_bank=False, target_modules=r".*local_blocks.*")
    model, args = backbone.build(), backbone.inputs(3, 1)
    for anatomy in (known_anatomy(model), describe(model, *args), traced_alone(backbone)):
        assert anatomy is not None and [stage.dropped for stage in anatomy.stages] == [1, 0]
        assert "output[1] of 'group_divider', without the last 1" in str(anatomy)
        get_peft_model(backbone.build(), replace(config, anatomy=anatomy))(*args)
    unshifted = changed(described("recon_plus"), dropped=0)
    with pytest.raises(AnatomyError, match=r"should get 1 prefix tokens and one token for each of the coordinates"):
        get_peft_model(backbone.build(), replace(config, anatomy=unshifted))(*args)


def test_stages_that_are_lists_and_one_without_a_block():
    model, args = PointceptV1Classifier().eval(), offset_dict(3, 1)
    known = known_anatomy(model)
    assert known is not None and known.source == "preset Pointcept PTv1"
    assert describe(model, *args) == known and known.heads == ("cls",)
    assert [[block.path for block in stage.blocks] for stage in known.stages] == [["enc2.1", "enc2.2"]]
    adapted = get_peft_model(model, PointPEFTConfig(num_prompts=0, adapter_scale=0.0, memory_bank=False))
    adapted(*args).square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.adapters.parameters())


def test_a_part_of_a_name_is_no_prefix():
    model = Made({"myblocks": BACKBONES["point_mae"].build().get_submodule("blocks")})
    assert known_anatomy(model) is None


class Scene(nn.Module):
    """As in Pointcept: the backbone gives features, the head is beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = PointTransformerV3()
        self.backbone.seg_head = nn.Identity()  # type: ignore[assignment]
        self.seg_head = nn.Linear(16, 7)

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.seg_head(self.backbone(data))
        return logits


def test_the_heads_of_a_wrapper_are_its_own():
    backbone = BACKBONES["pointcept_ptv3"]
    known = known_anatomy(Scene())
    assert known is not None and "seg_head" in known.heads
    traced = trace(Scene(), backbone.inputs(2, 1), {})
    blocks = [[stage.blocks for stage in anatomy.stages] for anatomy in (known, traced)]
    assert traced.heads == ("seg_head",) and blocks[0] == blocks[1]
    torch.manual_seed(0)
    model = get_peft_model(Scene().eval(), LoraConfig()).eval()
    logits = model(*backbone.inputs(2, 1))
    logits.sum().backward()
    trained = {name for name, p in model.adapters.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("seg_head" in name for name in trained)


# ---- as JSON ---------------------------------------------------------------------------------------------------------


@every_backbone
def test_an_anatomy_survives_json(backbone: TinyBackbone) -> None:
    model = backbone.build()
    for anatomy in (known_anatomy(model), traced_alone(backbone)):
        if anatomy is not None:
            again = anatomy_from_json(json.loads(json.dumps(to_json(anatomy))))
            assert again == anatomy and hash(again) == hash(anatomy) and str(again) == str(anatomy)


def tampered(path: tuple[Any, ...], value: Any) -> Any:
    data = to_json(described("point_mae"))
    inner: Any = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return data


def described(name: str) -> Anatomy:
    return describe(BACKBONES[name].build(), *BACKBONES[name].inputs(3, 1))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("stages", 0, "layout"), "cgb", "'cgb' where Literal"),
        (("stages", 0, "width"), "24", "'24' where int"),
        (("stages", 0, "width"), True, "True where int"),
        (("stages", 0, "width"), None, "None where int"),
        (("stages", 0, "prompts"), 1, "1 where bool"),
        (("stages", 0, "dropped"), "1", "'1' where int"),
        (("stages", 0, "blocks"), {}, "{} where tuple"),
        (("stages", 0, "blocks", 0, "path"), 3, "3 where str"),
        (("stages", 0, "blocks", 0, "norms"), "norm1", "'norm1' where tuple"),
        (("stages", 0, "coordinates", "side"), "inside", "'inside' where Literal"),
        (("stages", 0, "coordinates", "steps"), [1.5], "1.5 where "),
        (("stages", 0, "coordinates"), {"module": "x"}, "where Tap"),
        (("stages", 0, "position"), ["once"], "where Literal"),
        (("prefix_parameters", 0, "role"), "tokens", "'tokens' where Literal"),
        (("heads",), None, "None where tuple"),
        (("more",), 1, "where Anatomy"),
        (("source",), 1, "1 where str"),
    ],
)
def test_tampered_anatomies_are_refused(path, value, expected):
    with pytest.raises(AnatomyError, match=r"an anatomy holds .* where .* is expected") as caught:
        anatomy_from_json(tampered(path, value))
    assert expected in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}])
def test_what_is_no_anatomy_is_refused(value):
    with pytest.raises(AnatomyError, match=r"where Anatomy is expected"):
        anatomy_from_json(value)


def changed(anatomy: Anatomy, **fields: Any) -> Anatomy:
    """The anatomy with other fields in its first stage."""
    return replace(anatomy, stages=(replace(anatomy.stages[0], **fields), *anatomy.stages[1:]))


def test_what_an_anatomy_names_must_be_there():
    model, anatomy = BACKBONES["point_mae"].build(), described("point_mae")
    check_anatomy(model, anatomy)
    block = anatomy.blocks[0]

    def with_block(**fields: Any) -> Anatomy:
        return changed(anatomy, blocks=(replace(block, **fields), *anatomy.blocks[1:]))

    near = r"the anatomy names '{}', which PointTransformer has not; nearest: '{}'"
    wrong = {
        ("cls_head_finetun", "cls_head_finetune"): replace(anatomy, heads=("cls_head_finetun",)),
        ("nrom", "norm"): replace(anatomy, final_norms=("nrom",)),
        ("group_dividr", "group_divider"): changed(anatomy, coordinates=Tap(module="group_dividr", side="output")),
        ("reduce_dims", "reduce_dim"): changed(anatomy, patch_tokens=Tap(module="reduce_dims", side="output")),
        ("encodr", "encoder"): replace(anatomy, stem=("encodr",)),
        ("blocks.blocks.0.atn", "blocks.blocks.0.attn"): with_block(attention="blocks.blocks.0.atn"),
        ("blocks.blocks.0.mpl", "blocks.blocks.0.mlp"): with_block(mlp="blocks.blocks.0.mpl"),
    }
    for (name, nearest), stated in wrong.items():
        with pytest.raises(AnatomyError, match=near.format(name, nearest)):
            check_anatomy(model, stated)
    parameter = replace(anatomy.prefix_parameters[0], name="cls_tokn")
    with pytest.raises(AnatomyError, match=r"names the parameter 'cls_tokn', which is not there; .*'cls_token'"):
        check_anatomy(model, replace(anatomy, prefix_parameters=(parameter,)))
    for empty in (replace(anatomy, stages=()), changed(anatomy, blocks=())):
        with pytest.raises(AnatomyError, match=r"needs at least one stage, and every stage at least one block"):
            check_anatomy(model, empty)


# ---- stated in a configuration ---------------------------------------------------------------------------------------


def stated(anatomy: Anatomy, where: str) -> PeftConfig | LoraConfig:
    if where == "TunerConfig":
        return LoraConfig(anatomy=anatomy)
    return PeftConfig(tuners=(LoraConfig(),), anatomy=anatomy)


def randomised(model: PointPeftModel) -> PointPeftModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("where", ["TunerConfig", "PeftConfig"])
def test_an_anatomy_can_be_stated(where):
    backbone = BACKBONES["dict_in_dict_out"]
    anatomy = described("dict_in_dict_out")
    model = get_peft_model(backbone.build(), stated(anatomy, where))
    assert model.anatomy == anatomy
    found = get_peft_model(backbone.build(), LoraConfig(), example_inputs=backbone.example)
    assert [row.name for row in model.get_layer_status()] == [row.name for row in found.get_layer_status()]


def test_a_stated_anatomy_goes_through_json_with_its_configuration():
    for config in (stated(described("tuple_blocks"), "PeftConfig"), PeftConfig.of(LoraConfig())):
        assert isinstance(config, PeftConfig)
        data = json.loads(json.dumps(config.to_json()))
        assert ("anatomy" in data) == (config.anatomy is not None)
        assert PeftConfig.from_json(data) == config
    with pytest.raises(AnatomyError, match=r"where Literal is expected"):
        PeftConfig.from_json({"tuners": [{"method": "LORA"}], "anatomy": tampered(("stages", 0, "layout"), "x")})
    with pytest.raises(PointPeftError, match=r"LoraConfig.anatomy is 'traced'; allowed: Anatomy or None"):
        LoraConfig(anatomy="traced")  # type: ignore[arg-type]


def test_a_stated_field_is_gone_by():
    """Where coordinates are not found, they can be said; and a head that is not wanted left out."""
    backbone = BACKBONES["transformer_batch_first"]
    args, anatomy = backbone.inputs(3, 1), described("transformer_batch_first")
    with pytest.raises(AnatomyError, match=r"POINT_PEFT needs to know where"):
        get_peft_model(backbone.build(), PointPEFTConfig(memory_bank=False), example_inputs=args)
    right = changed(anatomy, coordinates=Tap(module="positions", side="input"), prefix_tokens=1, prompts=True)
    right = replace(right, heads=())
    with torch.no_grad():
        plain = backbone.build().requires_grad_(False)(*args)
        model = randomised(get_peft_model(backbone.build(), PointPEFTConfig(memory_bank=False, anatomy=right)))
        assert not torch.allclose(model(*args), plain, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(*args), plain)
    assert not any("classify" in name for name, _ in model.adapters.named_parameters())


def test_the_anatomy_of_a_traced_model_is_saved_with_the_adapter(tmp_path):
    backbone = BACKBONES["channels_first"]
    args = backbone.inputs(2, 5)
    model = randomised(
        get_peft_model(backbone.build(), PointPEFTConfig(memory_bank=False), example_inputs=backbone.example)
    )
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert anatomy_from_json(data["anatomy"]) == model.anatomy
    again = PointPeftModel.from_pretrained(backbone.build(), tmp_path).eval()
    assert again.anatomy == model.anatomy
    assert torch.equal(again(*args), model(*args))


def test_what_a_preset_tells_is_not_saved_and_what_corrects_it_is(tmp_path):
    backbone, anatomy = BACKBONES["point_mae"], described("point_mae")
    fewer = replace(anatomy, source="mine", heads=())
    for name, config in {"found": LoraConfig(), "corrected": LoraConfig(anatomy=fewer)}.items():
        model = randomised(get_peft_model(backbone.build(), config))
        model.save_pretrained(tmp_path / name)
        data = read_folder(tmp_path / name).record
        assert data is not None and ("mine" in json.dumps(data)) == (name == "corrected") and "anatomy" not in data
        again = PointPeftModel.from_pretrained(backbone.build(), tmp_path / name).eval()
        assert again.anatomy == (fewer if name == "corrected" else anatomy)
        assert torch.equal(again(*backbone.inputs(2, 5)), model(*backbone.inputs(2, 5)))


def test_the_methods_of_an_adapter_state_one_anatomy():
    anatomy = described("point_mae")
    other = replace(anatomy, heads=())
    tuners = (LoraConfig(anatomy=anatomy), BitFitConfig(anatomy=other))
    with pytest.raises(PointPeftError, match=r"anatomy: the methods of one adapter state different ones; state it in"):
        get_peft_model(BACKBONES["point_mae"].build(), PeftConfig(tuners=tuners))
    model = get_peft_model(BACKBONES["point_mae"].build(), PeftConfig(tuners=tuners, anatomy=other))
    assert model.anatomy == other
    for same in ((tuners[0], replace(tuners[1], anatomy=anatomy)), (tuners[0], replace(tuners[1], anatomy=None))):
        assert get_peft_model(BACKBONES["point_mae"].build(), PeftConfig(tuners=same)).anatomy == anatomy


def test_the_adapters_of_a_model_go_by_one_anatomy(tmp_path):
    anatomy = described("point_mae")
    other = changed(anatomy, mask_visible=True)
    model = get_peft_model(BACKBONES["point_mae"].build(), LoraConfig())
    with pytest.raises(AdapterError, match=r"states another anatomy than the one that the adapters .* go by"):
        model.add_adapter("second", LoraConfig(anatomy=other))
    assert list(model.adapters) == ["default"] and model.anatomy == anatomy
    model.add_adapter("second", LoraConfig(anatomy=replace(anatomy, source="somebody")))
    assert model.anatomy == anatomy
    get_peft_model(BACKBONES["point_mae"].build(), LoraConfig(anatomy=other)).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"does not fit this model: .* states another anatomy"):
        model.load_adapter(tmp_path, "third")
    for name in ("default", "second"):
        model.delete_adapter(name)
    model.add_adapter("anew", LoraConfig(anatomy=other))
    assert model.anatomy == other


def test_a_stated_anatomy_is_not_traced():
    """A model that tracing would refuse."""
    anatomy = trace(Unknown(), clouds(3, 0), {})
    with pytest.raises(AnatomyError, match=r"were never called"):
        get_peft_model(Piecewise(), LoraConfig(), example_inputs=clouds(3, 0))
    model = get_peft_model(Piecewise(), LoraConfig(anatomy=anatomy), example_inputs=clouds(3, 0))
    assert model.anatomy == anatomy


def test_the_next_anatomy_is_gone_by_once_all_adapters_are_deleted():
    """Its coordinates are seen in another place."""
    backbone, anatomy = BACKBONES["fused_positions"], described("fused_positions")
    args = backbone.inputs(2, 5)
    outputs = []
    places = (Tap(module="tokenizer", side="output", steps=(1,)), Tap(module="positions", side="input"))
    model = get_peft_model(backbone.build(), LoraConfig(anatomy=changed(anatomy, coordinates=places[1])))
    for tap in places:
        model.delete_adapter("default")
        torch.manual_seed(0)
        model.add_adapter("default", PointPEFTConfig(memory_bank=False, anatomy=changed(anatomy, coordinates=tap)))
        model.set_adapter("default")
        with torch.no_grad():
            outputs.append(randomised(model)(*args))
    assert model.anatomy == changed(anatomy, coordinates=places[1])
    assert torch.equal(*outputs)


def test_a_stated_anatomy_of_another_model_is_refused():
    model = BACKBONES["point_m2ae"].build()
    with pytest.raises(AnatomyError, match=r"names .*, which HierarchicalPointTransformer has not; nearest"):
        get_peft_model(model, LoraConfig(anatomy=described("point_mae")))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_anatomy_is_data():
    anatomy = described("recon_contrast")
    with pytest.raises(dataclasses.FrozenInstanceError):
        anatomy.source = "mine"  # type: ignore[misc]
    assert anatomy.stage_of(anatomy.blocks[-1]) == 0
    assert Tap(module="x", side="input") == Tap(module="x", side="input", steps=(0,))
    assert str(Tap(module="x", side="output", steps=(0, "feat"))) == "output[0].feat of 'x'"


def test_one_door_to_what_is_known():
    """Without an example the model is not run; with one, a preset is verified or what was traced replaces it."""
    known, unknown = BACKBONES["point_mae"], BACKBONES["channels_first"]
    assert understand(known.build()) == known_anatomy(known.build())
    assert understand(known.build(), known.inputs(3, 1)).source == "preset Point-MAE family"
    assert understand(unknown.build(), unknown.inputs(3, 1)) == unknown.traced
    with pytest.raises(AnatomyError, match=r"no preset describes .*: pass example_inputs=\(\.\.\.\), two or more"):
        understand(unknown.build())
    with pytest.raises(AnatomyError, match=r"no transformer block was found in Linear"):
        understand(nn.Linear(3, 3), clouds(2, 0))
