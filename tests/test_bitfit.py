"""BitFit: which biases it takes, and that they act as the biases they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples.backbones import BACKBONES, clouds
from point_peft import AnatomyError, BitFitConfig, PeftConfig, PointPEFTConfig, get_peft_model
from point_peft.backbones import PointTransformer
from point_peft.injection import get_adapter


def test_parameters_on_point_mae():
    """37,248 with the final norm, as METHODS.md counts them: the base has no qkv bias."""
    model = get_peft_model(PointTransformer(), BitFitConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 37_248


def test_a_tuned_bias_is_the_bias():
    backbone, (points,) = BACKBONES["point_mae"].build(), clouds(2, 0)
    model = get_peft_model(backbone, BitFitConfig(modules_to_save=[]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_()
    tuned = {name: tensor.clone() for name, tensor in get_adapter(model, "default").tensors().items()}
    output = model(points)
    plain: nn.Module = model.unload()
    plain.load_state_dict({**plain.state_dict(), **tuned})
    assert torch.allclose(plain(points), output, atol=1e-4)


def test_a_module_without_bias_is_refused():
    with pytest.raises(AnatomyError, match=r"'blocks.blocks.0.attn.qkv' \(Linear\) has no bias to tune"):
        get_peft_model(BACKBONES["point_mae"].build(), BitFitConfig(target_modules=["qkv"]))


def test_beside_point_peft_each_bias_is_tuned_once():
    tuners = (PointPEFTConfig(memory_bank=False), BitFitConfig())
    both = get_peft_model(BACKBONES["point_mae"].build(), PeftConfig(tuners=tuners, modules_to_save=[]))
    alone = get_peft_model(BACKBONES["point_mae"].build(), PeftConfig(tuners=tuners[:1], modules_to_save=[]))
    assert both.get_nb_trainable_parameters() == alone.get_nb_trainable_parameters()
