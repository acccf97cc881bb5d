"""Groups of parameters for an optimizer: every trainable tensor in one of them, and only weights decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    LoraConfig,
    MatchError,
    NormTuningConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftError,
    VPTConfig,
    get_peft_model,
    inject_adapter,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.anatomy.presets import known_anatomy
from point_peft.parameter_groups import Rates, parameter_groups_of
from tests.adapting import METHOD_NAMES, PAIRS, adapt, each, few, held, loss_of
from tests.methods import config
from tests.zoo import BACKBONES, TinyBackbone

Group = dict[str, Any]
ORDER = ["heads", "heads, no decay", "prompts", "adapters", "adapters, no decay", "backbone", "backbone, no decay"]
POINT_MAE = BACKBONES["point_mae"]


def names_by_group(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[str]]:
    """The names of the parameters in each group, after they were held against the rules for all groups."""
    assert [group["name"] for group in groups] == [name for name in ORDER if name in {g["name"] for g in groups}]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(held) == sorted(trained), "not every trainable parameter once"
    assert all(group["params"] for group in groups), "an empty group"
    return {group["name"]: [trained[id(p)] for p in group["params"]] for group in groups}


@each(few(PAIRS, of=lambda backbone: backbone.kind))
def test_every_parameter_is_in_one_group_and_only_weights_decay(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method, fresh=True)
    groups = model.parameter_groups(1e-3, head_lr=2e-3, prompt_lr=3e-3, weight_decay=0.1)
    names_by_group(model, groups)
    rates = {"heads": 2e-3, "heads, no decay": 2e-3, "prompts": 3e-3, "adapters": 1e-3, "adapters, no decay": 1e-3}
    adapter = get_adapter(model, "default")
    norms = {id(p) for m in adapter.modules() if "Norm" in type(m).__name__ for p in m._parameters.values()}
    heads = {id(p) for _, module in adapter.own_modules() for p in module.parameters()}
    for group in groups:
        assert group["lr"] == rates[group["name"]]
        assert group["weight_decay"] == (0.1 if group["name"] in ("heads", "adapters") else 0.0)
        for parameter in group["params"]:
            assert (id(parameter) in heads) == group["name"].startswith("heads")
            if group["weight_decay"]:
                assert parameter.ndim > 1 and id(parameter) not in norms


def test_prompts_are_what_the_methods_say() -> None:
    found: dict[str, set[str]] = {}
    for method in METHOD_NAMES:
        model = adapt(POINT_MAE, config(method), fresh=True)
        prompts = names_by_group(model, model.parameter_groups(1e-3)).get("prompts", [])
        found[method] = {name.rpartition(".")[2] for name in prompts}
    tokens = {"cls_pos", "cls_token"}
    assert {method: names for method, names in found.items() if names} == {
        "DAPT": tokens,
        "GA_PROMPT": {"embeddings", "point_prompts", "prompt_coordinates", *tokens},
        "GEM": {"latents"},
        "GFT": {"prompts", *tokens},
        "IDPT": {"position", *tokens},
        "POINT_GST": tokens,
        "POINT_LORA": tokens,
        "POINT_PEFT": {"embeddings", "prefix_shift", "prompt_coordinates"},
        "PPT": tokens,
        "VPT": {"embeddings"},
    }


def test_a_step_moves_every_parameter() -> None:
    how = PeftConfig(tuners=(PointPEFTConfig(memory_bank=False), LoraConfig(use_dora=True)))
    model = adapt(POINT_MAE, how).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2, head_lr=1e-3))
    loss_of(POINT_MAE.select(model(*POINT_MAE.inputs(4, 3)))).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    moved = {name: float((value - before[name]).abs().max()) for name, value in trained}
    head = {name: step for name, step in moved.items() if "head" in name}
    assert max(head.values()) < 2e-3 and min(step for name, step in moved.items() if name not in head) > 2e-3
    magnitudes = [p for name, p in model.named_parameters() if name.endswith("magnitude_vector")]
    still = next(group for group in optimizer.param_groups if group["name"] == "adapters, no decay")["params"]
    assert magnitudes and {id(p) for p in magnitudes} <= {id(p) for p in still}


def test_frozen_adapters_are_left_out_and_all_others_are_in() -> None:
    model = adapt(POINT_MAE, LoraConfig(), fresh=True)
    model.add_adapter("prompts", VPTConfig(modules_to_save=[]))
    both = names_by_group(model, model.parameter_groups(1e-3))
    assert both.keys() == {"heads", "heads, no decay", "prompts", "adapters"}
    model.freeze_adapter("default")
    assert names_by_group(model, model.parameter_groups(1e-3)) == {"prompts": both["prompts"]}
    model.freeze_adapter("prompts")
    with pytest.raises(AdapterError, match="no parameter is trainable.*train_adapter"):
        model.parameter_groups(1e-3)


def test_a_tensor_of_two_names_is_in_one_group() -> None:
    base = POINT_MAE.build()
    base.add_module("again", base.get_submodule("cls_head_finetune"))
    model = get_peft_model(base, LoraConfig())
    first, second = (layer for layer in get_adapter(model, "default").modules() if isinstance(layer, nn.BatchNorm1d))
    second.bias = first.bias
    names_by_group(model, model.parameter_groups(1e-3))


def test_a_model_that_keeps_its_class_and_trained_tensors_of_the_base() -> None:
    model = inject_adapter(POINT_MAE.build(), NormTuningConfig())
    model.get_parameter("cls_token").requires_grad_(True)
    model.get_submodule("blocks.blocks.0.attn").requires_grad_(True)
    found = names_by_group(model, held(model).parameter_groups(1e-3, prompt_lr=1e-2))
    assert found["prompts"] == ["cls_token"]
    assert {name.rpartition(".")[2] for name in found["backbone"]} == {"weight"}
    assert {name.rpartition(".")[2] for name in found["backbone, no decay"]} == {"bias"}
    assert "adapters" not in found and found["adapters, no decay"]


class Plain(nn.Module):
    """A model without an anatomy: an attention that holds its weights itself, a position, a gain, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.gain = nn.Parameter(torch.ones(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm((4, 8))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_plain_model_has_groups_too() -> None:
    model = Plain()
    groups = parameter_groups_of(model, ["head"], Rates(lr=1e-4, head_lr=1e-3))
    assert names_by_group(model, groups) == {
        "heads": ["head.0.weight", "head.2.weight"],
        "heads, no decay": ["head.0.bias", "head.1.weight", "head.1.bias", "head.2.bias"],
        "prompts": ["position"],
        "backbone": ["attention.in_proj_weight", "attention.out_proj.weight"],
        "backbone, no decay": ["gain", "attention.in_proj_bias", "attention.out_proj.bias", "norm.weight", "norm.bias"],
    }
    base = POINT_MAE.build()
    anatomy = known_anatomy(base)
    assert anatomy is not None
    whole = names_by_group(base, parameter_groups_of(base, anatomy.heads, Rates(lr=1e-4), anatomy))
    assert whole["prompts"] == [parameter.name for parameter in anatomy.prefix_parameters]
    probed = base.requires_grad_(False)
    probed.get_submodule(anatomy.heads[0]).requires_grad_(True)
    assert set(names_by_group(base, parameter_groups_of(base, anatomy.heads, Rates(lr=1e-3)))) <= set(ORDER[:2])


@pytest.mark.parametrize("name", ["lr", "head_lr", "prompt_lr", "weight_decay"])
def test_rates_that_are_none_are_refused(name: str) -> None:
    values: list[Any] = [-1.0, float("nan"), float("inf"), "1e-3"]
    for value in values:
        options: dict[str, Any] = {"lr": 1e-3, name: value}
        with pytest.raises(PointPeftError, match=rf"Rates.{name} is .*; allowed: a finite number, 0 or more"):
            adapt(POINT_MAE, LoraConfig(), fresh=True).parameter_groups(**options)


def test_heads_that_do_not_exist_are_refused() -> None:
    with pytest.raises(MatchError, match=r"'haed' \(heads\); nearest: 'head'"):
        parameter_groups_of(Plain(), ["haed"], Rates(lr=1e-3))
