"""LoRA on sparse convolutions of spconv: what it computes, files, merging, and PTv3's positions by name."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import AnatomyError, LoraConfig, PointPeftModel, get_peft_model
from point_peft.adapting.adapter import get_adapter
from tests.adapting import move
from tests.zoo import BACKBONES
from tests.zoo.operators import supply_spconv_on_cpu

pytestmark = pytest.mark.skipif(find_spec("spconv") is None, reason="spconv is not installed")
SIDE, SIZES = 6, (90, 25)


class Sparse(nn.Module):
    """Two convolutions that share which cells are neighbours, and one of another kernel by itself."""

    def __init__(self) -> None:
        super().__init__()
        supply_spconv_on_cpu()
        from spconv.pytorch import SubMConv3d

        self.first = SubMConv3d(4, 7, 3, indice_key="one")
        self.second = SubMConv3d(7, 7, 3, bias=False, indice_key="one")
        self.wide = SubMConv3d(7, 5, 5)

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        from spconv.pytorch import SparseConvTensor

        tensor = SparseConvTensor(features, cells, [SIDE] * 3, len(SIZES))
        for conv in (self.first, self.second, self.wide):
            tensor = conv(tensor)
        out: Tensor = tensor.features
        return out


def scene() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    every = torch.cartesian_prod(*[torch.arange(SIDE)] * 3)
    cells = [
        nn.functional.pad(every[torch.randperm(len(every), generator=generator)[:size]], (1, 0), value=number)
        for number, size in enumerate(SIZES)
    ]
    return torch.randn(sum(SIZES), 4, generator=generator), torch.cat(cells).int()


def adapted(seed: int = 0, **fields: Any) -> PointPeftModel:
    torch.manual_seed(0)
    base = Sparse().eval()
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["first", "second", "wide"], modules_to_save=[], **{"r": 3, **fields})
    return get_peft_model(base, config).eval()


def test_a_fresh_adapter_changes_nothing_and_adds_what_the_equation_says() -> None:
    model, given = adapted(lora_alpha=6), scene()
    with torch.no_grad():
        expected = model(*given)
        with model.disable_adapter():
            assert torch.equal(model(*given), expected)
        move(model)
        found = model(*given)
        own = get_adapter(model, "default").tensors()
        for name in ("first", "second", "wide"):
            tensors = [own[f"{name}.lora_{factor}.weight"] for factor in "BA"]
            model.base_model.get_parameter(f"{name}.weight").add_(2 * torch.einsum("or,rxyzi->oxyzi", *tensors))
        with model.disable_adapter():
            assert torch.allclose(model(*given), found, atol=1e-4)
        assert not torch.allclose(found, expected, atol=1e-2)


def test_merging_gives_the_same_output_and_unmerging_the_same_base() -> None:
    model, given = adapted(), scene()
    move(model)
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    expected = model(*given)
    model.merge()
    assert torch.allclose(model(*given), expected, atol=1e-4)
    model.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.state_dict().items())
    assert torch.equal(model(*given), expected)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model, given = adapted(), scene()
    move(model)
    model.save_pretrained(tmp_path)
    base = adapted(seed=5).unload()
    plain = base(*given)
    again = PointPeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(again(*given), model(*given)) and not torch.allclose(plain, again(*given), atol=1e-2)


@pytest.mark.parametrize("combination_type", ["cat", "svd", "linear"])
def test_two_are_combined(combination_type: Any) -> None:
    model, given = adapted(), scene()
    move(model)
    expected = model(*given)
    model.add_weighted_adapter(["default"], [1.0], "both", combination_type=combination_type)
    model.set_adapter("both")
    assert torch.allclose(model(*given), expected, atol=1e-3)


def test_gradients_reach_the_factors_and_the_input() -> None:
    model, (features, cells) = adapted(lora_dropout=0.0), scene()
    move(model)
    features.requires_grad_()
    model.train()(features, cells).square().sum().backward()
    assert features.grad is not None and bool(features.grad.any())
    for name, parameter in model.adapters.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
    direction = {name: torch.randn_like(p) for name, p in model.adapters.named_parameters()}
    with torch.no_grad():
        ends = []
        for step in (1e-3, -2e-3):
            for name, parameter in model.adapters.named_parameters():
                parameter.add_(direction[name], alpha=step)
            ends.append(float(model(features, cells).double().square().sum()))
    grads = {name: p.grad for name, p in model.adapters.named_parameters() if p.grad is not None}
    slope = sum(float((grad * direction[name]).sum()) for name, grad in grads.items())
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


def test_which_cells_are_neighbours_is_found_once_for_a_layer_and_its_update(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, found = adapted(), scene(), []
    from spconv.pytorch import ops

    make = ops.get_indice_pairs

    def count(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return make(*args, **kwargs)

    monkeypatch.setattr(ops, "get_indice_pairs", count)
    with model.disable_adapter():
        model(*given)
    plain = len(found)
    model(*given)
    # The last has no key by which its update could find them.
    assert len(found) - plain == plain + 1 == 3


@pytest.mark.parametrize("name", ["torch_pointcloud_ptv3", "torch_pointcloud_ptv3_seg"])
def test_the_positions_of_a_published_class_by_name(name: str, tmp_path: Path) -> None:
    backbone = BACKBONES[name]
    args = backbone.inputs(2, 0)
    config = LoraConfig(target_modules=["cpe_conv", "qkv"], modules_to_save=[])
    model = get_peft_model(backbone.build(), config, example_inputs=backbone.example).eval()
    with torch.no_grad():
        with model.disable_adapter():
            plain = backbone.select(model(*args))
        assert torch.allclose(backbone.select(model(*args)), plain, atol=1e-6)
        assert any("cpe_conv.lora_A" in name for name in get_adapter(model, "default").tensors())
        move(model)
        moved = backbone.select(model(*args))
        assert not torch.allclose(moved, plain, atol=1e-3)
        assert torch.allclose(backbone.select(model(*args)), moved, atol=1e-6)
        alone = torch.cat([backbone.select(model(*backbone.slice(args, i))) for i in range(2)])
        assert torch.allclose(alone, moved, atol=1e-4)
        model.save_pretrained(tmp_path)
        again = PointPeftModel.from_pretrained(model.unload(), tmp_path).eval()
        assert torch.allclose(backbone.select(again(*args)), moved, atol=1e-6)


def test_dora_and_other_convolutions_are_refused() -> None:
    with pytest.raises(AnatomyError, match=r"use_dora: 'first' is a SubMConv3d, which LORA adapts without DoRA only"):
        adapted(use_dora=True)
    supply_spconv_on_cpu()
    from spconv.pytorch import SparseConv3d

    with pytest.raises(AnatomyError, match=r"'0' is a SparseConv3d; LORA adapts linear layers .* SubMConv3d"):
        get_peft_model(nn.Sequential(SparseConv3d(4, 4, 3)), LoraConfig(target_modules=["0"]))


def test_spconv_is_not_imported_by_the_package() -> None:
    code = "import sys, point_peft.model, point_peft.tuners.lora; sys.exit('spconv' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
