"""Extraction: an adapter out of a fully fine-tuned model, and LoRA out of what another method has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from point_peft import (
    AdapterError,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PointPeftError,
    PointPeftModel,
    SSFConfig,
    convert_to_lora,
    extract,
    get_peft_model,
)
from point_peft.adapting.adapter import get_adapter
from tests.methods import config
from tests.zoo import BACKBONES, TinyBackbone, clouds

MODELS = ["point_mae", "pointgpt", "recon", "point_m2ae", "pointcept_ptv3"]


def moved(model: nn.Module, seed: int = 1, scale: float = 0.05) -> nn.Module:
    """The model with everything in it changed, as a full fine-tuning does, statistics too."""
    torch.manual_seed(seed)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in changed.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=scale)
    return changed


def close(backbone: TinyBackbone, one: nn.Module, other: nn.Module, args: Any) -> bool:
    with torch.no_grad():
        torch.manual_seed(0)
        first = backbone.select(one.eval()(*args))
        torch.manual_seed(0)
        second = backbone.select(other.eval()(*args))
    return torch.allclose(first, second, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in MODELS if name in BACKBONES])
def test_all_of_a_difference_is_the_fine_tuned_model(name, tmp_path):
    backbone = BACKBONES[name]
    base, args = backbone.build().eval(), backbone.inputs(2, 5)
    full = moved(base)
    before = copy.deepcopy(base.state_dict())
    model, _ = extract(base, full.state_dict(), energy=1.0, example_inputs=args)
    assert close(backbone, model, full, args)
    with model.disable_adapter():
        assert not close(backbone, model, full, args)
    model.save_pretrained(tmp_path)
    plain = model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    torch.manual_seed(77)
    loaded = PointPeftModel.from_pretrained(backbone.build(), tmp_path, example_inputs=args)
    assert close(backbone, loaded, full, args)


def test_rank_and_residual_are_those_of_the_energy():
    base = BACKBONES["point_mae"].build().eval()
    full: Any = copy.deepcopy(base)
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(24, 3))[0], torch.linalg.qr(torch.randn(24, 3))[0]
    with torch.no_grad():
        full.blocks.blocks[1].attn.proj.weight.add_(left @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ right.T)
    for energy, rank, residual in ((0.6, 1, (5 / 14) ** 0.5), (0.9, 2, (1 / 14) ** 0.5), (0.95, 3, 0.0)):
        model, extraction = extract(copy.deepcopy(base), full, energy=energy)
        (layer,) = extraction.layers
        assert (layer.path, layer.shape, layer.rank) == ("blocks.blocks.1.attn.proj", (24, 24), rank)
        assert layer.residual == pytest.approx(residual, abs=1e-3)
        assert extraction.whole == () and extraction.as_they_are == ()
        assert "blocks.blocks.1.attn.proj" in str(extraction) and f"{layer.residual:.3f}" in str(extraction)
        assert model.active_adapters == ("default",)


def test_each_kind_of_tensor_goes_where_it_fits():
    base = BACKBONES["point_mae"].build().eval()
    full: Any = copy.deepcopy(base)
    with torch.no_grad():
        full.blocks.blocks[0].mlp.fc1.bias.add_(0.1)
        full.norm.weight.mul_(1.5)
        full.cls_pos.add_(0.3)
        full.blocks.blocks[0].attn.qkv.weight[:, 0] += 0.2
        full.cls_head_finetune[0].weight.add_(0.1)
        full.encoder.first_conv[1].running_mean.add_(0.5)
    model, extraction = extract(base, full, energy=0.9)
    assert [layer.path for layer in extraction.layers] == ["blocks.blocks.0.attn.qkv"]
    assert set(extraction.as_they_are) == {"blocks.blocks.0.mlp.fc1 (bias)", "norm (norm)", "cls_pos"}
    assert extraction.whole == ("cls_head_finetune", "encoder.first_conv.1")
    (points,) = clouds(2, 3)
    assert torch.allclose(model.eval()(points), full(points), atol=1e-4)


def test_a_small_layer_is_taken_whole_where_factors_would_be_larger():
    base = BACKBONES["point_mae"].build().eval()
    full: Any = copy.deepcopy(base)
    torch.manual_seed(0)
    with torch.no_grad():
        full.blocks.blocks[2].mlp.fc2.weight.add_(torch.randn(24, 96), alpha=0.1)
    _, extraction = extract(base, full, energy=0.999)
    assert extraction.layers == () and extraction.whole == ("blocks.blocks.2.mlp.fc2", "cls_head_finetune")


@pytest.mark.parametrize(
    ("how", "energy"),
    [
        (SSFConfig(only_mergeable=True), 1.0),
        (IA3Config(), 1.0),
        (LoraConfig(r=3, use_dora=True), 1.0),
        (LoraConfig(r=3, init_lora_weights="pissa"), 1.0),
        (PeftConfig(tuners=(LoraConfig(r=2), BitFitConfig())), 1.0),
    ],
    ids=["ssf", "ia3", "dora", "pissa", "lora and biases"],
)
def test_what_can_be_merged_becomes_lora(how, energy, tmp_path):
    model, (points,) = get_peft_model(BACKBONES["point_mae"].build(), how).eval(), clouds(2, 3)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    extraction = convert_to_lora(model, "default", "lora", energy=energy)
    outputs = model.forward_tasks(points, ["default", "lora", None])
    assert torch.allclose(outputs["default"], outputs["lora"], atol=1e-4)
    assert not torch.allclose(outputs["default"], outputs[None], atol=1e-3)
    assert extraction.layers and model.active_adapters == ("default",)
    converted = get_adapter(model, "lora")
    assert converted.config.tuners[0].method == "LORA" and not any(p.requires_grad for p in converted.parameters())
    model.save_pretrained(tmp_path, "lora")
    torch.manual_seed(9)
    loaded = PointPeftModel.from_pretrained(BACKBONES["point_mae"].build(), tmp_path).eval()
    assert torch.allclose(loaded(points), outputs["lora"], atol=1e-5)


def refused(base, act, error, match):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    hooks = {name: len(module._forward_hooks) for name, module in base.named_modules()}
    with pytest.raises(error, match=match):
        act()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert hooks == {name: len(module._forward_hooks) for name, module in base.named_modules()}


def test_what_cannot_be_extracted_is_refused_and_the_base_stays():
    base = BACKBONES["point_mae"].build()
    full = moved(base).state_dict()
    head = "cls_head_finetune.0.weight"
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: extract(base, base), AdapterError, r"the two models are the same, bit for bit"),
        (lambda: extract(base, full, energy=0), PointPeftError, r"energy is 0; allowed: a share of the change, m"),
        (lambda: extract(base, full, energy=1.5), PointPeftError, r"energy is 1.5; allowed"),
        (lambda: extract(base, full, energy=True), PointPeftError, r"energy is True; allowed"),
        (lambda: extract(base, {**full, "more": torch.zeros(1)}), AdapterError, r"the base has no 'more'"),
        (
            lambda: extract(base, {name: tensor for name, tensor in full.items() if name != "norm.bias"}),
            AdapterError,
            r"the fine-tuned checkpoint has no 'norm.bias'; nearest",
        ),
        (
            lambda: extract(base, {**full, head: torch.zeros(2, 2)}),
            AdapterError,
            rf"'{head}' has shape \(2, 2\) in the fine-tuned checkpoint and .* if it is the head, make",
        ),
        (
            lambda: extract(base, {**full, "norm.bias": torch.full_like(full["norm.bias"], torch.nan)}),
            AdapterError,
            r"'norm.bias' of the fine-tuned checkpoint has values that are not finite",
        ),
    ]
    for act, error, match in cases:
        refused(base, act, error, match)


def test_what_cannot_be_converted_is_refused():
    model = get_peft_model(BACKBONES["point_mae"].build(), BottleneckConfig()).eval()
    model.add_adapter("fresh", LoraConfig(r=2))
    for source, match in (
        ("default", r"adapter 'default' cannot be merged: its SerialPart at .* is not a change"),
        ("fresh", r"adapter 'fresh' changes no tensor of the backbone: there is nothing to convert"),
        ("none", r"there is no adapter 'none'; adapters: 'default', 'fresh'"),
    ):
        with pytest.raises(AdapterError, match=match):
            convert_to_lora(model, source, "lora")
        assert list(model.adapters) == ["default", "fresh"]


def test_a_method_of_the_matrix_with_its_own_head_keeps_it():
    model, (points,) = get_peft_model(BACKBONES["point_mae"].build(), config("IA3")).eval(), clouds(2, 3)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    convert_to_lora(model, "default", "lora", energy=1.0)
    model.delete_adapter("default")
    with torch.no_grad():  # the base's head is not used
        for parameter in model.base_model.get_submodule("cls_head_finetune").parameters():
            parameter.zero_()
    model.set_adapter("lora")
    assert not torch.equal(model(points), torch.zeros_like(model(points)))


def test_on_clouds_a_change_counts_by_what_it_moves():
    """Of two directions of a change, the larger lies where inputs hardly vary: clouds keep the other one."""
    torch.manual_seed(0)
    base: Any = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    points = torch.randn(300, 12) * torch.tensor([*[1.0] * 11, 0.01])
    full: Any = copy.deepcopy(base)
    with torch.no_grad():
        full[0].weight[:, 11] += 1.0
        full[0].weight[:, 0] += 0.5 * torch.randn(20)
    outputs = {}
    for name, batches in (("weights", None), ("clouds", points.split(50))):
        model, extraction = extract(copy.deepcopy(base), full, energy=0.6, batches=batches, example_inputs=points[:2])
        assert [layer.rank for layer in extraction.layers] == [1]
        outputs[name] = model(points)
    wanted = full(points) - full(points).mean(0)
    errors = {name: (given - given.mean(0) - wanted).square().mean().item() for name, given in outputs.items()}
    assert errors["clouds"] < 0.2 * errors["weights"]


def test_with_all_of_it_clouds_change_nothing_and_batches_are_needed():
    backbone = BACKBONES["point_mae"]
    base, args = backbone.build().eval(), backbone.inputs(2, 5)
    full = moved(base, scale=0.01)
    model, _ = extract(base, full, energy=1.0, example_inputs=args, batches=[args[0], clouds(2, 8)[0]])
    assert close(backbone, model, full, args)
    other = backbone.build()
    refused(
        other, lambda: extract(other, full, batches=[]), AdapterError, r"extract got no batches, or none that reach"
    )


def test_half_a_file_is_read_as_float32(tmp_path):
    model, (points,) = get_peft_model(BACKBONES["point_mae"].build(), LoraConfig(r=2)).eval(), clouds(2, 3)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = model(points)
    model.save_pretrained(tmp_path / "half", half=True)
    model.save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.7 * sizes[1]
    loaded = PointPeftModel.from_pretrained(BACKBONES["point_mae"].build(), tmp_path / "half").eval()
    assert {parameter.dtype for parameter in loaded.adapters.parameters()} == {torch.float32}
    assert torch.allclose(loaded(points), expected, atol=1e-2) and not torch.equal(loaded(points), expected)
    with torch.no_grad():
        next(model.adapters.parameters()).view(-1)[0] = 1e6
    with pytest.raises(
        AdapterError, match=r"'default' cannot be saved with half=True: '.*' has values that are too larg"
    ):
        model.save_pretrained(tmp_path / "more", half=True)
    assert not (tmp_path / "more").exists()
