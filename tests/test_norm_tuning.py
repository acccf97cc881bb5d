"""Norm tuning: which norms it takes, and that tuned tensors act as the tensors they stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from point_peft import AnatomyError, NormTuningConfig, PeftConfig, SSFConfig, get_peft_model
from point_peft.adapting.adapter import get_adapter
from tests.adapting import full_point_mae, move, moved
from tests.zoo import BACKBONES

pytestmark = pytest.mark.smoke


class OwnRMSNorm(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def adapted(name, **fields):
    return moved(NormTuningConfig(modules_to_save=[], **fields), name, scale=0.3)


def test_parameters_on_point_mae():
    """19,200, as METHODS.md counts them: 25 norms of 384 channels."""
    model = get_peft_model(full_point_mae(), NormTuningConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 19_200


@pytest.mark.parametrize(
    "name", ["point_mae", "pointgpt", "uni3d", "torch_pointcloud_ptv1", "torch_pointcloud_ptv3", "official_ptv2"]
)
def test_tuned_tensors_are_the_norms_own(name: str):
    """LayerNorm, BatchNorm with frozen statistics, and norms that are not torch's."""
    backbone = BACKBONES[name]
    model, args = adapted(name), backbone.inputs(2, 0)
    tuned = {key: tensor.detach().clone() for key, tensor in get_adapter(model, "default").tensors().items()}
    with torch.no_grad():
        output = backbone.select(model(*args))
        plain = model.unload()
        without = backbone.select(plain(*args))
        plain.load_state_dict({**plain.state_dict(), **tuned})
        assert torch.allclose(backbone.select(plain(*args)), output, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(without, output, atol=1e-2)


@pytest.mark.parametrize("norm", ["rms", "rms of its own", "without bias"])
def test_norms_without_bias(norm: str):
    made = {
        "rms": lambda: torch.nn.RMSNorm(24),
        "rms of its own": lambda: OwnRMSNorm(24),
        "without bias": lambda: torch.nn.LayerNorm(24, bias=False),
    }[norm]()
    backbone = BACKBONES["point_mae"].build()
    backbone.get_submodule("blocks.blocks.1").norm1 = made
    model = get_peft_model(backbone, NormTuningConfig(target_modules=["blocks.1.norm1"], modules_to_save=[])).eval()
    (name, tensor), *others = get_adapter(model, "default").tensors().items()
    assert name == "blocks.blocks.1.norm1.weight" and not others
    (points,) = BACKBONES["point_mae"].inputs(2, 0)
    with torch.no_grad():
        tensor.add_(torch.randn(24))
        output = model(points)
        assert torch.allclose(model.merge_and_unload()(points), output, atol=1e-4)
        made.get_parameter("weight").sub_(tensor)
        assert not torch.allclose(backbone(points), output, atol=1e-2)


def test_which_norms():
    assert [row.name for row in adapted("point_mae", layers_to_transform=[2]).get_layer_status()] == [
        "blocks.blocks.2.norm1",
        "blocks.blocks.2.norm2",
    ]
    assert [row.name for row in adapted("point_mae", exclude_modules=["norm1", "norm2"]).get_layer_status()] == ["norm"]
    with pytest.raises(AnatomyError, match=r"'blocks.blocks.0.mlp.fc1' is a Linear; only a norm with a weight"):
        adapted("point_mae", target_modules=["fc1"])


def test_beside_ssf_at_the_same_norms():
    tuners = (NormTuningConfig(), SSFConfig())
    both = get_peft_model(full_point_mae(), PeftConfig(tuners=tuners, modules_to_save=[]))
    assert both.get_nb_trainable_parameters()[0] == 19_200 + 102_912


@pytest.mark.parametrize("tuners", [(NormTuningConfig(), SSFConfig()), (SSFConfig(), NormTuningConfig())])
def test_a_norm_that_is_given_other_tensors_runs_the_parts_of_other_methods_too(tuners):
    backbone = BACKBONES["point_mae"].build()
    norm = backbone.get_submodule("blocks.blocks.1").norm1 = OwnRMSNorm(24)
    alone = [dataclasses.replace(tuner, target_modules=["blocks.1.norm1"]) for tuner in tuners]
    model = get_peft_model(backbone, PeftConfig(tuners=alone, modules_to_save=[])).eval()
    move(model)
    calls = []
    norm.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    model(*BACKBONES["point_mae"].inputs(2, 0)).square().sum().backward()
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in get_adapter(model, "default").tensors().items()}
    ((given, found),) = calls
    changed = tensors["weight"] * given / (given.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(found, changed * tensors["gamma"] + tensors["beta"], atol=1e-5)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.adapters.parameters())
    assert not any(row.unproven_adapters for row in model.get_layer_status())
