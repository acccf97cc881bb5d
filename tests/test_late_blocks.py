"""Point-PEFT in the later blocks, as by default: those ahead of them stay frozen, and what they give is the query."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import IDPTConfig, LoraConfig, PeftConfig, PointPEFTConfig, PointPeftModel, TunerConfig, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.files.format import CONFIG_FILE
from point_peft.tuners.point_peft.prior import MemoryBank
from tests import golden
from tests.adapting import banks
from tests.test_point_peft import (
    SIZES,
    adapted,
    bank_of,
    bank_rows,
    clouds,
    randomise,
    retrieve_standardised,
    small,
    small_base,
)
from tests.zoo import BACKBONES

EARLIER = PointPEFTConfig.earlier


def with_tuners(*tuners: TunerConfig) -> PointPeftModel:
    """A small adapted model in eval mode of several methods in one adapter, with noise in all that is trained."""
    model = get_peft_model(small_base(), PeftConfig(tuners=tuners), memory_bank=bank_rows())
    torch.manual_seed(1)
    randomise(get_adapter(model, "default"))
    return model.eval()


def count_calls(model: PointPeftModel) -> Counter[str]:
    """How often each block, and the encoder, is called from now on."""
    counts: Counter[str] = Counter()
    for path in ("encoder", *(f"blocks.blocks.{number}" for number in range(4))):
        name = path.removeprefix("blocks.blocks.")
        module = model.get_base_model().get_submodule(path)
        module.register_forward_pre_hook(lambda module, args, name=name: counts.update([name]), prepend=True)
    return counts


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries that banks get."""
    seen: list[Tensor] = []
    look_up = MemoryBank.prior

    def prior(self: MemoryBank, query: Tensor) -> Tensor:
        seen.append(query)
        return look_up(self, query)

    monkeypatch.setattr(MemoryBank, "prior", prior)
    return seen


def features(base: nn.Module, *args: Tensor, block: str = "blocks.blocks.2", prefix: int = 1) -> Tensor:
    """The maxima (b, c) of the patch tokens that a block of the backbone gets."""
    tokens: list[Tensor] = []
    handle = base.get_submodule(block).register_forward_pre_hook(lambda module, given: tokens.append(given[0]))
    with torch.no_grad():
        base(*args)
    handle.remove()
    return tokens[0][:, prefix:].amax(dim=1)


# ---- the blocks ahead ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_every_block_runs_once_and_those_ahead_without_autograd(mode: bool) -> None:
    model, points = adapted(late=True).train(mode), clouds(6)
    base: Any = model.get_base_model()
    counts = count_calls(model)
    grads: dict[int, bool] = {}
    for number, block in enumerate(base.blocks.blocks):
        block.register_forward_pre_hook(
            lambda module, args, number=number: grads.update({number: args[0].requires_grad}), prepend=True
        )
    output = model(points)
    assert counts == {"encoder": 1, "0": 1, "1": 1, "2": 1, "3": 1}
    assert grads == {0: False, 1: False, 2: False, 3: True}
    assert output.requires_grad
    sites = {path for path, part in get_adapter(model, "default").all_parts() if list(part.parameters())}
    assert not any(path.startswith(("blocks.blocks.0", "blocks.blocks.1")) for path in sites)


def test_blocks_that_are_named_are_adapted_whatever_the_share() -> None:
    def blocks(**options: Any) -> set[str]:
        tensors = get_adapter(adapted(late=True, **options), "default").tensors()
        return {name.split(".")[2] for name in tensors if ".mlp.point_peft.adapter." in name}

    assert blocks() == {"2", "3"}
    assert blocks(adapted_share=0.1) == {"3"}
    assert blocks(adapted_share=1.0) == {"0", "1", "2", "3"}
    assert blocks(layers_to_transform=[0, 2]) == {"0", "2"}
    assert blocks(target_modules=r".*\.1") == {"1"}


# ---- the query -------------------------------------------------------------------------------------------------------

LATE = small(late=True)
AHEAD: dict[str, tuple[TunerConfig, ...]] = {
    "alone": (LATE,),
    "after LORA": (LoraConfig(), LATE),
    "before LORA": (LATE, LoraConfig()),
    "after what trains the class token": (IDPTConfig(tuned_tokens=["cls_token"]), LATE),
    "before what trains the class token": (LATE, IDPTConfig(tuned_tokens=["cls_token"])),
    "norms of blocks ahead": (dataclasses.replace(LATE, tuned_norms=["blocks.0.norm1"]),),
    "a class token of its own": (dataclasses.replace(LATE, tuned_tokens=["cls_token", "cls_pos"]),),
}
"""What is in the adapter beside it, or of its own ahead of the first block."""
each_way = pytest.mark.parametrize("how", AHEAD)


@each_way
def test_the_query_is_the_plain_backbone_s_whatever_acts_ahead(how: str, queries: list[Tensor]) -> None:
    model, points = with_tuners(*AHEAD[how]), clouds(3)
    counts = count_calls(model)
    output = model(points)
    ahead = 1 if how == "alone" else 2
    assert counts == {"encoder": 1, "0": ahead, "1": ahead, "2": ahead, "3": 1}
    assert not queries[0].requires_grad
    torch.testing.assert_close(queries[0], features(small_base(), points))
    golden.assert_close(torch.cat([model(cloud[None]) for cloud in points]).detach(), output.detach())


@torch.no_grad()
def test_the_query_is_the_plain_backbone_s_beside_another_active_adapter(queries: list[Tensor]) -> None:
    model, points = adapted(late=True), clouds(3)
    model.add_adapter("lora", LoraConfig(modules_to_save=[]))
    randomise(get_adapter(model, "lora"))
    model.eval()
    for active in (["lora", "default"], ["default", "lora"]):
        model.set_adapter(active)
        model(points)
        torch.testing.assert_close(queries.pop(), features(small_base(), points))


@torch.no_grad()
def test_a_direct_call_of_the_first_adapted_block_has_a_prior(queries: list[Tensor]) -> None:
    base: Any = adapted(late=True).get_base_model()
    patches, centres = base.group_divider(clouds(3))
    base.pos_embed(centres)
    tokens = torch.cat([base.cls_token.expand(3, -1, -1), base.reduce_dim(base.encoder(patches))], dim=1)
    base.blocks.blocks[2](tokens)
    assert torch.equal(queries[0], tokens[:, 1:].amax(dim=1))


@torch.no_grad()
def test_a_cloud_that_the_bank_was_built_of_finds_itself(queries: list[Tensor]) -> None:
    model, points = adapted(late=True, bank=False), clouds(10)
    counts = count_calls(model)
    model.build_memory_bank(points.split(4))
    assert counts == {"encoder": 3, "0": 3, "1": 3, "2": 3}  # it ends at the first adapted block
    model(points)
    prior = bank_of(model).prior(queries[0])
    torch.testing.assert_close(prior[:, 2], prior[:, 0], atol=1e-4, rtol=1e-4)
    rows = features(small_base(), points)
    expected = torch.stack([retrieve_standardised(q, rows, 3, LATE.temperature) for q in rows])
    torch.testing.assert_close(prior, expected, atol=1e-4, rtol=1e-4)


# ---- the bank --------------------------------------------------------------------------------------------------------


def filled(temperature: float = 20.0, *, standardised: bool = True) -> MemoryBank:
    bank = MemoryBank(
        24, 8, "block", torch.float32, leave_nearest_out=False, standardised=standardised, temperature=temperature
    )
    bank.fill(alike())
    return bank.eval()


def alike(count: int = 20, seed: int = 5) -> Tensor:
    """Features (count, c) whose common part is much larger than that in which they differ."""
    return 1 + 0.05 * torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_standardised_retrieval_equals_a_naive_one(temperature: float) -> None:
    query = alike(3, seed=9)
    expected = torch.stack([retrieve_standardised(q, alike(), 8, temperature) for q in query])
    torch.testing.assert_close(filled(temperature).prior(query), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(filled(temperature).prior(7 * query), expected, atol=1e-4, rtol=1e-4)


def test_by_standardisation_and_temperature_the_nearest_rows_count_more() -> None:
    query, entropies = alike(4, seed=9), []
    for bank in (filled(1.0, standardised=False), filled(1.0), filled(5.0), filled(20.0)):
        prior = bank.prior(query)
        similarity = torch.einsum("bc,bkc->bk", nn.functional.normalize(prior[:, 0], dim=1), prior[:, 2:])
        weights = (bank.temperature * similarity).softmax(dim=1)
        torch.testing.assert_close(prior[:, 1], torch.einsum("bk,bkc->bc", weights, prior[:, 2:]))
        entropies.append(float(-(weights * weights.log()).sum(dim=1).mean()))
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] < 0.8 * entropies[0]


@pytest.mark.parametrize("change", ["autocast", "bfloat16", "inference mode"])
def test_retrieval_is_as_exact_where_the_model_is_not(change: str) -> None:
    query, bank = alike(4, seed=9), filled()
    expected = bank.prior(query)
    if change == "bfloat16":
        bank = bank.to(torch.bfloat16)
    if change == "inference mode":
        with torch.inference_mode():
            bank.fill(alike())
        assert not any(buffer.is_inference() for buffer in bank.buffers())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "autocast"):
        assert torch.equal(bank.prior(query), expected)


def test_a_copy_that_waits_for_rows_gets_what_they_are_compared_by_too() -> None:
    model = adapted(late=True, bank=False)
    average = copy.deepcopy(model)
    model.build_memory_bank([clouds(8)])
    assert torch.equal(average(clouds(3)), model(clouds(3)))


# ---- several adapters, files -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_adapters_in_one_batch_each_ask_their_own_bank() -> None:
    model, points = adapted(late=True), clouds(6)
    model.add_adapter("second", dataclasses.replace(LATE, adapted_share=0.75), memory_bank=bank_rows(30))
    randomise(get_adapter(model, "second"))
    model.eval()
    names = ["default", "second", None, "default", "second", "second"]
    found = model(points, adapter_names=names)
    for name in set(names):
        with model.disable_adapter() if name is None else model.use_adapter(name):
            expected = model(points)
        mine = [number for number, other in enumerate(names) if other == name]
        golden.assert_close(found[mine], expected[mine])


@each_way
@torch.no_grad()
def test_a_base_with_another_class_token_gives_the_same_output(how: str, tmp_path: Path) -> None:
    model, points = with_tuners(*AHEAD[how]), clouds(3)
    model.save_pretrained(tmp_path)
    base = small_base()
    for name in ("cls_token", "cls_pos"):
        base.get_parameter(name).normal_()
    again = PointPeftModel.from_pretrained(base, tmp_path).eval()
    golden.assert_close(again(points), model(points))


def test_a_configuration_that_does_not_state_the_newer_fields_is_read_as_it_was_meant() -> None:
    stated = PointPEFTConfig(adapter_width=4).to_json()
    old = {name: value for name, value in stated.items() if name not in EARLIER}
    assert TunerConfig.from_json(old) == PointPEFTConfig(adapter_width=4, **EARLIER)
    assert TunerConfig.from_json(stated) == PointPEFTConfig(adapter_width=4)
    with_stem = PointPEFTConfig(adapter_width=4, **{**EARLIER, "prior": "stem"})
    assert TunerConfig.from_json({**old, "prior": "stem"}) == with_stem
    assert dataclasses.replace(PointPEFTConfig.published(), init="identity") == PointPEFTConfig(**EARLIER)


@torch.no_grad()
def test_an_older_file_gives_what_it_gave(tmp_path: Path) -> None:
    model, points = adapted(**EARLIER), clouds(3)
    model.save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    about = json.loads(path.read_text("utf-8"))
    (tuner,) = about["tuners"]
    assert tuner.keys() >= EARLIER.keys()
    about["tuners"] = [{name: value for name, value in tuner.items() if name not in EARLIER}]
    path.write_text(json.dumps(about), "utf-8")
    again = PointPeftModel.from_pretrained(small_base(), tmp_path).eval()
    assert torch.equal(again(points), model(points))


# ---- other backbones -------------------------------------------------------------------------------------------------


def test_a_backbone_of_one_block_is_adapted_there(queries: list[Tensor]) -> None:
    torch.manual_seed(0)
    base = PointTransformer(**{**SIZES, "depth": 1}).eval()
    plain = copy.deepcopy(base)
    model = get_peft_model(base, LATE, memory_bank=bank_rows()).eval()
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert {"cls_token", "cls_pos", "embeddings"} <= trained and "prefix_shift" not in trained
    model(clouds(3)).sum().backward()
    torch.testing.assert_close(queries[0], features(plain, clouds(3), block="blocks.blocks.0"))


def test_of_a_hierarchical_backbone_the_last_half_of_all_blocks_is_adapted(queries: list[Tensor]) -> None:
    backbone = BACKBONES["point_m2ae"]
    model = get_peft_model(backbone.build(), LATE).eval()
    assert model.anatomy is not None
    paths = [block.path for block in model.anatomy.blocks]
    first = paths[-round(len(paths) / 2)]
    (memory,) = banks(get_adapter(model, "default"))
    assert memory.source == first
    model.build_memory_bank([backbone.inputs(8, 1)], to_inputs=lambda args: args)
    torch.manual_seed(1)
    randomise(get_adapter(model, "default"))
    args, calls = backbone.inputs(3, 5), Counter[str]()
    for path in paths:
        module = model.get_base_model().get_submodule(path)
        module.register_forward_pre_hook(lambda module, args, path=path: calls.update([path]))
    backbone.select(model.train()(*args)).square().sum().backward()
    assert calls == dict.fromkeys(paths, 1)
    for name, parameter in get_adapter(model, "default").named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name
    model.eval()(*args)
    torch.testing.assert_close(queries[-1], features(backbone.build(), *args, block=first, prefix=0))
