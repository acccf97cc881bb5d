"""Handing tensors from block to block, under checkpointing and in direct calls; losses; a stem that is adapted."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft import (
    METHODS,
    AdapterError,
    IDPTConfig,
    LoraConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftModel,
    TunerConfig,
    VPTConfig,
    get_peft_model,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones.layers import TransformerEncoder
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call, Part
from point_peft.running.forward import Forward
from point_peft.running.nested import Args, Kwargs
from point_peft.tuners.point_peft.prior import MemoryBank
from tests.zoo import BACKBONES, clouds

SHALLOW = VPTConfig(mode="shallow", num_prompts=3, modules_to_save=[])


def adapted(config: TunerConfig | PeftConfig = SHALLOW) -> PointPeftModel:
    model = get_peft_model(BACKBONES["point_mae"].build(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def checkpointed(model: PointPeftModel, *, reentrant: bool) -> None:
    """Let the backbone's chain of blocks run each of them under checkpointing."""
    chain = model.base_model.blocks
    assert isinstance(chain, TransformerEncoder)

    def forward(tokens: Tensor, pos: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        tapped = []
        for i, block in enumerate(chain.blocks):
            tokens = checkpoint(block, tokens + pos, use_reentrant=reentrant)
            if i in taps:
                tapped.append(tokens)
        return tapped

    chain.forward = forward  # type: ignore[method-assign]


def gradients(model: PointPeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    model(*clouds(2, 0)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [SHALLOW, IDPTConfig(prompt_layer=1, modules_to_save=[])])
@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_gives_the_same_gradients(config, training):
    model = adapted(config).train(training)
    statistics = {name: buffer.clone() for name, buffer in model.adapters.named_buffers()}
    expected = gradients(model)
    once = {name: buffer.clone() for name, buffer in model.adapters.named_buffers()}
    for name, buffer in model.adapters.named_buffers():
        buffer.copy_(statistics[name])
    checkpointed(model, reentrant=False)
    found = gradients(model)
    assert found.keys() == expected.keys() == dict(model.adapters.named_parameters()).keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5), name
    assert all(torch.equal(buffer, once[name]) for name, buffer in model.adapters.named_buffers())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused():
    """It would lose the gradient of what goes from block to block beside the tokens, and say nothing."""
    model = adapted()
    checkpointed(model, reentrant=True)
    with pytest.raises(AdapterError, match=r"hands tensors on beside the tokens .* use_reentrant=False"):
        model(*clouds(2, 0))
    with torch.no_grad():
        model(*clouds(2, 0))  # without gradients there is nothing to lose


def test_blocks_called_directly():
    model = adapted()
    base: Any = model.base_model
    (points,) = clouds(2, 0)
    expected = model(points)
    for _ in range(2):  # a second round does not go on with the prompts of the first
        neighborhood, center = base.group_divider(points)
        pos = torch.cat([base.cls_pos.expand(2, -1, -1), base.pos_embed(center)], dim=1)
        tokens = torch.cat([base.cls_token.expand(2, -1, -1), base.encoder(neighborhood)], dim=1)
        found = base.blocks(tokens, pos, (2,))[0]
        assert torch.allclose(base.forward_head(base.norm(found)), expected, atol=1e-5)
    fresh: Any = adapted()
    fresh.base_model.pos_embed(center)
    with pytest.raises(
        AdapterError, match=r"block 'blocks.blocks.1' runs before the one whose prompts it should be han"
    ):
        fresh.base_model.blocks.blocks[1](tokens)


def test_a_forward_leaves_nothing_behind():
    """Neither a whole forward nor a direct one holds its graph once its outputs are gone."""
    model: Any = adapted()
    (points,) = clouds(2, 0)
    gc.collect()
    before = sum(type(thing) is Forward for thing in gc.get_objects())
    for _ in range(3):
        model(points).sum().backward()
        pos = torch.cat([model.cls_pos.expand(2, -1, -1), model.pos_embed(model.group_divider(points)[1])], dim=1)
        model.base_model.blocks(torch.randn_like(pos), pos, (2,))[0].sum().backward()
    gc.collect()
    # The last direct forward is there until the next.
    assert sum(type(thing) is Forward for thing in gc.get_objects()) <= before + 1


def test_several_active_adapters_hand_on_their_own():
    model = adapted()
    model.add_adapter("second", VPTConfig(mode="shallow", num_prompts=5, modules_to_save=[]))
    (points,) = clouds(2, 0)
    first = model(points)
    model.set_adapter(["default", "second"])
    both = model(points)
    model.set_adapter("second")
    assert not torch.allclose(both, first) and not torch.allclose(both, model(points))


# ---- losses ----------------------------------------------------------------------------------------------------------


class LossPart(Part):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if self.training:
            call.forward.add_loss(self.weight.square())
        return output * self.weight


@dataclass(frozen=True, kw_only=True)
class LossConfig(TunerConfig):
    method: ClassVar[str] = "LOSS"

    def build(self, backbone: Backbone) -> Blueprint:
        return Blueprint(parts=[(block.path, LossPart()) for block in backbone.known_anatomy("LOSS").blocks])


del METHODS["LOSS"]  # it is for these tests


def test_losses_of_the_last_forward():
    model = get_peft_model(BACKBONES["point_mae"].build(), LossConfig(modules_to_save=[]))
    assert model.auxiliary_loss().item() == 0.0
    (points,) = clouds(2, 0)
    model.train()
    model(points)
    loss = model.auxiliary_loss()
    assert loss.item() == 3.0
    loss.backward()
    assert [p.grad.item() for p in model.adapters.parameters() if p.grad is not None] == [2.0] * 3
    model.eval()
    model(points)
    assert model.auxiliary_loss().item() == 0.0
    model.train()
    with model.disable_adapter():
        model(points)
    assert model.auxiliary_loss().item() == 0.0


def test_losses_are_counted_once_under_checkpointing():
    model = get_peft_model(BACKBONES["point_mae"].build(), LossConfig(modules_to_save=[])).train()
    checkpointed(model, reentrant=False)
    (model(*clouds(2, 0)).sum() * 0.0 + model.auxiliary_loss()).backward()
    assert model.auxiliary_loss().item() == 3.0
    assert [p.grad.item() for p in model.adapters.parameters() if p.grad is not None] == [2.0] * 3


# ---- the stem --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["backbone", "stem"])
def test_a_changed_stem_does_not_change_what_queries_the_bank(prior):
    """The second pass is the frozen backbone's, whatever another method of the adapter does to the patch embedding."""
    point_peft = PointPEFTConfig(memory_bank=True, prior=prior, modules_to_save=[])
    lora = LoraConfig(target_modules=["encoder.first_conv.0", "reduce_dim"], modules_to_save=[])
    backbone = BACKBONES["point_bert"]
    model = get_peft_model(backbone.build(), PeftConfig(tuners=(point_peft, lora))).eval()
    batches = [backbone.inputs(4, seed) for seed in range(4)]
    model.build_memory_bank(batches, to_inputs=lambda batch: batch)
    queries: list[Tensor] = []
    (bank,) = [state for state in get_adapter(model, "default").shared_states() if isinstance(state, MemoryBank)]
    inner = bank.prior

    def noted(query: Tensor) -> Tensor:
        queries.append(query)
        return inner(query)

    bank.prior = noted  # type: ignore[method-assign]
    (points,) = backbone.inputs(3, 7)
    model(points)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    model(points)
    assert len(queries) == 2 and torch.equal(*queries)
