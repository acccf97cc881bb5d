"""DAPT: against recorded runs and its equations, its parameters, where its prompts go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from point_peft import AdapterError, AnatomyError, DAPTConfig, PointPeftError, PointPeftModel, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.tuners.dapt import DynamicAdapter
from tests import golden
from tests.adapting import adapt, distance, full_point_mae, run
from tests.test_golden_base import Recorder, compare, grouping
from tests.zoo import BACKBONES, clouds

HEAD = "cls_head_finetune"
PUBLISHED = {HEAD: "cls+prompt+max"}


def blocks_of(model: PointPeftModel) -> list[nn.Module]:
    return list(model.base_model.get_submodule("blocks.blocks").children())


def trainable(heads: dict[str, str] | None = None, **fields) -> int:
    model = get_peft_model(full_point_mae(), DAPTConfig(**fields), heads=heads)
    return model.get_nb_trainable_parameters()[0]


def test_parameters_on_point_mae():
    """721,932 as METHODS.md counts them: 112,128 of TFTS, 609,036 of adapters, 768 of the class token.

    With the base's head, the prompt that the last block would make has no reader, nor then its TFTS.
    """
    published = 112_128 + 609_036 + 768
    assert trainable(modules_to_save=[]) == published - 768
    assert trainable(PUBLISHED) == published + 365_839
    without = trainable(modules_to_save=[], internal_prompts=False)
    assert without == published - 12 * 768


# ---- parity ----------------------------------------------------------------------------------------------------------


POOLS = ("class_token", "prompt_token", "patch_token")
POOLED = {
    ("class_token", "use"): "cls",
    ("prompt_token", "mean"): "prompt",
    ("patch_token", "max"): "max",
    ("patch_token", "mean"): "mean",
}
"""Pooling of the official head, and its name here; whatever else the file says, it leaves out."""


def ours(official: str) -> str:
    """The name in an adapter of an official tensor, `<module>.<tensor>`."""
    parent, _, leaf = official.rpartition(".")
    if parent.endswith("Adapter_MLP") or ".Adapter_MLP." in official:
        block, _, rest = official.partition(".Adapter_MLP.")
        for theirs, name in (
            ("adapter_layer_norm_before", "norm"), ("down_proj", "bottleneck.down"), ("up_proj", "bottleneck.up"),
        ):  # fmt: skip
            rest = rest.replace(theirs, name)
        return f"{block}.mlp.dapt.adapter.{rest}"
    if not leaf.startswith("tfts_"):
        return official
    _, kind, number = leaf.split("_")
    if parent.endswith(".attn"):
        site = f"{parent}.{('qkv', 'proj')[int(number) - 1]}"
    elif parent.endswith(".mlp"):
        site = f"{parent}.{('fc1', 'fc2')[int(number) - 1]}"
    elif parent:
        site = f"{parent}{('.norm1', '.norm2', '')[int(number) - 1]}"
    else:
        site = ("reduce_dim", "norm")[int(number) - 1]
    return f"{site}.dapt.{kind}"


def recorded(position="once") -> tuple[PointPeftModel, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The adapted model with the recorded weights, the clouds, what was recorded, and what ours gives."""
    description, expected = golden.load("dapt")
    config, weights = description["config"], golden.weights(description)
    names = ("trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "drop_path_rate", "cls_dim")
    base = PointTransformer(**{name: config[name] for name in names if name in config})
    own = base.state_dict()
    base.load_state_dict({name: weights[name] if not name.startswith(HEAD) else own[name] for name in own})
    recorder = Recorder()
    recorder.backbone(base)  # ahead of the adapter's hooks: outputs as the modules of the base return them
    pooled = "+".join(POOLED[name, config[name]] for name in POOLS if (name, config[name]) in POOLED)
    rank = config["rank"]
    how = DAPTConfig(width=rank, dropout=config["drop_adapter_rate"], position=position)
    model = get_peft_model(base, how, heads={HEAD: pooled}).eval()
    adapter = get_adapter(model, "default")
    values = {ours(name): tensor for name, tensor in weights.items()}
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            tensor.copy_(values[name.removeprefix("point_peft.base.")])
    # After them: what the blocks and the final norm get.
    for i, block in enumerate(base.blocks.blocks):
        recorder.input(block, f"block_in.{i}")
    recorder.input(base.norm, "into the norm")
    for number, module in enumerate(m for m in adapter.modules() if isinstance(m, DynamicAdapter)):
        recorder.output(module, f"adapter_out.{number}")
    recorder.input(dict(adapter.own_modules())[HEAD], "head_in")
    points = golden.points(description)
    with torch.no_grad():
        logits = model(points)
    found = {**grouping(points, config), "input.points": points, **recorder.tensors, "logits": logits}
    return model, points, expected, found


def test_it_reproduces_every_recorded_tensor():
    model, _, expected, found = recorded()
    depth = len(blocks_of(model))
    # The official blocks return the prompt that they make with their tokens: what the next one gets.
    for i in range(depth - 1):
        found[f"block_out.{i}"] = found[f"block_in.{i + 1}"]
    for name, official in (("into the norm", f"block_out.{depth - 1}"), ("final_norm", "final_norm")):
        own = found[name]
        if official in expected and own.shape != expected[official].shape:
            # Where the head does not pool them, prompts end with the last block.
            expected[official] = torch.cat([expected[official][:, :1], expected[official][:, 1 + depth :]], dim=1)
            found[official] = own
        else:
            # Else they pass through the norm behind the patches; the official model has them ahead of these.
            cls, patches, prompts = torch.split(own, [1, own.shape[1] - 1 - depth, depth], dim=1)
            found[official] = torch.cat([cls, prompts, patches], dim=1)
    compare(found, expected)


def test_a_sample_does_not_depend_on_its_batch_mates():
    model, points, expected, _ = recorded()
    with torch.no_grad():
        alone = torch.cat([model(cloud[None]) for cloud in points])
    golden.assert_close(alone, expected["logits"])


def test_positions_at_every_block_are_another_model():
    _, _, _, once = recorded()
    _, _, _, every = recorded(position="backbone")
    golden.assert_close(every["block_in.0"], once["block_in.0"])
    assert golden.distance(every["logits"], once["logits"]) > 1e-2


# ---- behaviour -------------------------------------------------------------------------------------------------------


def lengths(model: PointPeftModel) -> list[int]:
    """Number of tokens that each block gets."""
    found: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda m, args: found.append(args[0].shape[1])) for block in blocks_of(model)
    ]
    model(*clouds(2, 0))
    for handle in handles:
        handle.remove()
    return found


def test_the_sequence_grows_by_a_prompt_a_block():
    backbone = BACKBONES["point_mae"]
    every = lengths(adapt(backbone, DAPTConfig()))
    assert every == [every[0] + i for i in range(3)]
    assert lengths(adapt(backbone, DAPTConfig(layers_to_transform=[0, 2]))) == [every[0], every[0], every[0] + 1]
    assert lengths(adapt(backbone, DAPTConfig(internal_prompts=False))) == [every[0]] * 3
    assert lengths(adapt(backbone, DAPTConfig(position="once"))) == every


def test_the_newest_prompt_comes_first():
    """Right after the prefix, and it is what was computed of the block before."""
    backbone = BACKBONES["point_mae"]
    model = adapt(backbone, DAPTConfig())
    given: list[Tensor] = []
    adapted: list[Tensor] = []
    for block in blocks_of(model):
        block.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    for module in get_adapter(model, "default").modules():
        if isinstance(module, DynamicAdapter):
            module.register_forward_hook(lambda m, i, out: adapted.append(out))
    run(model, backbone, clouds(2, 0))
    tensors = get_adapter(model, "default").tensors()
    for i in range(2):
        gamma, beta = (tensors[f"blocks.blocks.{i}.dapt.{name}"] for name in ("gamma", "beta"))
        expected = torch.nn.functional.gelu(adapted[i]).mean(dim=1) * gamma + beta
        assert torch.allclose(given[i + 1][:, 1], expected, atol=1e-5)


def test_the_adapter_scales_every_token():
    torch.manual_seed(0)
    adapter = DynamicAdapter(8, 4, 0.0)
    torch.nn.init.normal_(adapter.bottleneck.up.weight)
    torch.nn.init.normal_(adapter.scale.weight)
    u = torch.randn(2, 5, 8)
    found = adapter(u)
    for b in range(2):
        for i in range(5):
            n = (u[b, i] - u[b, i].mean()) / (u[b, i].var(unbiased=False) + 1e-5).sqrt()
            scale = torch.relu(adapter.scale.weight[0] @ n + adapter.scale.bias)
            hidden = torch.nn.functional.gelu(adapter.bottleneck.down(n))
            assert torch.allclose(found[b, i], scale * (adapter.bottleneck.up.weight @ hidden), atol=1e-5)


def test_a_fresh_adapter_without_prompts_is_the_backbone():
    backbone = BACKBONES["point_mae"]
    (points,) = clouds(2, 0)
    base = backbone.build()
    with torch.no_grad():
        plain = base(points)
        fresh = adapt(backbone, DAPTConfig(internal_prompts=False), fresh=True)
        assert distance(fresh(points), plain) < 1e-5
        assert distance(adapt(backbone, DAPTConfig(), fresh=True)(points), plain) > 1e-4
    config = DAPTConfig(init="published", internal_prompts=False)
    assert not config.identity_at_init and DAPTConfig(internal_prompts=False).identity_at_init
    gammas = [
        t for n, t in get_adapter(adapt(backbone, config, fresh=True), "default").tensors().items() if "gamma" in n
    ]
    together = torch.cat(gammas)
    assert abs(float(together.detach().mean()) - 1) < 0.005 and 0.01 < float(together.detach().std()) < 0.03


def test_every_tensor_gets_a_gradient_with_the_published_head():
    model = adapt(BACKBONES["point_mae"], DAPTConfig(), heads=PUBLISHED)
    model(*clouds(4, 0)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_what_has_no_place_for_prompts_is_refused_with_advice():
    packed = BACKBONES["pointcept_ptv3"] if "pointcept_ptv3" in BACKBONES else BACKBONES["official_ptv1"]
    with pytest.raises(AnatomyError, match=r"no place for them: .* Set internal_prompts=False"):
        adapt(packed, DAPTConfig())
    adapt(packed, DAPTConfig(internal_prompts=False))


def test_a_head_that_pools_prompts_needs_them():
    model = adapt(BACKBONES["point_mae"], DAPTConfig(internal_prompts=False), heads=PUBLISHED)
    with pytest.raises(AdapterError, match="a head pools prompts, and none"):
        model(*clouds(2, 0))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "runs before the one whose prompts"),
        ({"position": "once"}, "what the block before it returned, .* nothing"),
    ],
)
def test_blocks_out_of_order_are_refused(fields, match):
    model = adapt(BACKBONES["point_mae"], DAPTConfig(**fields))
    model.base_model.get_submodule("pos_embed")(torch.randn(2, 16, 3))
    with pytest.raises(AdapterError, match=match):
        blocks_of(model)[1](torch.randn(2, 17, 24))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"width": 0}, "width"),
        ({"dropout": 1.0}, "dropout"),
        ({"position": "never"}, "position"),
        ({"init": "zero"}, "init"),
    ],
)
def test_wrong_fields_are_refused(fields, match):
    with pytest.raises(PointPeftError, match=match):
        DAPTConfig(**fields)
