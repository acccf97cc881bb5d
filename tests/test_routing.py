"""Routing by memory bank: the right adapter for each cloud, none for what no bank is like, and one query for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AnatomyError,
    BitFitConfig,
    InputAdapterConfig,
    LoraConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftError,
    PointPeftModel,
    RoutingBankConfig,
    TunerConfig,
    get_peft_model,
    inject_adapter,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.parts.base import Bank
from point_peft.routing import Spread, bank_for_routing, scores
from point_peft.tuners.point_peft.prior import MemoryBank
from point_peft.tuners.routing_bank.bank import RoutingBank
from tests.adapting import banks, held, in_threads, move
from tests.zoo import BACKBONES

STRETCH = {"round": (1.0, 1.0, 1.0), "flat": (1.0, 1.0, 0.05), "long": (0.05, 0.05, 1.0)}
"""Clouds of three kinds; "long" is a kind that no adapter knows."""
KNOWN = ("round", "flat")
POINTS = 64


def clouds(kind: str, count: int, seed: int) -> Tensor:
    """(count, n, 3) points within stretched balls."""
    generator = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(torch.randn(count, POINTS, 3, generator=generator), dim=2)
    return directions * torch.tensor(STRETCH[kind])


def mixture(count: int = 4) -> Tensor:
    """(3 count, n, 3): clouds of all kinds, one after the other in turn."""
    return torch.stack([clouds(kind, count, 50) for kind in STRETCH], dim=1).flatten(0, 1)


EXPECTED = ("round", "flat", None) * 4


def with_bank(tuner: TunerConfig, **options: Any) -> PeftConfig:
    return PeftConfig(tuners=(tuner, RoutingBankConfig(**options)))


def routed(names: tuple[str, ...] = KNOWN, *, seed: int = 0) -> PointPeftModel:
    """A tiny backbone with an adapter of other values for each kind of clouds, and a bank of 40 of them."""
    torch.manual_seed(0)
    model = get_peft_model(BACKBONES["point_mae"].build(), with_bank(LoraConfig(r=2)), names[0])
    for name in names[1:]:
        model.add_adapter(name, with_bank(LoraConfig(r=2)))
    for name in names:
        model.build_memory_bank(clouds(name, 40, 7).split(16), adapter_name=name)
    torch.manual_seed(seed)
    move(model)
    return model.eval()


@pytest.fixture
def model() -> PointPeftModel:
    return routed()


def bank_at(model: PointPeftModel, name: str) -> Bank:
    bank = bank_for_routing(get_adapter(model, name))
    assert bank is not None
    return bank


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_a_cloud_is_routed_to_the_bank_that_it_fits_and_a_strange_one_to_none(model: PointPeftModel) -> None:
    names, found = model.route(mixture())
    assert names == EXPECTED
    assert found.shape == (12, 2) and not found.requires_grad
    for sample, name in enumerate(names):
        best = found[sample].max()
        assert (best < 0) if name is None else (found[sample, KNOWN.index(name)] == best >= 0)
    own = torch.stack([found[0::3, 0], found[1::3, 1]])
    assert own.min() > 0 and own.max() < 3, "a typical row scores about 1"


def test_the_scores_of_a_sample_do_not_depend_on_its_batch_or_on_the_order_of_adapters(model: PointPeftModel) -> None:
    points = mixture()
    names, found = model.route(points)
    for sample in (0, 5, 11):
        alone, own = model.route(points[sample : sample + 1])
        assert alone == names[sample : sample + 1]
        torch.testing.assert_close(own[0], found[sample], rtol=1e-3, atol=1e-3)
    turned, other = model.route(points, ["flat", "round"])
    assert turned == names
    torch.testing.assert_close(other, found.flip(1))
    only, one = model.route(points, ["flat"])
    assert only == tuple(name if name == "flat" else None for name in names)
    torch.testing.assert_close(one[1::3, 0], found[1::3, 1])


def test_arguments_are_given_as_everywhere(model: PointPeftModel) -> None:
    points = mixture()
    names, found = model.route(points)
    name = next(iter(BACKBONES["point_mae"].build().forward.__code__.co_varnames[1:2]))
    for given in ((points,), [points], {name: points}):
        again, others = model.route(given)
        assert again == names and torch.equal(others, found)
    kept = inject_adapter(BACKBONES["point_mae"].build(), with_bank(LoraConfig(r=2)), "round")
    held(kept).build_memory_bank(clouds("round", 40, 7).split(16), adapter_name="round")
    kept.eval()
    assert held(kept).route(points)[0] == tuple(name if name == "round" else None for name in EXPECTED)


def test_routing_is_of_the_frozen_backbone_in_any_mode(model: PointPeftModel) -> None:
    points = mixture()
    names, found = model.route(points)
    model.set_adapter(["round", "flat"])
    assert torch.equal(model.route(points)[1], found)
    modes = [module.training for module in model.train().modules()]
    assert model.route(points)[0] == names
    assert [module.training for module in model.modules()] == modes
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model.route(points)[0] == names


# ---- one query, and the answers --------------------------------------------------------------------------------------


def counted(model: PointPeftModel, path: str) -> list[int]:
    """The samples of each run of a module from now on."""
    seen: list[int] = []
    module = model.base_model.get_submodule(path)
    forward = type(module).forward

    class Counting(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            seen.append(len(args[0]))
            return forward(self, *args)

    module.__class__ = Counting
    return seen


def test_one_query_serves_all_adapters_and_its_stem_the_answers(model: PointPeftModel) -> None:
    model.add_adapter("third", with_bank(BitFitConfig()))
    model.build_memory_bank([clouds("long", 16, 7)], adapter_name="third")
    stem, block = counted(model, "encoder"), counted(model, "blocks.blocks.0")
    model.route(mixture())
    assert (stem, block) == ([12], [12])
    with torch.no_grad():
        model(mixture(), adapter_names="auto")
    assert stem == [12, 12], "the stem runs once for the query and the answers"
    assert sum(block[1:]) == 24, "the blocks run once for the query, and once for the answers"


def test_auto_answers_as_the_adapters_that_are_chosen(model: PointPeftModel) -> None:
    points = mixture()
    with torch.no_grad():
        answer = model(points, adapter_names="auto")
        named = model(points, adapter_names=list(EXPECTED))
        assert torch.equal(answer, named)
        assert torch.equal(model.forward_mixed((points,), {}, "auto"), named)
        for name in KNOWN:
            some = points[[index for index, other in enumerate(EXPECTED) if other == name]]
            assert torch.equal(model(some, adapter_names="auto"), model(some, adapter_names=[name] * 4))
        with model.disable_adapter():
            plain = model(points[2::3])
        assert not torch.equal(answer[0::3], plain), "the adapters have no effect"
        torch.testing.assert_close(answer[2::3], plain)


def test_a_routing_bank_changes_no_output_and_no_merge() -> None:
    points, outputs = mixture(), []
    for how in (LoraConfig(r=2), with_bank(LoraConfig(r=2))):
        torch.manual_seed(0)
        model = get_peft_model(BACKBONES["point_mae"].build(), PeftConfig.of(how)).eval()
        if banks(get_adapter(model, "default")):
            model.build_memory_bank([clouds("round", 16, 7)])
        assert not get_adapter(model, "default").asks_backbone
        move(model)
        block = counted(model, "blocks.blocks.0")
        with torch.no_grad():
            outputs.append(model(points))
            assert block == [12]
    assert torch.equal(*outputs)
    model = get_peft_model(
        BACKBONES["point_mae"].build(), PeftConfig(tuners=with_bank(LoraConfig(r=2)).tuners, modules_to_save=[])
    )
    model.build_memory_bank([clouds("round", 16, 7)])
    move(model.eval())
    with torch.no_grad():
        before = model(points)
        model.merge()
        assert model.merged_adapters == ("default",)
        torch.testing.assert_close(model(points), before, rtol=1e-3, atol=1e-4)
    with pytest.raises(AdapterError, match="clouds cannot be routed while 'default' is merged into the backbone"):
        model.route(points)
    with pytest.raises(AdapterError, match="adapters cannot take turns while 'default' is merged"):
        model(points, adapter_names="auto")


# ---- files, changes of rows, threads ---------------------------------------------------------------------------------


def test_files_carry_names_and_scores_bit_for_bit(model: PointPeftModel, tmp_path: Path) -> None:
    points = mixture()
    names, found = model.route(points)
    model.save_pretrained(tmp_path)
    torch.manual_seed(12345)
    loaded = PointPeftModel.from_pretrained(BACKBONES["point_mae"].build(), tmp_path / "round", "round")
    loaded.load_adapter(tmp_path / "flat", "flat")
    again, others = loaded.eval().route(points)
    assert again == names and torch.equal(others, found)
    with torch.no_grad():
        assert torch.equal(loaded(points, adapter_names="auto"), model(points, adapter_names="auto"))


def rebuilt(model: PointPeftModel, folder: Path) -> None:
    model.build_memory_bank(clouds("long", 40, 7).split(16), adapter_name="flat")


def swapped(model: PointPeftModel, folder: Path) -> None:
    other = routed(("round", "long"))
    other.save_pretrained(folder, "long")
    model.swap_adapter_(folder / "long" if (folder / "long").exists() else folder, "flat")


def loaded_state(model: PointPeftModel, folder: Path) -> None:
    other = routed(("round", "long"))
    state = other.state_dict()
    model.load_state_dict({name.replace("adapters.long.", "adapters.flat."): value for name, value in state.items()})


@pytest.mark.parametrize("change", [rebuilt, swapped, loaded_state])
def test_a_change_of_the_rows_is_seen(
    change: Callable[[PointPeftModel, Path], None], model: PointPeftModel, tmp_path: Path
) -> None:
    assert model.route(mixture())[0] == EXPECTED
    change(model, tmp_path)
    assert model.route(mixture())[0] == ("round", None, "flat") * 4


def test_threads_route_at_once(model: PointPeftModel) -> None:
    points = mixture()
    answers: dict[int, Any] = {}

    def task(number: int) -> Callable[[], None]:
        def work() -> None:
            with torch.no_grad():
                answers[number] = (model.route(points), model(points, adapter_names="auto"))

        return work

    in_threads([task(number) for number in range(4)])
    with torch.no_grad():
        expected = model(points, adapter_names=list(EXPECTED))
    for (names, found), answer in answers.values():
        assert names == EXPECTED
        assert torch.equal(found, answers[0][0][1]) and torch.equal(answer, expected)


# ---- distances -------------------------------------------------------------------------------------------------------


def filled(rows: Tensor) -> RoutingBank:
    bank = RoutingBank(rows.shape[1], None)
    bank.fill(rows)
    return bank


def some_rows(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 6, generator=generator) * torch.tensor([0.3, 0.2, 0.1, 0.1, 0.05, 0.02])
    return nn.functional.normalize(rows + torch.tensor([1.0, 0.5, 0, 0, 0, 0]), dim=1)


def test_the_distances_of_rows_left_out_are_those_of_a_bank_without_them() -> None:
    rows = filled(some_rows(40)).features().double()
    n, c = rows.shape
    sphere = 0.2 * n / (n - 1) * (rows - rows.mean(0)).square().sum() / n / c
    distances = []
    for number in range(n):
        others = torch.cat([rows[:number], rows[number + 1 :]])
        covariance = 0.8 * torch.cov(others.T, correction=0) + sphere * torch.eye(c)
        away = rows[number] - others.mean(0)
        distances.append((away @ torch.linalg.solve(covariance, away)).sqrt())
    expected = torch.stack(distances).quantile(torch.tensor([0.5, 0.99], dtype=torch.float64))
    spread = Spread.of(filled(some_rows(40)))
    torch.testing.assert_close(torch.stack([spread.typical, spread.limit]).double(), expected, rtol=1e-4, atol=1e-4)


def test_ninety_nine_of_a_hundred_rows_are_kept_and_new_ones_as_often() -> None:
    bank = filled(some_rows(400))
    for own, most in ((bank.features(), 0.03), (some_rows(2000, seed=1), 0.03)):
        share = float((scores(own, [bank]) < 0).float().mean())
        assert share < most
    assert float(scores(some_rows(2000, seed=1), [bank]).median()) == pytest.approx(1, abs=0.1)


def test_rows_that_are_all_alike_have_a_place() -> None:
    bank = filled(some_rows(1).repeat(9, 1))
    near, far = scores(torch.cat([bank.features()[:1], some_rows(1, seed=1)]), [bank]).flatten().tolist()
    assert near > 0 > far


@pytest.mark.parametrize("standardised", [True, False])
def test_a_bank_of_prompts_gives_its_features_back(standardised: bool) -> None:
    bank = MemoryBank(
        6, 2, "backbone", torch.float32, leave_nearest_out=False, standardised=standardised, temperature=1.0
    )
    bank.fill(5 * some_rows(40))
    torch.testing.assert_close(bank.features(), some_rows(40), rtol=1e-4, atol=1e-4)


# ---- which bank ------------------------------------------------------------------------------------------------------


def test_the_bank_of_prompts_routes_too_and_with_banks_for_routing() -> None:
    """Both ask what the frozen backbone gives at its end."""
    model = routed(("round",))
    model.add_adapter("flat", PointPEFTConfig.published())
    model.build_memory_bank(clouds("flat", 40, 7).split(16), adapter_name="flat")
    assert isinstance(bank_at(model, "flat"), MemoryBank)
    assert model.eval().route(mixture())[0] == EXPECTED


def test_of_two_banks_of_an_adapter_the_one_for_routing_counts_and_one_pass_fills_both() -> None:
    for tuners in (
        (PointPEFTConfig(memory_bank=True), RoutingBankConfig()),
        (RoutingBankConfig(), PointPEFTConfig(memory_bank=True)),
    ):
        model = get_peft_model(BACKBONES["point_mae"].build(), PeftConfig(tuners=tuners), "round").eval()

        def batches() -> Iterator[Tensor]:
            yield from clouds("round", 40, 7).split(16)

        model.build_memory_bank(batches())
        assert [len(bank.rows) for bank in banks(get_adapter(model, "round"))] == [40, 40]
        assert isinstance(bank_at(model, "round"), RoutingBank)
        assert model.route(mixture())[0] == tuple(name if name == "round" else None for name in EXPECTED)


def test_adapters_without_a_bank_are_left_out_unless_they_are_named(model: PointPeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2))
    assert model.route(mixture())[0] == EXPECTED
    with pytest.raises(
        AdapterError, match=r"adapter 'other' has no memory bank.*RoutingBankConfig\(\).*build_memory_bank"
    ):
        model.route(mixture(), ["round", "other"])


def test_a_bank_is_reduced_and_keeps_its_type(model: PointPeftModel) -> None:
    torch.manual_seed(0)
    small = get_peft_model(BACKBONES["point_mae"].build(), with_bank(LoraConfig(r=2), size=12))
    with pytest.warns(UserWarning, match="40 rows of the memory bank were reduced to 12 without labels"):
        small.build_memory_bank(clouds("round", 40, 7).split(16))
    assert bank_at(small, "default").rows.shape[0] == 12
    rows = bank_at(model, "round").rows.clone()
    model.to(torch.bfloat16).float()
    assert torch.equal(bank_at(model, "round").rows, rows)


# ---- errors ----------------------------------------------------------------------------------------------------------


def narrow(model: PointPeftModel) -> None:
    bank = bank_at(model, "flat")
    bank.rows = nn.functional.normalize(torch.rand(9, bank.rows.shape[1] // 2), dim=1).half()


def few(model: PointPeftModel) -> None:
    bank_at(model, "flat").rows = bank_at(model, "flat").rows[:7]


def empty(model: PointPeftModel) -> None:
    model.add_adapter("new", with_bank(LoraConfig(r=2)))


def of_a_block(model: PointPeftModel) -> None:
    model.add_adapter("new", PointPEFTConfig(memory_bank=True))
    model.build_memory_bank([clouds("flat", 16, 7)], adapter_name="new")


def other_columns(model: PointPeftModel) -> None:
    columns = InputAdapterConfig(channels=["x", "y", "z", "e"], backbone_channels=["x", "y", "z"])
    model.add_adapter("new", with_bank(columns))
    model.build_memory_bank([nn.functional.pad(clouds("flat", 16, 7), (0, 1))], adapter_name="new")


def of_another_base(model: PointPeftModel) -> None:
    model.add_adapter("new", PointPEFTConfig.published())
    model.build_memory_bank([clouds("flat", 16, 7)], adapter_name="new")
    with torch.no_grad():
        model.base_model.get_parameter("cls_token").add_(1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (of_another_base, "banks of 'round' and 'new': they are made of prefix tokens of this base and another base;"),
        (narrow, r"banks of 'round' and 'flat': they are made of features of width \d+ and \d+; name adapters that"),
        (few, "the memory bank of 'flat' has 7 rows, routing needs 8 or more"),
        (empty, r"the memory bank of adapter 'new' is empty: call build_memory_bank\(batches\)"),
        (
            of_a_block,
            r"banks of 'round' and 'new': they are made of tokens of source 'backbone' and 'blocks\.blocks\.\d'",
        ),
        (other_columns, "banks of 'round' and 'new': they are made of clouds of columns"),
    ],
)
def test_banks_that_one_query_cannot_serve_are_refused(
    change: Callable[[PointPeftModel], None], match: str, model: PointPeftModel
) -> None:
    change(model)
    for call in (lambda: model.route(mixture()), lambda: model(mixture(), adapter_names="auto")):
        with pytest.raises(AdapterError, match=match):
            call()
    if change is not of_another_base:
        assert model.route(mixture(), ["round"])[0] == tuple(name if name == "round" else None for name in EXPECTED)


def test_one_set_of_columns_is_routed() -> None:
    columns = InputAdapterConfig(channels=["x", "y", "z", "e"], backbone_channels=["x", "y", "z"])
    model = get_peft_model(BACKBONES["point_mae"].build(), with_bank(columns), "round").eval()
    wide = nn.functional.pad(mixture(), (0, 1))
    model.build_memory_bank(nn.functional.pad(clouds("round", 40, 7), (0, 1)).split(16))
    expected = [name if name == "round" else None for name in EXPECTED]
    assert list(model.route(wide)[0]) == expected
    some = wide[0::3]
    with torch.no_grad():
        assert torch.equal(model(some, adapter_names="auto"), model(some, adapter_names=["round"] * 4))


def test_bad_calls_are_told_in_a_sentence(model: PointPeftModel) -> None:
    points = mixture()
    with pytest.raises(AdapterError, match=r"name adapters in a list.*got 'round' .*adapter_names='auto'"):
        model(points, adapter_names="round")
    with pytest.raises(AdapterError, match="there is no adapter 'none'; adapters: 'round', 'flat'"):
        model.route(points, ["none"])
    with pytest.raises(AdapterError, match=r"there is no adapter, so nothing can be routed.*RoutingBankConfig"):
        model.route(points, [])
    points[4] = float("nan")
    with pytest.raises(AdapterError, match="sample 4 of 12 cannot be routed: its features are not finite"):
        model.route(points)
    with pytest.raises(AdapterError, match="adapter_names is for inference"):
        model.train()(mixture(), adapter_names="auto")
    model.eval()
    for name in KNOWN:
        model.delete_adapter(name)
    with pytest.raises(AdapterError, match="there is no adapter, so nothing can be routed"):
        model.route(mixture())
    model.add_adapter("plain", LoraConfig(r=2))
    with pytest.raises(AdapterError, match="adapter 'plain' has no memory bank, so nothing can be routed to it"):
        model(mixture(), adapter_names="auto")


def test_configurations_and_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(PointPeftError, match="RoutingBankConfig.size is 7; allowed: 8 or more"):
        RoutingBankConfig(size=7)
    with pytest.raises(PointPeftError, match=r"target_modules is \('qkv',\); allowed: None, because a routing bank"):
        RoutingBankConfig(target_modules=["qkv"])
    model = get_peft_model(BACKBONES["point_mae"].build(), RoutingBankConfig())
    with pytest.raises(AdapterError, match="the routing bank has 7 rows, and leaving one out needs at least 8"):
        model.build_memory_bank([clouds("round", 7, 7)])
    with pytest.raises(AdapterError, match=r"a routing bank is \(rows, \d+\) here, got \(9, 5\)"):
        bank_at(model, "default").fill(torch.rand(9, 5))
    assert len(bank_at(model, "default").rows) == 0
    packed = next(backbone for backbone in BACKBONES.values() if backbone.kind == "packed")
    with pytest.raises(AnatomyError, match="ROUTING_BANK compares whole clouds by the patch tokens.*they are packed"):
        get_peft_model(packed.build(), PeftConfig(tuners=[RoutingBankConfig()], anatomy=packed.traced))
