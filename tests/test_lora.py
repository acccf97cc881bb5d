"""LoRA: its equation, which layers it takes, merging."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from examples.backbones import BACKBONES, clouds
from point_peft import AdapterError, AnatomyError, LoraConfig, MatchError, PointPeftError, get_peft_model


def adapted(**fields):
    model = get_peft_model(BACKBONES["point_mae"].build(), LoraConfig(modules_to_save=[], **fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(0.0, 0.2)
    return model


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_equation(rslora, scale):
    model = adapted(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["blocks.blocks.1.mlp.fc1"])
    layer = model.base_model.blocks.blocks[1].mlp.fc1
    part = model.adapters["default"].parts["blocks/blocks/1/mlp/fc1"][0]
    x = torch.randn(2, 5, 24)
    expected = x @ (layer.weight + scale * part.lora_B.weight @ part.lora_A.weight).T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_default_targets_and_layers():
    model = adapted(layers_to_transform=[0, 2])
    assert [row.name for row in model.get_layer_status()] == [
        "blocks.blocks.0.attn.qkv",
        "blocks.blocks.2.attn.qkv",
    ]
    excluded = adapted(target_modules=["qkv", "fc1"], exclude_modules=r".*\.0\..*")
    assert all(".0." not in row.name for row in excluded.get_layer_status())


def test_merge_is_exact_and_unmerge_restores():
    model, (points,) = adapted(target_modules=["qkv", "proj", "fc1", "fc2"]), clouds(2, 0)
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    expected = model(points)
    model.merge()
    assert torch.allclose(model(points), expected, atol=1e-5)
    assert model.merged_adapters == ("default",) and model.active_adapters == ()
    with pytest.raises(AdapterError, match=r"adapters cannot be saved while 'default' is merged .* call unmerge"):
        model.save_pretrained("nowhere")
    model.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.state_dict().items())
    assert torch.equal(model(points), expected)
    plain = model.merge_and_unload()
    assert torch.allclose(plain(points), expected, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_what_is_not_a_linear_layer_is_refused():
    model = BACKBONES["point_mae"].build()
    with pytest.raises(AnatomyError, match=r"'norm' is a LayerNorm; LORA adapts linear layers"):
        get_peft_model(model, LoraConfig(target_modules=["norm"]))
    with pytest.raises(MatchError, match=r"no module matches 'blocks.\*.qvk' .*nearest: 'blocks.blocks.0.attn.qkv'"):
        get_peft_model(model, LoraConfig(target_modules=["blocks.*.qvk"]))
    with pytest.raises(AnatomyError, match=r"exclude_modules and layers_to_transform leave no module"):
        get_peft_model(model, LoraConfig(exclude_modules=["qkv"]))


def test_a_layer_whose_weight_is_read_by_another_module_is_reported():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.linear.weight)

    model = get_peft_model(Reader(), LoraConfig(target_modules=["linear"]))
    with pytest.raises(AdapterError, match=r"the LoraPart at 'linear' had no effect, because that module"):
        model(torch.rand(2, 3))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("r", 0, "1 or more"), ("lora_alpha", -1, "more than 0"), ("lora_dropout", 1.0, "0 or more and less than 1")],
)
def test_fields_are_validated(field, value, allowed):
    with pytest.raises(PointPeftError, match=rf"LoraConfig.{field} is {value}; allowed: {allowed}"):
        LoraConfig(**{field: value})


def test_a_module_under_two_names_is_adapted_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(self.first(x))
            return out

    model = get_peft_model(Twice(), LoraConfig(target_modules=["first", "second"]))
    assert [row.parts["default"] for row in model.get_layer_status()] == [("LoraPart",)]
    assert torch.isfinite(model(torch.rand(2, 3))).all()
