"""IDPT: the generated prompt against a naive graph network, the recorded run, where it enters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from point_peft import AnatomyError, IDPTConfig, PeftConfig, PointPeftError, VPTConfig, get_peft_model
from point_peft.backbones import PointTransformer
from point_peft.tuners.idpt import PromptGenerator
from tests import golden
from tests.adapting import full_point_mae
from tests.test_feature_graph import naive_graph, with_random_norms
from tests.test_golden_base import Recorder, compare, grouping
from tests.zoo import BACKBONES, clouds

HEAD = "cls_head_finetune"


def test_parameters_on_point_mae():
    """1,330,944 as published, and the 384 of the prompt's position, which is trained here."""
    model = get_peft_model(full_point_mae(), IDPTConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 1_330_944 + 384


def test_the_published_head_has_three_widths():
    model = get_peft_model(full_point_mae(), IDPTConfig(), heads={HEAD: "cls+prompt+max"})
    assert model.get_nb_trainable_parameters()[0] == 1_330_944 + 384 + 365_839


def test_prompt_against_a_loop_over_tokens():
    generator, tokens = with_random_norms(PromptGenerator(6, 4)), torch.randn(2, 9, 6)
    with torch.no_grad():
        found = generator(tokens, recomputing=False)
        for cloud, prompt in zip(tokens, found, strict=True):
            assert torch.allclose(naive_graph(generator, cloud).amax(dim=0), prompt, atol=1e-5)


OFFICIAL = {
    **{f"generator.convolutions.{i}.edge.weight": f"conv{i + 1}.0.weight" for i in range(3)},
    "generator.joined.weight": "conv5.0.weight",
    **{
        f"generator.{ours}.{name}": f"{theirs}.{name}"
        for ours, theirs in (*((f"convolutions.{i}.norm", f"conv{i + 1}.1") for i in range(3)), ("norm", "conv5.1"))
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
}


# What the official head takes of the tokens, and how it is called here.
POOLED = {"all": "cls+prompt+max", "promptonly": "prompt"}


def golden_model(description: dict[str, Any]) -> tuple[Any, Any, Any]:
    config, values = description["config"], golden.weights(description)
    names = ("trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "cls_dim")
    base = PointTransformer(**{name: config[name] for name in names})
    own = {name: values[name] for name in base.state_dict() if not name.startswith(HEAD)}
    base.load_state_dict(own, strict=False)
    idpt = IDPTConfig(prompt_layer=config["prompt_layer"], neighbours=config["feature_k"])
    model: Any = get_peft_model(base, idpt, heads={HEAD: POOLED[config["cls_type"]]})
    adapter = model.adapters["default"]
    (generating,) = [part for _, part in adapter.all_parts() if getattr(part, "generator", None) is not None]
    with torch.no_grad():
        for name, tensor in generating.state_dict(keep_vars=True).items():
            official = values["blocks.cls." + OFFICIAL[name]]
            tensor.copy_(official.reshape(tensor.shape))
        adapter.shared[0]["position"].position.copy_(values["prompt_pos"].flatten())
        for name in ("cls_token", "cls_pos"):
            assert torch.equal(adapter.tensors()[name], values[name])
        for name, tensor in adapter.tensors().items():
            if name.startswith(HEAD):
                tensor.copy_(values[name])
    return model.eval(), generating, adapter


def test_the_recorded_run():
    description, expected = golden.load("idpt")
    points = golden.points(description)
    model, generating, adapter = golden_model(description)
    recorder = Recorder()
    recorder.backbone(model.base_model)
    recorder.input(generating.generator, "generator_in")
    recorder.output(generating.generator, "generated")
    recorder.input(adapter.parts[HEAD][0].module, "head_in")
    with torch.no_grad():
        logits = model(points)
    ours = {**recorder.tensors, **grouping(points, description["config"]), "logits": logits, "input.points": points}
    ours["prompt_generator_in"] = ours["generator_in"].transpose(1, 2)
    ours["prompt"] = ours["generated"][:, None]
    for name, tensor in expected.items():
        if tensor.ndim == 3 and name in ours and ours[name].shape[1] < tensor.shape[1]:
            # Outside the blocks the prompt is not in the base's sequence; the head sees what becomes of it.
            expected[name] = torch.cat([tensor[:, :1], tensor[:, 2:]], dim=1)
    compare(ours, expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_prompt_stays_from_its_block_to_the_last(layer):
    """Against a loop over the blocks; the prompt has its position before every block, as the tokens have theirs."""
    backbone: Any = BACKBONES["point_mae"].build()
    model: Any = get_peft_model(backbone, IDPTConfig(prompt_layer=layer, modules_to_save=[], tuned_tokens=[])).eval()
    adapter = model.adapters["default"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    (part,) = [part for _, part in adapter.all_parts() if getattr(part, "generator", None) is not None]
    position = adapter.shared[0]["position"].position
    (points,) = clouds(3, 0)
    with torch.no_grad():
        found = model(points)
        with model.disable_adapter():
            neighborhood, center = backbone.group_divider(points)
            patches = backbone.encoder(neighborhood)
            pos = torch.cat([backbone.cls_pos.expand(3, -1, -1), backbone.pos_embed(center)], dim=1)
            tokens = torch.cat([backbone.cls_token.expand(3, -1, -1), patches], dim=1)
            for i, block in enumerate(backbone.blocks.blocks):
                if i == layer:
                    prompt = part.generator(tokens[:, 1:], recomputing=False)[:, None]
                x = tokens + pos
                if i < layer:
                    tokens = block(x)
                    continue
                out = block(torch.cat([x[:, :1], prompt + position, x[:, 1:]], dim=1))
                tokens, prompt = torch.cat([out[:, :1], out[:, 2:]], dim=1), out[:, 1:2]
            expected = backbone.forward_head(backbone.norm(tokens))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_prompt_layer_that_is_not_there():
    with pytest.raises(
        AnatomyError, match=r"prompt_layer=9 is not one of the chosen blocks of the last stage: 0, 1, 2"
    ):
        get_peft_model(BACKBONES["point_mae"].build(), IDPTConfig(prompt_layer=9))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"neighbours": 0}, r"IDPTConfig.neighbours is 0; allowed: 1 or more"),
        ({"prompt_layer": -1}, r"IDPTConfig.prompt_layer is -1; allowed: a block's number from 0"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(PointPeftError, match=match):
        IDPTConfig(**fields)


def test_prompts_of_two_methods_nest():
    """Their order in the adapter is the order of the prompts, and without a mask the order counts for nothing."""
    outputs = []
    for tuners in itertools.permutations((VPTConfig(mode="shallow", num_prompts=2), IDPTConfig(prompt_layer=1))):
        torch.manual_seed(0)
        model: Any = get_peft_model(
            BACKBONES["point_mae"].build(), PeftConfig(tuners=tuners, modules_to_save=[])
        ).eval()
        with torch.no_grad():
            for name, tensor in sorted(model.adapters["default"].tensors().items()):
                if tensor.is_floating_point() and not name.endswith("running_var"):
                    tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
        (points,) = clouds(2, 0)
        output = model(points)
        output.sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.adapters.parameters())
        outputs.append(output.detach())
    one, other = outputs
    assert torch.allclose(one, other, atol=1e-5)
