"""Point-PEFT: parity with the recorded numbers of the official code, and what ours promises beyond it."""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft import (
    AdapterError,
    Anatomy,
    AnatomyError,
    PointPEFTConfig,
    PointPeftError,
    PointPeftModel,
    bank,
    geometry,
    get_peft_model,
)
from point_peft.adapting.adapter import Adapter, get_adapter
from point_peft.anatomy.description import Stage, Tap
from point_peft.anatomy.structure import find_blocks
from point_peft.backbones import PointTransformer
from point_peft.backbones.layers import Block, Group
from point_peft.parts.propagation import Neighbourhoods, coordinates_of
from point_peft.parts.prototypes import prototypes
from point_peft.tuners.point_peft import prior
from point_peft.tuners.point_peft.adapter import MlpPart
from point_peft.tuners.point_peft.block import BlockPart
from point_peft.tuners.point_peft.local_attention import LocalAttention, StageGeometry
from point_peft.tuners.point_peft.prior import MemoryBank
from tests import golden
from tests.test_golden_base import Recorder, compare, grouping
from tests.zoo import BACKBONES

# ---- parity ----------------------------------------------------------------------------------------------------------

# Official names -> ours. What is not here has the same name in both: the base's own tensors, tuned or not.
RENAMED = {
    r"blocks\.blocks\.(\d+)\.prompt_embeddings": r"blocks.blocks.\1.point_peft.prompt.embeddings",
    r"blocks\.blocks\.(\d+)\.cp_adapter\.ln1\.": r"blocks.blocks.\1.point_peft.prompt.prior_adapter.down.",
    r"blocks\.blocks\.(\d+)\.cp_adapter\.ln2\.": r"blocks.blocks.\1.point_peft.prompt.prior_adapter.up.",
    r"blocks\.blocks\.(\d+)\.adapter\.ln1\.": r"blocks.blocks.\1.mlp.point_peft.adapter.down.",
    r"blocks\.blocks\.(\d+)\.adapter\.ln2\.": r"blocks.blocks.\1.mlp.point_peft.adapter.up.",
    r"blocks\.blocks\.(\d+)\.adapter1\.ln1\.": r"blocks.blocks.\1.point_peft.adapter.down.",
    r"blocks\.blocks\.(\d+)\.adapter1\.ln2\.": r"blocks.blocks.\1.point_peft.adapter.up.",
    r"blocks\.blocks\.(\d+)\.out_transform\.0\.": r"blocks.blocks.\1.point_peft.geometry.norm.",
    r"blocks\.attn1\.": r"point_peft.local_attention.",
    r"blocks\.norm3\.": r"point_peft.local_attention.norm.",
    r"prompt_cor$": r"point_peft.prompt_coordinates",
}
BANK = "point_peft.memory_bank.rows"
# Recorded of the released forward, whose geometry mixes samples; ours has none of it.
RELEASED = "released_forward"


def our_name(official: str) -> str:
    for pattern, replacement in RENAMED.items():
        renamed, count = re.subn("^" + pattern, replacement, official)
        if count:
            return renamed
    return official


def has_no_effect(official: str, late_from_layer: int) -> bool:
    """Official tensors that the forward never reads."""
    if official.endswith(".ad_gate"):
        return True
    prompt = re.match(r"blocks\.blocks\.(\d+)\.(prompt_embeddings|cp_adapter\.)", official)
    return prompt is not None and int(prompt[1]) >= late_from_layer


@dataclass
class Published:
    """The adapted model of a golden file, in eval mode, and what was recorded."""

    model: PointPeftModel
    base: PointTransformer
    config: dict[str, Any]
    points: Tensor
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def adapter(self) -> Adapter:
        return get_adapter(self.model, "default")

    def parts(self, number: int) -> tuple[BlockPart, MlpPart]:
        sites = dict(self.adapter.sites())
        (block,) = (p for p in sites[f"blocks.blocks.{number}"] if isinstance(p, BlockPart))
        (mlp,) = (p for p in sites[f"blocks.blocks.{number}.mlp"] if isinstance(p, MlpPart))
        return block, mlp

    @property
    def stage(self) -> StageGeometry:
        (state,) = (s for group in self.adapter.shared for s in group.children() if isinstance(s, StageGeometry))
        return state


def bank_and_query(description: dict[str, Any]) -> dict[str, Tensor]:
    """By the rule in the notes of the golden file; where it stores them too they are compared."""
    config, rng = description["config"], np.random.default_rng(description["points_seed"] + 1)
    bank = rng.standard_normal((config["trans_dim"], config["bank_columns"]))
    bank /= np.linalg.norm(bank, axis=0, keepdims=True)
    query = rng.standard_normal((config["B"], config["trans_dim"]))
    return {
        "bank": torch.from_numpy(bank.astype(np.float32)),
        "input.query": torch.from_numpy(query.astype(np.float32)),
    }


def published(name: str, base_differs: tuple[str, ...] = ()) -> Published:
    """The model of a golden file. The adapter holds all that is tuned.

    The base has other values there, in the tensors whose names start with one of `base_differs`.
    """
    description, expected = golden.load(name)
    config, weights = description["config"], golden.weights(description)
    names = ("trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "cls_dim")
    base = PointTransformer(**{name: config[name] for name in names})
    base.load_state_dict({name: weights[name] for name in base.state_dict()})
    late = config["late_from_layer"]
    model = get_peft_model(
        base,
        dataclasses.replace(
            PointPEFTConfig.published(),
            num_prompts=config["prompts"],
            prompt_layers=late,
            bank_dtype="float32",
            prior_adapter_width=len(weights["blocks.blocks.0.cp_adapter.ln1.weight"]),
            adapter_width=config["adapter_config"]["adapter_dim"],
            centre_ratio=config["second_groups"] / config["num_group"],
            neighbours=config["second_group_size"],
            local_attention_width=weights["blocks.attn1.proj.weight"].shape[1],
            # The head is tuned too, as published.
            modules_to_save=["cls_head_finetune"],
        ),
    ).eval()
    inputs = bank_and_query(description)
    adapter = get_adapter(model, "default")
    tensors, used = adapter.tensors(), set(base.state_dict())
    with torch.no_grad():
        for own in tensors.keys() & used:
            if own.startswith(base_differs) and tensors[own].is_floating_point():
                base.state_dict()[own].mul_(1.2).add_(1)
        for official, value in weights.items():
            if our_name(official) in tensors:
                tensors[our_name(official)].copy_(value)
                used.add(official)
    assert all(has_no_effect(official, late) for official in weights.keys() - used)
    kept = {f"point_peft.base.{name}" for name in ("cls_token", "cls_pos")}
    assert tensors.keys() - {our_name(official) for official in used} == {BANK, *kept}
    bank.banks_of(adapter, "default")[0].fill(inputs["bank"].T)
    # The recorded query in place of the model's own: the maximum over one token is the token.
    model.backbone_tokens = lambda forward, source, adapter: inputs["input.query"][:, None]  # type: ignore[method-assign]
    points = golden.points(description)
    inputs["input.points"] = points
    expected = {name: tensor for name, tensor in expected.items() if not name.startswith(RELEASED)}
    return Published(model=model, base=base, config=config, points=points, inputs=inputs, expected=expected)


def watch_geometry(setup: Published, number: int, kind: str) -> Recorder:
    """Which tokens are centres and neighbours at a block, under the golden names."""
    recorder = Recorder()
    block, _ = setup.parts(number)

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        near: Neighbourhoods = args[2].after(-1)  # without the class token
        # Not by the backbone's own grouping, with which another direct call of its parts would begin.
        index = geometry.farthest_point_sample(setup.points, setup.config["num_group"])
        centres = geometry.gather(setup.points, index)
        places = coordinates_of(centres, setup.stage.prompt_coordinates if kind == "early" else None)
        recorder.tensors[f"{kind}_centre_idx"] = near.centre
        recorder.tensors[f"{kind}_neighbour_idx"] = near.neighbour.sort(dim=2).values
        recorder.tensors[f"{kind}_centres"] = geometry.gather(places, near.centre)

    assert block.geometry is not None
    block.geometry.register_forward_pre_hook(keep)
    if block.prompt is not None:
        assert block.prompt.prior_adapter is not None
        recorder.input(block.prompt.prior_adapter, "cache_prompt")
    return recorder


def local_attention(module: LocalAttention, tokens: Tensor, near: Neighbourhoods) -> Tensor:
    """Terms that the local attention adds to each neighbour (b, s, k, c), neighbour by neighbour."""
    neighbours = geometry.gather(tokens, near.neighbour)
    normed = module.norm(neighbours)
    q, k, v = rearrange(module.qkv(normed), "b s k (qkv h c) -> qkv b s h k c", qkv=3, h=module.heads).unbind(0)
    mixed = (q @ k.transpose(-2, -1) * module.scale).softmax(dim=-1) @ v
    projected: Tensor = module.proj(rearrange(mixed, "b s h k c -> b s k (h c)"))
    return projected


def run_block(setup: Published, number: int, kind: str, tokens: Tensor) -> dict[str, Tensor]:
    """One block called directly, after the grouping has told its coordinates; its steps under the golden names."""
    block: Any = setup.base.blocks.blocks[number]
    part, mlp = setup.parts(number)
    recorder, chosen = Recorder(), watch_geometry(setup, number, kind)
    recorder.output(block.norm1, "attn_in")
    recorder.input(block.norm2, "after_attention")
    recorder.input(mlp.adapter, "mlp_out")
    recorder.output(mlp.adapter, "adapter_out")
    assert part.geometry is not None
    # What the projection gives to each neighbour is made nowhere: only its maximum is.
    part.geometry.register_forward_pre_hook(
        lambda module, args: recorder.tensors.update(
            local_attention_out=local_attention(setup.stage.local_attention, args[1], args[2])
        )
    )
    recorder.input(part.geometry.norm, "pool_in")
    recorder.output(part.geometry.norm, "pool_out")
    recorder.input(part.adapter, "adapter1_in")
    block.register_forward_hook(lambda module, args, output: recorder.tensors.update(raw=output), prepend=True)
    if part.prompt is not None and part.prompt.prior_adapter is not None:
        recorder.output(part.prompt.prior_adapter, "cp_adapter_out")
    recorder.tensors["block_out"] = block(tokens)
    found, count = dict(recorder.tensors), setup.config["prompts"] if kind == "early" else 0
    if "cp_adapter_out" in found:  # official: with its residual
        found["cp_adapter_out"] = found["cp_adapter_out"] + chosen.tensors["cache_prompt"]
    for name in ("pool_in", "pool_out"):
        found[name] = rearrange(found[name], "(b s) c -> b c s", b=len(tokens))
    found["pool_out"] = nn.functional.gelu(found["pool_out"])
    # The official adapter also sees the prompts, which then are thrown away.
    kept, prompts = found["adapter1_in"], found["raw"][:, 1 : 1 + count]
    found["adapter1_in"] = torch.cat([kept[:, :1], prompts, kept[:, 1:]], dim=1)
    first = setup.expected.get(f"{kind}.local_attention_out", found["local_attention_out"]).shape[1]
    found["local_attention_out"] = found["local_attention_out"][:, :first]
    return {**{f"{kind}.{name}": tensor for name, tensor in found.items()}, **chosen.tensors}


@torch.no_grad()
def test_one_early_and_one_late_block_reproduce_every_recorded_tensor() -> None:
    # Not the prefix tokens: the recorded input of the block has the official ones in it.
    setup = published("point_peft_block", base_differs=("blocks.", "norm."))
    config, base = setup.config, setup.base
    recorder = Recorder()
    prefix = (base.get_parameter("cls_token") + base.get_parameter("cls_pos")).expand(config["B"], -1, -1)
    recorder.output(base.group_divider, "centres", item=1)
    recorder.output(base.encoder, "patch_tokens")
    recorder.output(base.pos_embed, "pos")
    patches, centres = base.group_divider(setup.points)
    built = torch.cat([prefix, base.reduce_dim(base.encoder(patches)) + base.pos_embed(centres)], dim=1)
    tokens = setup.expected.get("block_in", built)
    early = run_block(setup, config["early_layer"], "early", tokens)
    late = run_block(setup, config["late_layer"], "late", tokens)
    ours = {**recorder.tensors, **grouping(setup.points, config), **setup.inputs, "block_in": built, **early, **late}
    compare(ours, setup.expected)


@pytest.mark.parametrize("base_differs", [(), ("",)], ids=["same base", "base differs in all that is tuned"])
@torch.no_grad()
def test_the_whole_model_reproduces_every_recorded_tensor(base_differs: tuple[str, ...]) -> None:
    setup = published("point_peft", base_differs)
    config, base = setup.config, setup.base
    recorder = Recorder()
    recorder.backbone(base)
    blocks: Any = base.blocks.blocks
    for number, block in enumerate(blocks):
        # What a block works on: the tuned prefix and the prompts come in between its call and its first norm.
        recorder.input(block.norm1, f"block_in.{number}")
    recorder.input(base.cls_head_finetune, "head_in")
    early = watch_geometry(setup, 0, "early")
    late = watch_geometry(setup, config["late_from_layer"], "late")
    logits = setup.model(setup.points)
    ours = {**recorder.tensors, **grouping(setup.points, config), **setup.inputs, "logits": logits}
    for number in range(config["late_from_layer"]):
        tokens = ours[f"block_in.{number}"]
        ours[f"block_in.{number}"] = torch.cat([tokens[:, :1], tokens[:, 1 + config["prompts"] :]], dim=1)
    compare({**ours, **early.tensors, **late.tensors}, setup.expected)


@torch.no_grad()
def test_a_changed_weight_moves_the_output_as_it_moves_the_official_one() -> None:
    setup = published("point_peft")
    description, _ = golden.load("point_peft")
    tensors = {**setup.base.state_dict(), **setup.adapter.tensors()}
    setup.inputs["input.query"] = setup.inputs["input.query"][:1]
    for name, change in description.get("weakest_effect_on_output_when_weight_becomes_1.1w+0.05", []):
        weight = tensors[our_name(name)]
        before = weight.clone()
        weight.mul_(1.1).add_(0.05)
        found = float((setup.model(setup.points[:1]) - setup.expected["logits"][:1]).abs().max())
        weight.copy_(before)
        assert found == pytest.approx(change, rel=0.05, abs=5e-6), name


# ---- a small model, and Point-PEFT once more in plain loops --------------------------------------------------------

SIZES: dict[str, Any] = {
    "trans_dim": 24, "depth": 4, "num_heads": 2, "num_group": 12, "group_size": 6, "encoder_dims": 24, "cls_dim": 5,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "num_prompts": 5, "neighbours": 4, "local_attention_width": 6, "local_attention_heads": 2, "adapter_width": 4,
    "prior_adapter_width": 3, "bank_dtype": "float32",
}  # fmt: skip


def clouds(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 48, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def bank_rows(count: int = 20, width: int = 24) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(5))


def small_base() -> PointTransformer:
    torch.manual_seed(0)
    base = PointTransformer(**SIZES)
    randomise(base, 0.1)
    return base.eval()


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 0.2) -> None:
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(scale * torch.randn_like(buffer))
        if name.endswith("running_var"):
            buffer.mul_(1 + scale * torch.rand_like(buffer))


def adapted(*, fresh: bool = False, bank: bool = True, late: bool = False, **options: Any) -> PointPeftModel:
    """A small adapted model in eval mode with a bank; unless fresh, with noise in everything that is trained.

    Adapted in its later blocks as by default, or else in all as published; both with gates.
    """
    model = get_peft_model(small_base(), small(late, **options), memory_bank=bank_rows() if bank else None)
    if not fresh:
        torch.manual_seed(1)
        randomise(get_adapter(model, "default"))
    return model.eval()


def small(late: bool, **options: Any) -> PointPEFTConfig:
    config = (
        PointPEFTConfig(memory_bank=True) if late else dataclasses.replace(PointPEFTConfig.published(), init="identity")
    )
    return dataclasses.replace(config, **{**SMALL, **options})


def bank_of(model: PointPeftModel) -> MemoryBank:
    (memory,) = bank.banks_of(get_adapter(model, "default"), "default")
    assert isinstance(memory, MemoryBank)
    return memory


def retrieve(query: Tensor, rows: Tensor, top_k: int, skip: int = 0) -> Tensor:
    """The prior (2 + top_k, c) of one query (c,), as published."""
    rows = rows / rows.norm(dim=1, keepdim=True)
    return attended(query, query / query.norm(), rows, top_k, skip, temperature=1.0)


def retrieve_standardised(query: Tensor, rows: Tensor, top_k: int, temperature: float) -> Tensor:
    """The prior (2 + top_k, c) of one query (c,), compared channel by channel with what is usual in the bank."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    mean, deviation = unit.mean(dim=0), unit.std(dim=0, correction=0)

    def direction(row: Tensor) -> Tensor:
        return nn.functional.normalize((row / row.norm() - mean) / deviation, dim=0)

    compared = direction(query)
    return attended(compared, compared, torch.stack([direction(row) for row in rows]), top_k, 0, temperature)


def attended(q: Tensor, compared: Tensor, rows: Tensor, top_k: int, skip: int, temperature: float) -> Tensor:
    """[q; f; V] with the rows V that are most like what q is compared as."""
    similarity = torch.stack([torch.dot(compared, row) for row in rows])
    best = similarity.argsort(descending=True)[skip : skip + top_k]
    weights = (temperature * similarity[best]).exp() / (temperature * similarity[best]).exp().sum()
    mean = sum((w * rows[i] for w, i in zip(weights, best, strict=True)), torch.zeros_like(q))
    return torch.stack([q, mean, *rows[best]])


def naive(model: PointPeftModel, cloud: Tensor, rows: Tensor | None) -> Tensor:
    """Logits of one cloud (n, 3), by the equations, one neighbourhood and one token after the other."""
    config = get_adapter(model, "default").config.tuners[0]
    assert isinstance(config, PointPEFTConfig)
    tensors = get_adapter(model, "default").tensors()
    base: Any = copy.deepcopy(small_base())
    base.load_state_dict({name: tensors.get(name, tensor) for name, tensor in base.state_dict().items()})
    with model.disable_adapter():
        query = model.forward_features(cloud[None])[0, 1:].amax(dim=0)
    assert config.num_prompts is not None
    top_k = config.num_prompts - 2 if config.top_k is None else config.top_k
    first = round((1 - (config.adapted_share or 0.5)) * len(base.blocks.blocks))

    def part(start: str) -> dict[str, Tensor]:
        return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

    def bottleneck(x: Tensor, at: str) -> Tensor:
        p = part(at + ".")
        hidden = x @ p["down.weight"].T + p["down.bias"]
        return hidden * torch.sigmoid(1.702 * hidden) @ p["up.weight"].T + p["up.bias"]

    shared = part("point_peft.")

    def attend(near: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(
            near, near.shape[1:], shared["local_attention.norm.weight"], shared["local_attention.norm.bias"]
        )
        width = config.local_attention_width
        q, k, v = (normed @ shared["local_attention.qkv.weight"].T).split(width, dim=1)
        heads = []
        for h in torch.arange(width).chunk(config.local_attention_heads):
            heads.append((q[:, h] @ k[:, h].T / width**0.5).softmax(dim=1) @ v[:, h])
        proj = torch.cat(heads, dim=1) @ shared["local_attention.proj.weight"].T
        return near + proj + shared["local_attention.proj.bias"]

    patches, centres = base.group_divider(cloud[None])
    x, c = torch.cat([base.cls_token[0], base.encoder(patches)[0]]), centres[0]
    pos = torch.cat([base.cls_pos[0], base.pos_embed(c)])
    for number, block in enumerate(base.blocks.blocks):
        own = part(f"blocks.blocks.{number}.point_peft.")
        x, places = x + pos, c
        if number < first:
            assert not own
            x = block(x[None])[0]
            continue
        if number == first and config.prior == "block":
            query = x[1:].amax(dim=0)
        if "prefix_shift" in own:
            x = torch.cat([x[:1] + own["prefix_shift"], x[1:]])
        p = part(f"blocks.blocks.{number}.point_peft.neighbourhood.")
        for i in range(len(c) if p else 0):
            dilation = min(config.neighbourhood_dilation, len(cloud) // config.neighbourhood_points)
            near = cloud[(cloud - c[i]).norm(dim=1).argsort()[: dilation * config.neighbourhood_points : dilation]]
            reach = (near - c[i]).norm(dim=1).max()
            features = []
            for point in near:
                seen = p["embed.weight"] @ torch.cat([(point - c[i]) / reach, c[i], reach[None]]) + p["embed.bias"]
                seen = nn.functional.layer_norm(seen, seen.shape, p["norm.weight"], p["norm.bias"])
                features.append(p["features.weight"] @ nn.functional.gelu(seen) + p["features.bias"])
            pooled = torch.stack(features).amax(dim=0)
            pooled = nn.functional.layer_norm(pooled, pooled.shape, p["pooled_norm.weight"], p["pooled_norm.bias"])
            x[1 + i] += p["proj.weight"] @ nn.functional.gelu(pooled) + p["proj.bias"]
        prompts = x[:0]
        if "prompt.embeddings" in own:
            prompts, places = own["prompt.embeddings"].clone(), torch.cat([shared["prompt_coordinates"], c])
            if rows is not None:
                if config.standardised:
                    found = retrieve_standardised(query, rows, top_k, config.temperature)
                else:
                    found = retrieve(query, rows, top_k)
                found = found + bottleneck(found, f"blocks.blocks.{number}.point_peft.prompt.prior_adapter")
                prompts[: 2 + top_k] += found
        x = torch.cat([x[:1], prompts, x[1:]])[None]
        x = x + block.attn(block.norm1(x))
        h = block.mlp(block.norm2(x))
        x = (x + h + config.adapter_scale * bottleneck(h, f"blocks.blocks.{number}.mlp.point_peft.adapter"))[0]
        tokens, t = x[1:], x[1 + len(prompts) :].clone()
        values = []
        centre = geometry.farthest_point_sample(places[None], round(config.centre_ratio * len(c)))[0]
        for j in centre:
            near = (places - places[j]).norm(dim=1).argsort()[: config.neighbours]
            pooled = attend(tokens[near]).amax(dim=0)
            if config.pooling_norm == "batch":
                spread = (own["geometry.norm.running_var"] + 1e-5).sqrt()
                normed = (pooled - own["geometry.norm.running_mean"]) / spread
            else:
                normed = (pooled - pooled.mean()) / (pooled.var(unbiased=False) + 1e-5).sqrt()
            normed = normed * own["geometry.norm.weight"] + own["geometry.norm.bias"]
            values.append(nn.functional.gelu(normed) + config.centre_scale * tokens[j])
        for i in range(len(t)):
            weights = [1 / ((c[i] - places[j]).square().sum() + 1e-8) for j in centre]
            carried = sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros(())) / sum(weights)
            t[i] += config.propagation_scale * own.get("geometry.gate", torch.ones(())) * carried
        x = torch.cat([x[:1], t])
        x = x + bottleneck(x, f"blocks.blocks.{number}.point_peft.adapter")
    logits: Tensor = base.forward_head(base.norm(x)[None])[0]
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "published"},
        {"pooling_norm": "layer"},
        {"prompt_layers": 4, "top_k": 2, "centre_ratio": 0.25, "neighbours": 3},
        {"memory_bank": False, "num_prompts": 1, "adapter_scale": 0.4, "propagation_scale": 0.8, "centre_scale": 0.6},
        {"num_prompts": 0},
        {"late": True},
        {"late": True, "num_prompts": 0, "neighbourhood_width": 24, "neighbourhood_dilation": 1},
        {"late": True, "neighbourhood_width": 0},
        {"late": True, "init": "published", "pooling_norm": "layer", "temperature": 5.0},
        {"late": True, "adapted_share": 0.75, "prompt_layers": 2, "top_k": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_it_equals_the_equations_in_plain_loops(options: dict[str, Any]) -> None:
    has_bank = options.get("memory_bank", True) and options.get("num_prompts", 5) > 0
    model, points = adapted(bank=has_bank, **options), clouds(3)
    expected = torch.stack([naive(model, cloud, bank_rows() if has_bank else None) for cloud in points])
    with model.disable_adapter():
        assert float((model(points) - expected).abs().max()) > 0.05
    golden.assert_close(model(points), expected)
    golden.assert_close(torch.cat([model(cloud[None]) for cloud in points]), expected)


# ---- parameters and identity ---------------------------------------------------------------------------------------

COUNTS = {
    r".*prompt\.prior_adapter\..*": 39_216,
    r".*prompt\.embeddings": 23_040,
    r".*\.mlp\.point_peft\.adapter\..*": 152_256,
    r"blocks\.blocks\.\d+\.point_peft\.adapter\..*": 152_256,
    r".*geometry\.norm\.(weight|bias)": 9_216,
    r"point_peft\.local_attention\.(qkv|proj)\..*": 28_032,
    r"point_peft\.local_attention\.norm\..*": 768,
    r"point_peft\.prompt_coordinates": 30,
    r"cls_(token|pos)": 768,
    r"norm\.(weight|bias)": 768,
    r"blocks\.blocks\.\d+\.(norm1|norm2|attn\.proj|mlp\.fc1|mlp\.fc2)\.bias": 36_864,
}


def test_the_parameters_on_point_mae_are_those_of_the_paper_that_have_an_effect() -> None:
    with torch.device("meta"):
        base = PointTransformer()
    published = PointPEFTConfig.published()
    model = get_peft_model(base, dataclasses.replace(published, modules_to_save=[]))
    counts = dict.fromkeys(COUNTS, 0)
    for name, tensor in get_adapter(model, "default").tensors().items():
        if isinstance(tensor, nn.Parameter):
            (kind,) = (pattern for pattern in COUNTS if re.fullmatch(pattern, name))
            counts[kind] += tensor.numel()
    assert counts == COUNTS
    assert model.get_nb_trainable_parameters()[0] == sum(COUNTS.values()) == 443_214
    model.add_adapter("identity", dataclasses.replace(published, init="identity", modules_to_save=[]))
    model.freeze_adapter("default")
    assert model.get_nb_trainable_parameters()[0] == 443_226  # and a gate for each of the 12 blocks
    model.add_adapter("head", published)
    model.freeze_adapter("identity")
    assert model.get_nb_trainable_parameters()[0] == 443_214 + 267_535


def test_the_parameters_of_the_later_blocks_are_about_half() -> None:
    with torch.device("meta"):
        model = get_peft_model(PointTransformer(), PointPEFTConfig(memory_bank=True, modules_to_save=[]))
    shared, halves = 28_032 + 768 + 30 + 768, 23_040 + 39_216 + 2 * 152_256 + 9_216 + 36_864
    around = (7 * 64 + 3 * 64) + (64 * 128 + 3 * 128) + (128 * 384 + 384)
    # And a gate a block, and what the class token is as it enters them in place of the token and its position.
    assert model.get_nb_trainable_parameters()[0] == shared + halves // 2 + around + 6 + 384 == 295_164


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [{"prompt_layers": 0}, {"num_prompts": 0}])
@torch.no_grad()
def test_a_fresh_adapter_without_prompts_is_the_backbone_bit_for_bit(options: dict[str, Any], late: bool) -> None:
    points, expected = clouds(3), small_base()(clouds(3))
    model = adapted(fresh=True, bank=False, late=late, **options)
    assert PointPEFTConfig(**options).identity_at_init
    assert torch.equal(model(points), expected)
    randomise(get_adapter(model, "default"))
    assert not torch.allclose(model(points), expected, atol=1e-2)


@torch.no_grad()
def test_a_fresh_adapter_is_the_backbone_and_its_prompts() -> None:
    model, base, points = adapted(fresh=True), small_base(), clouds(2)
    tensors = get_adapter(model, "default").tensors()
    query = base.forward_features(points)[:, 1:].amax(dim=1)
    found = torch.stack([retrieve(q, bank_rows(), 3) for q in query])
    blocks: Any = base.blocks.blocks
    for number in range(2):
        prompts = tensors[f"blocks.blocks.{number}.point_peft.prompt.embeddings"] + found
        blocks[number].register_forward_pre_hook(lambda _, args, p=prompts: torch.cat([args[0], p], dim=1))
        blocks[number].register_forward_hook(lambda _, args, output: output[:, :-5])
    golden.assert_close(model(points), base(points))
    assert not PointPEFTConfig().identity_at_init


def test_the_published_start_is_no_identity() -> None:
    config = PointPEFTConfig(init="published", prompt_layers=0)
    assert not config.identity_at_init
    model, points = get_peft_model(small_base(), config).eval(), clouds(2)
    with torch.no_grad():
        assert not torch.allclose(model(points), small_base()(points), atol=1e-2)


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_prompts", -1, "0 or more"),
        ("num_prompts", 2, r"0, or 3 or more with a memory bank \(2 \+ top_k\)"),
        ("num_prompts", 2.0, "an integer"),
        ("prompt_layers", -1, "0 or more"),
        ("prompt_layers", True, "an integer.* or None"),
        ("prompt_dropout", 1.0, "0 or more and less than 1"),
        ("prompt_dropout", -0.1, "0 or more and less than 1"),
        ("memory_bank", 1, "True or False"),
        ("bank_dtype", "int8", "'float16' or 'float32'"),
        ("top_k", 0, "1 to num_prompts - 2 = 8, or None"),
        ("top_k", 9, "1 to num_prompts - 2 = 8, or None"),
        ("leave_nearest_out", None, "True or False"),
        ("prior", "head", "'block' or 'backbone' or 'stem'"),
        ("adapted_share", 0.0, "more than 0 and at most 1"),
        ("adapted_share", 1.5, "more than 0 and at most 1"),
        ("standardised", 1, "True or False"),
        ("temperature", float("inf"), "a finite number"),
        ("neighbourhood_width", -1, "0 or more"),
        ("neighbourhood_points", 0, "1 or more"),
        ("neighbourhood_dilation", 0, "1 or more"),
        ("prior_adapter_width", 0, "1 or more"),
        ("adapter_width", 0, "1 or more"),
        ("adapter_dropout", 1.5, "0 or more and less than 1"),
        ("adapter_scale", -1.0, "0 or more"),
        ("adapter_scale", float("nan"), "a finite number"),
        ("centre_ratio", 0.0, "more than 0 and at most 1"),
        ("centre_ratio", 1.01, "more than 0 and at most 1"),
        ("neighbours", 0, "1 or more"),
        ("local_attention_width", 0, "1 or more"),
        ("local_attention_width", 16, "a multiple of local_attention_heads=6"),
        ("local_attention_heads", 0, "1 or more"),
        ("local_attention_drop_path", 1.0, "0 or more and less than 1"),
        ("propagation_scale", -0.1, "0 or more"),
        ("centre_scale", float("inf"), "a finite number"),
        ("pooling_norm", "group", "'batch' or 'layer'"),
        ("tuned_biases", 3, "a string or a list of a string or None"),
        ("tuned_norms", [1], "a string or a list of a string or None"),
        ("tuned_tokens", [None], "a string or a list of a string or None"),
        ("init", "zero", "'identity' or 'published'"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(PointPeftError, match=rf"{field}.*allowed: {allowed}"):
        PointPEFTConfig(**{"memory_bank": True, field: value})


def test_ten_prompts_where_nothing_is_stated_and_they_have_a_place() -> None:
    default, ten = (adapted(fresh=True, bank=False, num_prompts=count) for count in (None, 10))
    named = [get_adapter(model, "default").tensors() for model in (default, ten)]
    assert {name: tensor.shape for name, tensor in named[0].items()} == {n: t.shape for n, t in named[1].items()}
    assert "no prompts" not in default.trainable_parameters_report()


def test_two_prompts_suffice_without_a_bank() -> None:
    assert PointPEFTConfig(num_prompts=2, memory_bank=False).num_prompts == 2


def test_what_is_tuned_of_the_base_can_be_chosen() -> None:
    own = set(small_base().state_dict())
    some = adapted(
        modules_to_save=[], tuned_biases=["blocks.1.mlp.fc1"], tuned_norms=["blocks.0.norm1"], tuned_tokens=["cls_pos"]
    )
    tensors = get_adapter(some, "default").tensors()
    chosen = {"blocks.blocks.1.mlp.fc1.bias", "blocks.blocks.0.norm1.weight", "blocks.blocks.0.norm1.bias", "cls_pos"}
    assert tensors.keys() & own == chosen
    none = adapted(modules_to_save=[], tuned_biases=[], tuned_norms=[], tuned_tokens=[])
    assert not get_adapter(none, "default").tensors().keys() & own
    named = adapted(late=True, modules_to_save=[], tuned_biases=[], tuned_norms=[], tuned_tokens=["cls_pos"])
    trained = [name for name, _ in named.named_parameters() if name.endswith(("cls_pos", "prefix_shift"))]
    assert get_adapter(named, "default").tensors().keys() & own == {"cls_pos"} and len(trained) == 2


# ---- retrieval -----------------------------------------------------------------------------------------------------


def filled(rows: Tensor, top_k: int, *, leave_nearest_out: bool = False) -> MemoryBank:
    bank = MemoryBank(
        rows.shape[1],
        top_k,
        "backbone",
        torch.float32,
        leave_nearest_out=leave_nearest_out,
        standardised=False,
        temperature=1.0,
    )
    bank.fill(rows)
    return bank


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("top_k", [1, 8, 20])
def test_retrieval_equals_a_naive_one(monkeypatch: pytest.MonkeyPatch, chunk: int, top_k: int) -> None:
    monkeypatch.setattr(prior, "CHUNK_ROWS", chunk)
    rows, query = bank_rows(), torch.randn(3, 24, generator=torch.Generator().manual_seed(9))
    expected = torch.stack([retrieve(q, rows, top_k) for q in query])
    torch.testing.assert_close(filled(rows, top_k).prior(query), expected)


def test_the_nearest_row_is_left_out_while_training_only() -> None:
    rows = bank_rows()
    bank = filled(rows, 4, leave_nearest_out=True)
    without = torch.stack([retrieve(q, rows, 4, skip=1) for q in rows])
    torch.testing.assert_close(bank.train().prior(rows), without)
    torch.testing.assert_close(bank.eval().prior(rows), torch.stack([retrieve(q, rows, 4) for q in rows]))
    torch.testing.assert_close(bank.eval().prior(rows)[:, 2], nn.functional.normalize(rows, dim=1))


def test_retrieval_is_not_coarser_under_autocast() -> None:
    # Rows whose similarities to the query differ by less than a step of bfloat16.
    rows = torch.ones(16, 24) + 0.02 * bank_rows(16)
    bank, query = filled(rows, 8), torch.ones(2, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bank.prior(query)
    assert torch.equal(found, bank.prior(query))


def test_the_bank_is_kept_at_unit_length_in_the_type_asked_for() -> None:
    bank = bank_of(adapted(bank_dtype="float16"))
    assert bank.rows.dtype == torch.float16 and bank.rows.shape == (20, 24)
    torch.testing.assert_close(bank.rows.float().norm(dim=1), torch.ones(20), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(20, 8), r"is \(rows, 24\) here, got \(20, 8\)"),
        (torch.ones(24), r"is \(rows, 24\) here, got \(24,\)"),
        (torch.ones(2, 24), "has 2 rows, retrieval of the top 3 needs at least 3"),
        (torch.zeros(20, 24), "finite and not zero"),
        (torch.full((20, 24), torch.inf), "finite and not zero"),
    ],
)
def test_a_bank_that_does_not_fit_is_refused(rows: Tensor, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        get_peft_model(small_base(), small(late=True), memory_bank=rows)
    with pytest.raises(AdapterError, match="needs at least 4"):
        filled(bank_rows(3), 3, leave_nearest_out=True)


def test_an_empty_bank_is_told_of_once() -> None:
    model = adapted(bank=False)
    with pytest.warns(UserWarning, match=r"memory bank is empty.*build_memory_bank") as told:
        found = model(clouds(2))
    assert len(told) == 1
    assert torch.equal(model(clouds(2)), found)
    with torch.no_grad():
        golden.assert_close(found[0], naive(model, clouds(2)[0], None))


# ---- building the bank ---------------------------------------------------------------------------------------------


def features(points: Tensor, source: str) -> Tensor:
    """The features (b, c) that a bank should hold, of unit length."""
    base = small_base()
    with torch.no_grad():
        patches, _ = base.group_divider(points)
        tokens = base.encoder(patches) if source == "stem" else base.forward_features(points)[:, 1:]
    return nn.functional.normalize(tokens.amax(dim=1), dim=1)


def in_order(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("source", ["backbone", "stem"])
def test_a_bank_holds_the_features_of_the_frozen_backbone(source: str) -> None:
    points = clouds(10)
    expected = in_order(features(points, source))
    model = adapted(bank=False, prior=source)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    for name, batches in {
        "one batch": [points],
        "split": points.split(3),
        "another order": points[order].split(4),
        "with labels": [(half, torch.zeros(5, dtype=torch.int64)) for half in points.split(5)],
        "each twice": [points, points],
    }.items():
        model.build_memory_bank(batches)
        assert bank_of(model).rows.shape == expected.shape, name
        torch.testing.assert_close(in_order(bank_of(model).rows), expected, msg=name)
    randomise(get_adapter(model, "default"))
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    model.build_memory_bank([{"points": points}], to_inputs=lambda batch: batch, adapter_name="default")
    torch.testing.assert_close(in_order(bank_of(model).rows), expected)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert model.active_adapters == ("default",)


@pytest.mark.parametrize("source", ["backbone", "stem"])
def test_a_training_cloud_finds_itself_in_the_bank(source: str) -> None:
    model, points = adapted(bank=False, prior=source), clouds(10)
    model.build_memory_bank(points.split(4))
    priors: list[Tensor] = []
    sites = dict(get_adapter(model, "default").sites())
    (part,) = (p for p in sites["blocks.blocks.0"] if isinstance(p, BlockPart))
    assert part.prompt is not None
    part.prompt.register_forward_pre_hook(lambda module, args: priors.append(args[1]))
    for mode in (False, True):
        model.train(mode)(points)
        torch.testing.assert_close(priors[-1][:, 2], features(points, source))
        torch.testing.assert_close(nn.functional.normalize(priors[-1][:, 0], dim=1), features(points, source))


class RandomGroup(Group):
    """Grouping that begins at a random point while training."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(points.shape[1]) if self.training else torch.arange(points.shape[1])
        return super().forward(points[:, order])


@pytest.mark.parametrize("source", ["backbone", "stem"])
def test_a_bank_is_built_in_eval_mode_even_of_a_model_that_is_random_in_training(source: str) -> None:
    base, points = small_base(), clouds(10)
    base.group_divider = RandomGroup(SIZES["num_group"], SIZES["group_size"])
    model = get_peft_model(base, small(late=False, prior=source)).train()
    model.build_memory_bank([points])
    torch.testing.assert_close(in_order(bank_of(model).rows), in_order(features(points, source)))
    assert base.group_divider.training


def test_what_cannot_be_made_a_bank_is_refused_and_the_bank_kept() -> None:
    model, points = adapted(), clouds(6)
    labels = torch.arange(6)
    before = bank_of(model).rows
    wrong: list[tuple[list[Any], dict[str, Any], str]] = [
        ([], {}, "got no batches"),
        ([{"points": points}], {}, "not dict: pass to_inputs="),
        ([["a"]], {}, "not list: pass to_inputs="),
        ([points], {"size": 0}, "size is 0; allowed: 1 or more, or None"),
        ([points], {"size": True}, "size is True; allowed: 1 or more, or None"),
        ([points], {"size": 3.0}, "size is 3.0; allowed: 1 or more, or None"),
        ([(points, labels)], {"size": 5}, "6 rows cannot be reduced to 5: there are 6 classes"),
        ([points[:2]], {}, "has 2 rows"),
        ([points], {"size": 2}, "has 2 rows"),
        ([points], {"adapter_name": "other"}, "there is no adapter 'other'"),
    ]
    for batches, options, message in wrong:
        with pytest.raises(PointPeftError, match=message):
            model.build_memory_bank(batches, **options)
    assert bank_of(model).rows is before
    with pytest.raises(AdapterError, match=r"adapter 'default' \(POINT_PEFT\) has no memory bank"):
        adapted(bank=False, memory_bank=False).build_memory_bank([points])
    with pytest.raises(AdapterError, match="has no memory bank"):
        adapted(bank=False, memory_bank=False, fresh=True).add_adapter(
            "x", PointPEFTConfig(memory_bank=False), memory_bank=bank_rows()
        )


def classes() -> tuple[Tensor, Tensor]:
    """Features of three classes, of 40, 10 and 2 members, each class around a direction of its own."""
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 2)
    return 5 * torch.eye(24)[labels] + 0.3 * bank_rows(52), labels


@pytest.mark.parametrize(("size", "shares"), [(3, [1, 1, 1]), (6, [2, 2, 2]), (12, [5, 5, 2]), (30, [18, 10, 2])])
def test_prototypes_are_balanced_over_the_classes(size: int, shares: list[int]) -> None:
    rows, labels = classes()
    found = prototypes(rows, labels, size)
    assert found.shape == (size, 24)
    assert found[:, :3].argmax(dim=1).bincount(minlength=3).tolist() == shares
    assert torch.equal(found, prototypes(rows, labels, size))


def test_prototypes_without_labels_are_the_means_of_the_clusters() -> None:
    rows, labels = classes()
    unit = nn.functional.normalize(rows, dim=1)
    means = torch.stack([nn.functional.normalize(unit[labels == label].sum(dim=0), dim=0) for label in range(3)])
    found = prototypes(rows, None, 3)
    torch.testing.assert_close(found[found[:, :3].argmax(dim=1).argsort()], means)
    assert prototypes(rows, None, 52) is rows and prototypes(rows, labels, 99) is rows
    alike = prototypes(torch.ones(9, 24), None, 4)  # fewer clusters than asked for: some are empty
    assert alike.shape == (4, 24) and bool(torch.isfinite(alike).all())


def test_a_bank_can_be_reduced_per_class() -> None:
    model, points, labels = adapted(bank=False), clouds(12), torch.arange(12) % 3
    model.build_memory_bank([(points, labels)], size=6)
    first = bank_of(model).rows
    assert first.shape == (6, 24)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    model.build_memory_bank(zip(points[order].split(4), labels[order].split(4), strict=True), size=6)
    torch.testing.assert_close(bank_of(model).rows, first)
    with pytest.warns(UserWarning, match="12 rows of the memory bank were reduced to 4 without labels"):
        model.build_memory_bank([points], size=4)
    assert bank_of(model).rows.shape == (4, 24)


# ---- the second pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("call", ["forward", "forward_features"])
def test_the_second_pass_shares_the_stem_and_stops_at_the_last_block(mode: bool, call: str) -> None:
    model, points = adapted().train(mode), clouds(6)
    base: Any = model.get_base_model()
    seen: dict[str, int] = {}
    inside = ("encoder.first_conv", "blocks.blocks.3", "norm", "cls_head_finetune")
    for name in inside:
        base.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: seen.get(name, 0) + 1})
        )
    output = (model if call == "forward" else getattr(model, call))(points)
    head = {} if call == "forward_features" else {"cls_head_finetune": 1}
    assert seen == {"encoder.first_conv": 1, "blocks.blocks.3": 2, "norm": 2, **head}
    assert output.requires_grad


@torch.no_grad()
def test_the_query_is_the_feature_of_the_backbone_without_adapters() -> None:
    model, points = adapted(), clouds(4)
    with model.disable_adapter():
        tokens = model.forward_features(points)[:, 1:]
    found, by_hand = model(points), copy.deepcopy(model)
    by_hand.backbone_tokens = lambda forward, source, adapter: tokens  # type: ignore[method-assign]
    assert torch.equal(found, by_hand(points))
    by_hand.backbone_tokens = lambda forward, source, adapter: tokens.flip(0)  # type: ignore[method-assign]
    assert not torch.allclose(found, by_hand(points), atol=1e-3)


def test_the_stem_prior_takes_no_second_pass_and_works_for_direct_calls() -> None:
    model, points = adapted(prior="stem"), clouds(4)
    base: Any = model.get_base_model()
    seen: list[int] = []
    base.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model(points)
    assert seen == [4]
    tokens: list[Tensor] = []
    base.blocks.blocks[0].norm1.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    patches, centres = base.group_divider(points)
    base.pos_embed(centres)
    patches = base.reduce_dim(base.encoder(patches))
    base.blocks.blocks[0](torch.cat([base.cls_token.expand(4, -1, -1), patches], dim=1))
    assert tokens[0].shape == (4, 13 + 5, 24)


def test_the_backbone_prior_tells_that_a_direct_call_has_none() -> None:
    base: Any = adapted().get_base_model()
    base.pos_embed(base.group_divider(clouds(2))[1])
    with pytest.raises(AdapterError, match=r'needs a call of the model itself.*prior="stem"'):
        base.blocks.blocks[0](torch.zeros(2, 13, 24))


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("late", "source"), [(False, "backbone"), (False, "stem"), (False, "block"), (True, "block"), (True, "backbone")]
)
@pytest.mark.parametrize("init", ["identity", "published"])
def test_every_trained_tensor_gets_a_gradient_and_nothing_else(init: str, late: bool, source: str) -> None:
    model = adapted(init=init, late=late, prior=source).train()
    torch.manual_seed(2)
    nn.functional.cross_entropy(model(clouds(10)), torch.arange(10) % 5).backward()
    own = {id(parameter) for parameter in get_adapter(model, "default").parameters()}
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moved == (id(parameter) in own), name


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_are_run_again_in_the_backward_pass_give_the_same_gradients(reentrant: bool, late: bool) -> None:
    """Blocks share the prompts' coordinates and the prior; each must be able to make again what it takes of them."""

    def gradients(again: bool) -> dict[str, Tensor]:
        model = adapted(prompt_layers=3, late=late)
        base: Any = model.get_base_model()

        def run(tokens: Tensor, pos: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
            for block in base.blocks.blocks:
                repeat = again and torch.is_grad_enabled()
                tokens = tokens + pos
                tokens = checkpoint(block, tokens, use_reentrant=reentrant) if repeat else block(tokens)
            return [tokens]

        base.blocks.forward = run
        base.pos_embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
        model(clouds(4)).square().sum().backward()
        parameters = get_adapter(model, "default").named_parameters()
        return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}

    expected = gradients(False)
    assert len(expected) == len(list(get_adapter(adapted(prompt_layers=3, late=late), "default").parameters()))
    torch.testing.assert_close(gradients(True), expected)


def test_a_batch_of_one_can_be_trained_with_the_layer_norm() -> None:
    model = adapted(pooling_norm="layer", modules_to_save=[], centre_ratio=0.05).train()
    model(clouds(1)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        adapted(modules_to_save=[], centre_ratio=0.05).train()(clouds(1))


def test_dropout_and_stochastic_depth_act_in_training_only() -> None:
    quiet: dict[str, Any] = {"prompt_dropout": 0.0, "adapter_dropout": 0.0, "local_attention_drop_path": 0.0}
    for noisy in quiet:
        model = adapted(**{**quiet, noisy: 0.9, "pooling_norm": "layer", "modules_to_save": []})
        base: Any = model.get_base_model()
        expected = model(clouds(2))
        model.train()
        base.eval()
        first, second = model(clouds(2)), model(clouds(2))
        assert not torch.allclose(first, second, atol=1e-4), noisy
        assert torch.equal(model.eval()(clouds(2)), expected), noisy


def test_the_statistics_of_the_pooling_norm_belong_to_the_adapter_and_move() -> None:
    model = adapted(fresh=True).train()
    frozen = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    name = "blocks.blocks.3.point_peft.geometry.norm.running_mean"
    before = get_adapter(model, "default").tensors()[name].clone()
    model(clouds(4))
    assert not torch.equal(get_adapter(model, "default").tensors()[name], before)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.get_base_model().state_dict().items())


# ---- stages --------------------------------------------------------------------------------------------------------


class TwoStages(nn.Module):
    """16 tokens of width 12, then 8 of width 24; two blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.group_a, self.group_b = Group(16, 6), Group(8, 2)
        self.embed, self.widen = nn.Linear(3, 12), nn.Linear(12, 24)
        self.first = nn.ModuleList([Block(12, 2, 0.0), Block(12, 2, 0.0)])
        self.second = nn.ModuleList([Block(24, 2, 0.0), Block(24, 2, 0.0)])
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, points: Tensor) -> Tensor:
        _, centres = self.group_a(points)
        tokens = self.embed(centres)
        for block in self.first:
            tokens = block(tokens)
        _, _ = self.group_b(centres)
        tokens = self.widen(tokens[:, :8] + tokens[:, 8:])
        for block in self.second:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).amax(dim=1))
        return logits


def two_stages(patch_tokens: bool = True, **options: Any) -> PointPeftModel:
    torch.manual_seed(0)
    base = TwoStages().eval()
    blocks = tuple(find_blocks(dict(base.named_modules())).values())
    stages = (
        Stage(
            blocks=blocks[:2],
            width=12,
            coordinates=Tap(module="group_a", side="output", steps=(1,)),
            patch_tokens=Tap(module="embed", side="output") if patch_tokens else None,
        ),
        Stage(blocks=blocks[2:], width=24, coordinates=Tap(module="group_b", side="output", steps=(1,))),
    )
    anatomy = Anatomy(source="test", stages=stages, stem=("group_a", "embed"), final_norms=("norm",), heads=("head",))
    model = PointPeftModel(base, anatomy)
    model.add_adapter("default", small(late=False, **options))
    torch.manual_seed(1)
    randomise(get_adapter(model, "default"))
    return model


@pytest.mark.parametrize(("source", "width", "enhanced"), [("stem", 12, "first"), ("backbone", 24, "second")])
def test_a_prior_enhances_the_prompts_of_the_stages_that_are_as_wide(source: str, width: int, enhanced: str) -> None:
    model, points = two_stages(prompt_layers=4, prior=source), clouds(6)
    assert bank_of(model).rows.shape == (0, width)
    model.build_memory_bank([points])
    found = {name.split(".")[0] for name in get_adapter(model, "default").tensors() if ".prior_adapter." in name}
    assert found == {enhanced}
    with torch.no_grad():
        golden.assert_close(torch.cat([model(cloud[None]) for cloud in points]), model(points))
    model.train()(points).square().sum().backward()
    for name, parameter in get_adapter(model, "default").named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name


def test_no_bank_exists_where_no_prompt_fits_it() -> None:
    model = two_stages(prompt_layers=2)
    assert model(clouds(2)).shape == (2, 5)
    with pytest.raises(AdapterError, match="has no memory bank"):
        model.build_memory_bank([clouds(6)])


def test_the_stem_prior_needs_to_know_where_the_patch_embedding_is_seen() -> None:
    with pytest.raises(AnatomyError, match='POINT_PEFT with prior="stem" needs the patch embedding'):
        two_stages(patch_tokens=False, prior="stem", prompt_layers=4)


@pytest.mark.parametrize(
    "config", [PointPEFTConfig(memory_bank=True), PointPEFTConfig.published()], ids=["late", "published"]
)
def test_a_base_with_other_random_class_tokens_gives_the_same_logits(config: PointPEFTConfig, tmp_path: Path) -> None:
    """Checkpoints lack them, so they differ from process to process; the prior comes from the base that was trained."""
    backbone = BACKBONES["recon"]
    torch.manual_seed(0)
    model = get_peft_model(backbone.build(), config).eval()
    model.build_memory_bank([backbone.inputs(8, seed) for seed in range(3)], to_inputs=lambda args: args)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path)
    other = backbone.build()
    with torch.no_grad():
        for name in ("cls_token", "cls_pos", "img_token", "text_pos"):
            other.get_parameter(name).normal_()
    reloaded = PointPeftModel.from_pretrained(other, tmp_path).eval()
    args = backbone.inputs(4, 9)
    with torch.no_grad():
        output = model(*args)
        assert torch.allclose(reloaded(*args), output, atol=1e-5)
        with reloaded.disable_adapter(), model.disable_adapter():
            assert not torch.allclose(reloaded(*args), model(*args), atol=1e-2)
        # An adapter of the same model that was made for it keeps to its own values.
        reloaded.add_adapter("second", config)
        reloaded.build_memory_bank([backbone.inputs(8, 1)], to_inputs=lambda args: args, adapter_name="second")
        reloaded.set_adapter("second")
        second = reloaded(*args)
        reloaded.set_adapter("default")
        assert torch.allclose(reloaded(*args), output, atol=1e-5)
        reloaded.set_adapter("second")
        assert torch.equal(reloaded(*args), second)
        other.get_parameter("cls_token").zero_()
        reloaded.set_adapter("default")
        assert torch.allclose(reloaded(*args), output, atol=1e-5)


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_functional_call_takes_the_given_tensors_in_the_backward_pass_too(mode: bool) -> None:
    torch.manual_seed(0)
    backbone = PointTransformer(
        trans_dim=12, depth=2, num_heads=2, num_group=8, group_size=4, encoder_dims=12, cls_dim=3
    )
    model = get_peft_model(backbone, PointPEFTConfig(memory_bank=False, init="published")).train(mode)
    points, names = torch.rand(3, 40, 3), [name for name, p in model.named_parameters() if p.requires_grad]
    given = {name: (p + 0.1 * torch.randn_like(p)).detach().requires_grad_() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    logits = torch.func.functional_call(model, given, (points,))
    gradients = torch.autograd.grad(logits.square().sum(), [given[name] for name in names])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(given[name])
    torch.manual_seed(1)
    own = model(points)
    torch.testing.assert_close(logits, own)
    expected = torch.autograd.grad(own.square().sum(), [model.get_parameter(name) for name in names])
    torch.testing.assert_close(gradients, expected)
