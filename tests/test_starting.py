"""Starts from data and from weights: EVA's directions and ranks, PiSSA's factors, and what refuses them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AnatomyError,
    BitFitConfig,
    BottleneckConfig,
    LoraConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftError,
    PointPeftModel,
    get_peft_model,
    initialise,
    inject_adapter,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.starting import Variance, distributed
from tests.peft_package import peft
from tests.zoo import BACKBONES, clouds

LAYERS = ["blocks.blocks.0.attn.qkv", "blocks.blocks.1.attn.qkv", "blocks.blocks.2.attn.qkv"]


def backbone():
    return BACKBONES["point_mae"].build()


def batches(count=3, size=4, seed=0):
    return [clouds(size, seed + number)[0] for number in range(count)]


def start_of(model, name="default"):
    tuner: Any = get_adapter(model, name).config.tuners[0]
    return tuner.init_lora_weights


def parts_of(model: Any, name: str = "default") -> dict[str, Any]:
    """The parts of an adapter but for its heads, by site."""
    return {path: part for path, part in get_adapter(model, name).all_parts() if part.own_module is None}


def factors(model, path, name="default"):
    part = parts_of(model, name)[path]
    return part.lora_A.weight.detach(), part.lora_B.weight.detach()


def inputs_of(model, path, given):
    """What a layer of a plain backbone gets, as rows (n, c)."""
    rows: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for points in given:
            model.eval()(points)
    handle.remove()
    return torch.cat(rows).double().numpy()


def randomised(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


class Plain(nn.Module):
    """Layers in a row, which PEFT's EVA takes too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 8)
        self.third = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return found


# ---- EVA -------------------------------------------------------------------------------------------------------------


def test_directions_are_the_principal_ones_of_what_each_layer_gets():
    model, given = get_peft_model(backbone(), LoraConfig(r=4)), batches()
    initialise(model, given, "eva", rho=1)
    for path in LAYERS:
        rows = inputs_of(backbone(), path, given)
        _, _, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        down, _ = factors(model, path)
        along = np.abs(np.sum(right[:4] * down.double().numpy(), axis=1))
        assert down.shape == (4, 24)
        assert np.allclose(along, 1, atol=1e-4)


def test_a_start_changes_neither_the_output_nor_the_base():
    model, (points,) = get_peft_model(backbone(), LoraConfig(r=4)), clouds(2, 9)
    base = copy.deepcopy(model.base_model.state_dict())
    before, ((_, own),) = model.eval()(points), get_adapter(model, "default").own_modules()
    head = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    model.train()
    initialise(model, batches(), "eva")
    assert model.training and get_adapter(model, "default").training
    assert torch.equal(model.eval()(points), before)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.base_model.state_dict().items())
    ((_, own),) = get_adapter(model, "default").own_modules()
    assert all(torch.equal(tensor, head[name]) for name, tensor in own.state_dict().items())
    assert model.active_adapters == ("default",)
    assert all(parameter.requires_grad for parameter in model.adapters.parameters())


def test_ranks_are_redistributed_their_sum_and_the_scales_stay():
    base = backbone()
    with torch.no_grad():  # so that all that the first layer gets lies nearly along two directions
        base.blocks.blocks[0].norm1.weight[2:] = 0.01
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "fc1"]))
    initialise(model, batches(), "eva")
    parts = parts_of(model)
    ranks = [part.r for part in parts.values()]
    assert sum(ranks) == 4 * 6 and len(set(ranks)) > 1 and max(ranks) <= 8
    assert {part.scale for part in parts.values()} == {2.0}


def test_shares_decide_and_a_layer_may_get_none():
    shares = {"a": torch.tensor([0.6, 0.3, 0.1]), "b": torch.tensor([0.05, 0.04]), "c": torch.tensor([0.5, 0.2, 0.2])}
    assert distributed({"a": 2, "b": 1, "c": 1}, shares, rho=2.0) == {"a": 2, "b": 0, "c": 2}
    assert distributed({"a": 2, "b": 1, "c": 1}, shares, rho=1.0) == {"a": 2, "b": 1, "c": 1}


def test_a_layer_without_ranks_is_left_out_and_the_file_says_so(tmp_path):
    torch.manual_seed(0)
    base = Plain().eval()
    with torch.no_grad():  # what the second layer gets then varies in two directions, the input in all
        base.first.weight[2:] = 0
    config = LoraConfig(r=1, target_modules=["first", "second", "third"], exclude_modules=["third"], modules_to_save=[])
    model = get_peft_model(copy.deepcopy(base), config)
    points = torch.randn(500, 12)
    initialise(model, points.split(100), "eva", rho=2)
    assert {path: part.r for path, part in parts_of(model).items()} == {"second": 2}
    expected = randomised(model)(points)
    model.save_pretrained(tmp_path)
    assert torch.equal(PointPeftModel.from_pretrained(base, tmp_path)(points), expected)


def test_neither_order_nor_size_of_the_batches_matters():
    given = torch.cat(batches())
    models = [get_peft_model(backbone(), LoraConfig(r=4)) for _ in range(2)]
    initialise(models[0], given.split(4), "eva")
    initialise(models[1], reversed(given.split(3)), "eva")
    for path in LAYERS:
        assert torch.allclose(factors(models[0], path)[0], factors(models[1], path)[0], atol=1e-4)


def test_every_form_of_batches_that_a_bank_takes():
    given = batches()
    forms: list[tuple[Any, Any]] = [
        ([(points, torch.zeros(4, dtype=torch.int64)) for points in given], None),
        ([{"cloud": points} for points in given], lambda batch: (batch["cloud"],)),
    ]
    expected = get_peft_model(backbone(), LoraConfig(r=4))
    initialise(expected, given)
    for form, to_inputs in forms:
        model = get_peft_model(backbone(), LoraConfig(r=4))
        initialise(model, form, "eva", to_inputs=to_inputs)
        assert torch.equal(factors(model, LAYERS[0])[0], factors(expected, LAYERS[0])[0])


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "adaptformer"])
def test_bottlenecks_start_from_data(placement):
    model, given = get_peft_model(backbone(), BottleneckConfig(placement=placement, width=4)), batches()
    names = [name for name, _ in model.adapters.named_parameters() if name.endswith("down.weight")]
    before, parameters = dict(model.adapters.named_parameters()), list(model.adapters.parameters())
    old = {name: before[name].detach().clone() for name in names}
    initialise(model, given)
    assert names and all(one is other for one, other in zip(parameters, model.adapters.parameters(), strict=True))
    for name in names:
        weight = before[name].detach()
        assert not torch.allclose(weight, old[name])
        assert torch.allclose(weight @ weight.T, torch.eye(4), atol=1e-4)


def test_point_peft_beside_lora_in_one_adapter_keeps_everything_else():
    config = PeftConfig(tuners=(PointPEFTConfig(init="identity"), LoraConfig(r=2), BitFitConfig()))
    model = get_peft_model(backbone(), config)
    torch.manual_seed(3)
    prompts = [name for name, _ in model.adapters.named_parameters() if "prompt" in name]
    assert prompts
    before = {name: tensor.detach().clone() for name, tensor in model.adapters.named_parameters()}
    initialise(model, batches())
    after = dict(model.adapters.named_parameters())
    changed = {name for name in before if name not in after or not before[name].equal(after[name])}
    assert all("lora_" in name or name.endswith("down.weight") for name in changed)
    assert any("lora_" in name for name in changed) and any(name.endswith("down.weight") for name in changed)


def test_a_model_that_keeps_its_class_and_a_named_adapter():
    model = inject_adapter(backbone(), LoraConfig(r=2), "one")
    model = inject_adapter(model, LoraConfig(r=3), "two")
    before = factors(model.point_peft, LAYERS[0], "one")[0].clone()
    initialise(model, batches(), adapter_name="two", rho=1)
    assert torch.equal(factors(model.point_peft, LAYERS[0], "one")[0], before)
    weight = factors(model.point_peft, LAYERS[0], "two")[0]
    assert torch.allclose(weight @ weight.T, torch.eye(3), atol=1e-4)
    assert model.point_peft.active_adapters == ("one",)


def test_chosen_slices_of_a_fused_projection_get_the_same_directions():
    model = get_peft_model(backbone(), LoraConfig(r=3, qkv=("q", "v")))
    initialise(model, batches())
    down, _ = factors(model, LAYERS[1])
    query, value = down.chunk(2)
    assert torch.equal(query, value) and torch.allclose(query @ query.T, torch.eye(len(query)), atol=1e-4)


def test_joined_variances_are_those_of_all_rows():
    torch.manual_seed(0)
    rows = torch.randn(50, 6) * 3 + 100
    whole, joined = Variance.of(rows), Variance.of(rows[:7]).joined(Variance.of(rows[7:]))
    assert joined.count == 50
    assert torch.allclose(joined.mean, whole.mean) and torch.allclose(joined.scatter, whole.scatter)


def test_ranks_and_subspaces_are_pefts():
    torch.manual_seed(0)
    mixing = torch.randn(12, 12) * torch.linspace(3, 0.1, 12)
    given = [torch.randn(64, 12) @ mixing for _ in range(3)]
    base, names = Plain().eval(), ["first", "second", "third"]
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=3, target_modules=names, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.95)
        ),
        low_cpu_mem_usage=True,
    )
    peft.initialize_lora_eva_weights(
        theirs,
        [{"x": points} for points in given * 3],
        forward_fn=lambda model, batch: model(batch["x"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=names, modules_to_save=[]))
    initialise(ours, given, "eva", rho=2.0)
    for name in names:
        layer = getattr(theirs.base_model.model, name)
        part = parts_of(ours)[name]
        assert part.r == layer.r["default"] and part.scale == pytest.approx(layer.scaling["default"])
        # They decompose what comes batch by batch, so the subspaces are near each other, not the same.
        overlap = torch.linalg.svdvals(part.lora_A.weight @ layer.lora_A["default"].weight.T)
        assert overlap.min() > 0.95, name


# ---- PiSSA -----------------------------------------------------------------------------------------------------------


def test_pissa_is_pefts():
    base, (points,) = BACKBONES["point_mae"].build(), clouds(2, 3)
    target = ["blocks.blocks.0.attn.qkv", "blocks.blocks.1.mlp.fc1"]
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": target, "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)).eval()
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**fields, modules_to_save=[])).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for path in target:
            layer, part = theirs.base_model.model.get_submodule(path), parts_of(ours)[path]
            own, other = (
                part.lora_B.weight @ part.lora_A.weight,
                layer.lora_B["default"].weight @ layer.lora_A["default"].weight,
            )
            assert torch.allclose(own, other, atol=1e-5)
            down, up = torch.randn_like(part.lora_A.weight), torch.randn_like(part.lora_B.weight)
            for pair in (part, nn.ModuleDict({"a": layer.lora_A["default"], "b": layer.lora_B["default"]})):
                tensors = list(pair.parameters())
                tensors[0].copy_(down)
                tensors[1].copy_(up)
    assert torch.allclose(ours(points), theirs(points), atol=1e-4)
    assert not torch.allclose(ours(points), base.eval()(points), atol=1e-2)


def test_a_fresh_pissa_is_the_backbone_and_its_file_restores_it_exactly(tmp_path):
    base, (points,) = backbone(), clouds(2, 3)
    before = base.eval()(points)
    values = copy.deepcopy(base.state_dict())
    model = get_peft_model(
        base, LoraConfig(r=4, init_lora_weights="pissa", lora_dropout=0.1, modules_to_save=[])
    ).eval()
    assert torch.equal(model(points), before)
    for path in LAYERS:
        down, up = factors(model, path)
        left, lengths, right = torch.linalg.svd(values[f"{path}.weight"])
        assert torch.allclose(2 * up @ down, (left[:, :4] * lengths[:4]) @ right[:4], atol=1e-5)
    expected = randomised(model).eval()(points)
    model.save_pretrained(tmp_path)
    plain = model.unload()
    assert all(torch.equal(tensor, values[name]) for name, tensor in plain.state_dict().items())
    torch.manual_seed(99)
    again = PointPeftModel.from_pretrained(backbone(), tmp_path).eval()
    assert torch.equal(again(points), expected) and not torch.allclose(expected, before, atol=1e-3)
    again.merge()
    assert torch.allclose(again(points), expected, atol=1e-4)


def test_pissa_through_initialise_and_beside_another_adapter():
    model, (points,) = get_peft_model(backbone(), LoraConfig(r=2), "plain").eval(), clouds(2, 3)
    model.add_adapter("pissa", LoraConfig(r=2))
    randomised(model)
    with torch.no_grad():
        for path in LAYERS:
            factors(model, path, "pissa")[1].zero_()
    plain, before = model(points), model.forward_tasks(points, ["pissa"])["pissa"]
    initialise(model, iter(()), "pissa", adapter_name="pissa")
    assert start_of(model, "pissa") == "pissa"
    assert torch.equal(model(points), plain)
    assert torch.equal(model.forward_tasks(points, ["pissa"])["pissa"], before)
    randomised(model, seed=2)
    mixed = model(points, adapter_names=["plain", "pissa"])
    assert torch.allclose(mixed[1], model.forward_tasks(points, ["pissa"])["pissa"][1], atol=1e-5)


def test_pissa_beside_another_method_in_one_adapter():
    config = PeftConfig(tuners=(BitFitConfig(), LoraConfig(r=2)))
    model, (points,) = get_peft_model(backbone(), config).eval(), clouds(2, 3)
    before = model(points)
    initialise(model, how="pissa")
    assert torch.equal(model(points), before)
    assert [tuner.method for tuner in get_adapter(model, "default").config.tuners] == ["BITFIT", "LORA"]


def test_pissa_in_a_combination_counts_with_what_it_took_away():
    fields: dict[str, Any] = {"r": 2, "init_lora_weights": "pissa", "modules_to_save": []}
    model, (points,) = get_peft_model(backbone(), LoraConfig(**fields), "a").eval(), clouds(2, 3)
    model.add_adapter("b", LoraConfig(r=3, modules_to_save=[]))
    randomised(model)
    model.add_weighted_adapter(["a"], [1.0], "same", "cat")
    outputs = model.forward_tasks(points, ["a", "same"])
    assert torch.allclose(outputs["a"], outputs["same"], atol=1e-5)
    model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "mixed", "cat")
    assert start_of(model, "mixed") == "zero"


# ---- what is refused -------------------------------------------------------------------------------------------------


def unchanged(model, act, error, match):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        act()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_cannot_start_is_refused_and_nothing_changes():
    model = get_peft_model(backbone(), LoraConfig(r=4))
    broken = batches(1)[0]
    broken[0, 0, 0] = float("nan")
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: initialise(model, batches(), "svd"), PointPeftError, r"how is 'svd'; allowed: 'eva', 'pissa'"),  # type: ignore[arg-type]
        (lambda: initialise(model, batches(), rho=0.5), PointPeftError, r"rho is 0.5; allowed: a number of 1 or more"),
        (lambda: initialise(model), PointPeftError, r'"eva" needs batches, as build_memory_bank takes them'),
        (lambda: initialise(model, []), AdapterError, r"initialise got no batches"),
        (
            lambda: initialise(model, [broken]),
            AdapterError,
            r"'blocks.blocks.0.attn.qkv' got values that are not finite",
        ),
        (lambda: initialise(model, [["no tensor"]]), AdapterError, r"a batch must be a tensor or a tuple"),
        (lambda: initialise(model, batches(), adapter_name="b"), AdapterError, r"there is no adapter 'b'"),
    ]
    for act, error, match in cases:
        unchanged(model, act, error, match)
    randomised(model)
    unchanged(model, lambda: initialise(model, batches()), AdapterError, r"'default' has an effect already, at 'blocks")
    unchanged(model, lambda: initialise(model, how="pissa"), AdapterError, r"'default' has an effect already, at 'blo")


def test_what_has_no_narrow_layers_is_refused():
    model = get_peft_model(backbone(), BitFitConfig())
    unchanged(
        model, lambda: initialise(model, batches()), AdapterError, r"'default' \(BITFIT\) has no layers that lead"
    )
    model = get_peft_model(backbone(), BottleneckConfig(width=4))
    unchanged(
        model, lambda: initialise(model, how="pissa"), AdapterError, r"BOTTLENECK\) does not begin from the factors"
    )
    with pytest.raises(AdapterError, match=r"a PointTransformer has no adapter to initialise: adapt it first"):
        initialise(backbone(), batches())


def test_a_layer_that_is_read_and_not_called_is_named():
    entry = BACKBONES["pointgpt"]
    model = get_peft_model(entry.build(), LoraConfig(r=2))
    with pytest.raises(AdapterError, match=r"was not called in any batch, so what it gets is not known"):
        initialise(model, [entry.inputs(2, 0)], to_inputs=lambda batch: batch)


def test_more_channels_than_directions_and_inputs_without_variance():
    model = get_peft_model(backbone(), BottleneckConfig(width=30, placement="adaptformer"))
    unchanged(
        model, lambda: initialise(model, batches()), AdapterError, r"leads into 30 channels, .* 24 directions at most"
    )
    base = backbone()
    with torch.no_grad():
        base.blocks.blocks[1].norm1.weight.zero_()
    model = get_peft_model(base, LoraConfig(r=2))
    unchanged(
        model, lambda: initialise(model, batches()), AdapterError, r"'blocks.blocks.1.attn.qkv' gets the same for"
    )


def test_pissa_needs_as_many_factors_as_ranks_and_no_dora():
    with pytest.raises(
        AnatomyError, match=r"'blocks.blocks.0.attn.qkv' \(72, 24\) has 24 principal factors, fewer than r=25"
    ):
        get_peft_model(backbone(), LoraConfig(r=25, init_lora_weights="pissa"))
    with pytest.raises(PointPeftError, match=r"init_lora_weights is 'pissa'; allowed: 'zero' with use_dora"):
        LoraConfig(init_lora_weights="pissa", use_dora=True)


def test_pissa_is_not_written_in_pefts_format(tmp_path):
    model = get_peft_model(backbone(), LoraConfig(r=2, init_lora_weights="pissa", modules_to_save=[])).eval()
    model(clouds(2, 0)[0])
    with pytest.raises(PointPeftError, match=r"LoraConfig.init_lora_weights: PEFT's PiSSA takes another base"):
        model.save_pretrained(tmp_path, format="peft")
