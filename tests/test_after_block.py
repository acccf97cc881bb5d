"""What follows a block in Point-PEFT by hand: the gradients of the plain form, in every variant of the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import PointPeftModel
from point_peft.adapting.adapter import get_adapter
from point_peft.parts import quick_bottleneck as quick_bottleneck_module
from point_peft.tuners.point_peft import parts
from tests.test_point_peft import adapted, clouds

# Without chance, so that both ways compute the same.
STILL: dict[str, Any] = {"adapter_dropout": 0.0, "prompt_dropout": 0.0, "local_attention_drop_path": 0.0}


def trained(model: PointPeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a training step and what it leaves: gradients, statistics."""
    model = model.double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logits: Tensor = model(clouds(6).double())
    (logits.sin().sum() + logits.square().sum()).backward()
    adapter = get_adapter(model, "default")
    left = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    left |= {name: buffer for name, buffer in adapter.named_buffers() if "bank" not in name}
    return logits.detach(), left


def in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parts, quick_bottleneck_module):
        monkeypatch.setattr(module, "works_by_hand", lambda x, *modules: False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "published"},
        {"pooling_norm": "layer"},
        {"num_prompts": 0, "memory_bank": False, "bank": False},
        {"prompt_layers": 4, "prior": "stem"},
        {"target_modules": ["blocks.blocks.1", "blocks.blocks.3"], "propagation_scale": 0.0},
    ],
    ids=["default", "no gate", "layer norm", "no prompts", "prompts everywhere", "some blocks"],
)
def test_it_learns_what_the_plain_form_learns(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found, by_hand = trained(adapted(**STILL, **options))
    in_plain_words(monkeypatch)
    expected, plain = trained(adapted(**STILL, **options))
    torch.testing.assert_close(found, expected)
    assert by_hand.keys() == plain.keys()
    assert len(by_hand) > 20
    torch.testing.assert_close(by_hand, plain, rtol=1e-6, atol=1e-9)


def test_what_is_not_trained_gets_no_gradient_and_the_rest_the_same() -> None:
    def freeze(model: PointPeftModel, some: Callable[[str], bool]) -> PointPeftModel:
        for name, parameter in get_adapter(model, "default").named_parameters():
            parameter.requires_grad_(not some(name))
        return model

    def frozen(name: str) -> bool:
        return any(part in name for part in ("gate", "geometry.norm.bias", "down.weight", "prompt_coordinates"))

    _, every = trained(adapted(**STILL))
    _, some = trained(freeze(adapted(**STILL), frozen))
    assert some.keys() == {name for name in every if not frozen(name)}
    torch.testing.assert_close(some, {name: every[name] for name in some}, rtol=1e-6, atol=1e-9)


def test_a_weight_that_was_changed_ahead_of_the_backward_pass_is_noticed() -> None:
    model = adapted(**STILL).train()
    loss = model(clouds(3)).sum()
    with torch.no_grad():
        for name, parameter in get_adapter(model, "default").named_parameters():
            if "geometry.norm.weight" in name:
                parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_blocks_called_alone_see_where_the_prompts_have_moved_to() -> None:
    def outputs(model: PointPeftModel, *, group_again: bool) -> list[Tensor]:
        base: Any = model.get_base_model()
        _, centres = base.group_divider(clouds(3))
        base.pos_embed(centres)
        tokens = torch.randn(3, 1 + centres.shape[1], 24, generator=torch.Generator().manual_seed(1))
        found = []
        for _ in range(2):
            found.append(base.blocks.blocks[1](tokens).detach())
            with torch.no_grad():
                for name, parameter in get_adapter(model, "default").named_parameters():
                    if "prompt_coordinates" in name:
                        parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
            if group_again:
                base.pos_embed(centres)
        return found

    found = outputs(adapted(memory_bank=False, bank=False), group_again=False)
    expected = outputs(adapted(memory_bank=False, bank=False), group_again=True)
    assert not torch.equal(*found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_it_keeps_less_than_the_plain_form_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        model = adapted(**STILL).train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(clouds(16))
        assert output.requires_grad
        return sum(storage.nbytes() for storage in storages.values())

    by_hand = kept()
    in_plain_words(monkeypatch)
    monkeypatch.setattr(parts, "checkpoint", lambda run, *args, **options: run(*args))
    tokens_of_all_blocks = 4 * 16 * 13 * 24 * 4
    assert by_hand < kept() - 2 * tokens_of_all_blocks
