"""Linear probing: nothing but heads."""

from __future__ import annotations

import pytest

from point_peft import AdapterError, LinearProbeConfig, PointPeftError, get_peft_model
from tests.adapting import full_point_mae
from tests.zoo import BACKBONES

pytestmark = pytest.mark.smoke


def test_only_the_head_is_trained():
    model = get_peft_model(full_point_mae(), LinearProbeConfig())
    assert model.get_nb_trainable_parameters()[0] == 267_535
    assert [row.name for row in model.get_layer_status()] == ["cls_head_finetune"]


def test_no_module_can_be_named():
    with pytest.raises(PointPeftError, match=r"LinearProbeConfig.target_modules is \('qkv',\); allowed: None"):
        LinearProbeConfig(target_modules=["qkv"])


def test_without_heads_there_is_nothing_to_train():
    with pytest.raises(AdapterError, match=r"nothing to train: no head was found .*modules_to_save"):
        get_peft_model(BACKBONES["point_mae"].build(), LinearProbeConfig(modules_to_save=[]))
