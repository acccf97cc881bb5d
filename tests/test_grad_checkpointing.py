"""The reference backbones with gradient checkpointing: the same training in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from point_peft import DAPTConfig, IDPTConfig, PeftConfig, PointPeftModel
from point_peft.adapting.adapter import get_adapter
from tests.adapting import (
    PAIRS,
    adapt,
    assert_same_values,
    distance,
    each,
    few,
    gradients,
    loss_of,
    representatives,
    run,
    tensors,
)
from tests.methods import HEADS_ALONE
from tests.zoo import BACKBONES, TinyBackbone, library

REFERENCES = [pair for pair in PAIRS if pair[1].make.__module__ == library.__name__]


def step(model: PointPeftModel, backbone: TinyBackbone) -> tuple[Tensor, dict[str, Tensor], int]:
    """(output, gradients, bytes that the forward keeps for the backward pass) of a training step."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(6)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = backbone.select(model.train()(*backbone.inputs(3, 5)))
    loss_of(output).backward()
    return output.detach(), gradients(get_adapter(model, "default")), sum(kept.values())


@each(few(representatives(REFERENCES)))
def test_checkpointing_gives_the_same_training_in_less_memory(method: str, backbone: TinyBackbone) -> None:
    output, found, kept = step(adapt(backbone, method), backbone)
    model = adapt(backbone, method)
    base: Any = model.get_base_model()
    before = base.state_dict()
    base.set_grad_checkpointing()
    assert_same_values(base.state_dict(), before)
    again, repeated, less = step(model, backbone)
    assert torch.equal(again, output)
    assert list(repeated) == list(found)
    for name, gradient in found.items():
        assert distance(repeated[name], gradient) < 1e-5 or gradient.abs().max() < 1e-6, name
    # Of a head alone no gradient goes through a block, so nothing is kept there anyhow.
    assert less < kept or method in HEADS_ALONE


TOKENS = ("cls_token", "cls_pos")


@pytest.mark.parametrize(("first", "second"), [(TOKENS[:1], TOKENS[1:]), (TOKENS[1:], TOKENS[:1])])
def test_two_methods_tune_the_prefix_as_one_does(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """Each counts its own calls of a block."""

    def adapted(*tuned: tuple[str, ...]) -> PointPeftModel:
        tuners = IDPTConfig(tuned_tokens=tuned[0]), DAPTConfig(tuned_tokens=tuned[1])
        return adapt(BACKBONES["point_mae"], PeftConfig(tuners=tuners))

    both, one = adapted(first, second), adapted(TOKENS, ())
    wanted = tensors(one)
    with torch.no_grad():
        for name, tensor in tensors(both).items():
            tensor.copy_(wanted[name])
    assert torch.allclose(run(both, BACKBONES["point_mae"]), run(one, BACKBONES["point_mae"]), atol=1e-5)
    _, found, _ = step(both, BACKBONES["point_mae"])
    base: Any = both.get_base_model()
    base.set_grad_checkpointing()
    both.zero_grad()
    _, repeated, _ = step(both, BACKBONES["point_mae"])
    for name, gradient in found.items():
        assert gradient.any() and distance(repeated[name], gradient) < 1e-5, name


def test_checkpointing_is_switched_off_again() -> None:
    backbone = BACKBONES["part_seg"]
    model = adapt(backbone, "LORA")
    _, _, kept = step(model, backbone)
    base: Any = model.get_base_model()
    base.set_grad_checkpointing()
    base.set_grad_checkpointing(False)
    model.zero_grad()
    assert step(model, backbone)[2] == kept
