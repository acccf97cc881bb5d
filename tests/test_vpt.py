"""VPT: shallow and deep prompts, where they lie and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from point_peft import AnatomyError, PointPeftError, VPTConfig, get_peft_model
from point_peft.backbones import PointTransformer
from tests import golden
from tests.adapting import full_point_mae
from tests.test_golden_base import Recorder, compare, grouping
from tests.zoo import BACKBONES, clouds

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(("mode", "count"), [("deep", 46_080), ("shallow", 3_840)])
def test_parameters_on_point_mae(mode, count):
    model = get_peft_model(full_point_mae(), VPTConfig(mode=mode, modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == count


def golden_model(description: dict[str, Any]) -> Any:
    """The backbone of a golden run with deep prompts; prompt and its position are one parameter here."""
    config, values = description["config"], golden.weights(description)
    names = ("trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "cls_dim")
    base = PointTransformer(**{name: config[name] for name in names})
    base.load_state_dict({name: values[name] for name in base.state_dict()})
    model: Any = get_peft_model(base, VPTConfig(num_prompts=config["prompt_nums"], modules_to_save=[]))
    for i in range(config["depth"]):
        prompt = values[f"cls_prompt_list.{i}"] + values[f"cls_prompt_pos_list.{i}"]
        model.adapters["default"].parts[f"blocks/blocks/{i}"][0].embeddings.data = prompt[0]
    return model.eval()


def test_deep_prompts_reproduce_the_recorded_run():
    description, expected = golden.load("vpt_deep")
    points, count = golden.points(description), description["config"]["prompt_nums"]
    model = golden_model(description)
    recorder = Recorder()
    recorder.backbone(model.base_model)
    recorder.input(model.base_model.cls_head_finetune, "head_in")
    with torch.no_grad():
        logits = model(points)
    ours = {**recorder.tensors, **grouping(points, description["config"]), "logits": logits, "input.points": points}

    def behind(tokens: Tensor) -> Tensor:
        """The prompts behind the patches, where the recorded run has them."""
        return torch.cat([tokens[:, :1], tokens[:, 1 + count :], tokens[:, 1 : 1 + count]], dim=1)

    for i in range(description["config"]["depth"]):
        ours[f"block_in.{i}"] = behind(ours[f"block_in.{i}"])
    if "final_norm" in expected:
        # The recorded norm still has the prompts of the last block; ours never gets them.
        expected["final_norm"] = expected["final_norm"][:, : ours["final_norm"].shape[1]]
    compare(ours, expected)


def test_shallow_prompts_go_through_all_blocks():
    """Against a loop over the blocks that keeps the prompts in the sequence and gives them no position."""
    backbone: Any = BACKBONES["point_mae"].build()
    model: Any = get_peft_model(backbone, VPTConfig(mode="shallow", num_prompts=3, modules_to_save=[])).eval()
    prompts = model.adapters["default"].parts["blocks/blocks/0"][0].embeddings
    torch.nn.init.normal_(prompts)
    (points,) = clouds(2, 0)
    with torch.no_grad():
        found = model(points)
        with model.disable_adapter():
            neighborhood, center = backbone.group_divider(points)
            patches, pos = backbone.encoder(neighborhood), backbone.pos_embed(center)
            tokens = torch.cat([backbone.cls_token.expand(2, -1, -1), patches], dim=1)
            pos = torch.cat([backbone.cls_pos.expand(2, -1, -1), pos], dim=1)
            carried = prompts.expand(2, -1, -1)
            for block in backbone.blocks.blocks:
                x = tokens + pos
                out = block(torch.cat([x[:, :1], carried, x[:, 1:]], dim=1))
                tokens, carried = torch.cat([out[:, :1], out[:, 4:]], dim=1), out[:, 1:4]
            expected = backbone.forward_head(backbone.norm(tokens))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_a_pooled_head_reads_the_prompts(mode):
    config = VPTConfig(mode=mode, num_prompts=3)
    torch.manual_seed(0)
    model: Any = get_peft_model(BACKBONES["point_mae"].build(), config, heads={"cls_head_finetune": "cls+prompt+max"})
    model.eval()
    head, block = model.adapters["default"].parts["cls_head_finetune"][0].module, model.base_model.blocks.blocks[-1]
    assert head[0].in_features == 3 * 24
    seen: dict[str, Tensor] = {}
    head[0].register_forward_pre_hook(lambda module, args: seen.update(pooled=args[0]))
    block.attn.register_forward_hook(lambda module, args, output: seen.update(rows=args[0]))
    (points,) = clouds(3, 0)
    with torch.no_grad():
        together = model(points)
        pooled = seen["pooled"]
        alone = torch.cat([model(cloud[None]) for cloud in points])
    assert seen["rows"].shape[1] == 1 + 3 + 16
    assert torch.allclose(together, alone, atol=1e-5)
    own = model.base_model.norm
    with torch.no_grad(), model.disable_adapter():
        neither = own(torch.zeros(1, 24))
    assert not torch.allclose(pooled[:, 24:48], neither.expand(3, -1))
    assert not torch.allclose(pooled[:, 24:48], pooled[:, :24]) and not torch.allclose(pooled[:, 24:48], pooled[:, 48:])


def test_refused_where_tokens_take_no_prompts():
    backbone = BACKBONES["pointcept_ptv3"]
    with pytest.raises(AnatomyError, match=r"VPT puts prompts among the tokens of .* packed.*Use a method that adapts"):
        get_peft_model(backbone.build(), VPTConfig(modules_to_save=[]), example_inputs=backbone.example)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_prompts": 0}, r"VPTConfig.num_prompts is 0; allowed: 1 or more"),
        ({"mode": "wide"}, r"VPTConfig.mode is 'wide'; allowed: 'deep' or 'shallow'"),
        ({"prompt_dropout": 1.0}, r"VPTConfig.prompt_dropout is 1.0; allowed: 0 or more and less than 1"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(PointPeftError, match=match):
        VPTConfig(**fields)
