"""LoRA: its equation, which layers and rows it takes, DoRA, patterns, merging, weighted combinations."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AnatomyError,
    BitFitConfig,
    LoraConfig,
    MatchError,
    PeftConfig,
    PointPeftError,
    PointPeftModel,
    get_peft_model,
)
from point_peft.tuners.lora.peft_format import pattern_values
from tests.adapting import full_point_mae
from tests.hanging import must_end
from tests.zoo import BACKBONES, clouds


def adapted(**fields):
    model = get_peft_model(BACKBONES["point_mae"].build(), LoraConfig(modules_to_save=[], **fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(0.0, 0.2)
    return model


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_equation(rslora, scale):
    model = adapted(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["blocks.blocks.1.mlp.fc1"])
    layer = model.base_model.blocks.blocks[1].mlp.fc1
    part = model.adapters["default"].parts["blocks/blocks/1/mlp/fc1"][0]
    x = torch.randn(2, 5, 24)
    expected = x @ (layer.weight + scale * part.lora_B.weight @ part.lora_A.weight).T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_default_targets_and_layers():
    model = adapted(layers_to_transform=[0, 2])
    assert [row.name for row in model.get_layer_status()] == ["blocks.blocks.0.attn.qkv", "blocks.blocks.2.attn.qkv"]
    excluded = adapted(target_modules=["qkv", "fc1"], exclude_modules=r".*\.0\..*")
    assert all(".0." not in row.name for row in excluded.get_layer_status())


def test_merge_is_exact_and_unmerge_restores():
    model, (points,) = adapted(target_modules=["qkv", "proj", "fc1", "fc2"]), clouds(2, 0)
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    expected = model(points)
    model.merge()
    assert torch.allclose(model(points), expected, atol=1e-5)
    assert model.merged_adapters == ("default",) and model.active_adapters == ()
    with pytest.raises(AdapterError, match=r"adapters cannot be saved while 'default' is merged .* call unmerge"):
        model.save_pretrained("nowhere")
    model.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.state_dict().items())
    assert torch.equal(model(points), expected)
    plain = model.merge_and_unload()
    assert torch.allclose(plain(points), expected, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_what_is_not_a_linear_layer_is_refused():
    model = BACKBONES["point_mae"].build()
    with pytest.raises(AnatomyError, match=r"'norm' is a LayerNorm; LORA adapts linear layers"):
        get_peft_model(model, LoraConfig(target_modules=["norm"]))
    with pytest.raises(MatchError, match=r"no module matches 'blocks.\*.qvk' .*nearest: 'blocks.blocks.0.attn.qkv'"):
        get_peft_model(model, LoraConfig(target_modules=["blocks.*.qvk"]))
    with pytest.raises(AnatomyError, match=r"exclude_modules and layers_to_transform leave no module"):
        get_peft_model(model, LoraConfig(exclude_modules=["qkv"]))


def test_a_layer_whose_weight_is_read_by_another_module_is_reported():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.linear.weight)

    model = get_peft_model(Reader(), LoraConfig(target_modules=["linear"]))
    with pytest.raises(AdapterError, match=r"the LoraPart at 'linear' had no effect, because that module"):
        model(torch.rand(2, 3))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("r", 0, "1 or more"), ("lora_alpha", -1, "more than 0"), ("lora_dropout", 1.0, "0 or more and less than 1")],
)
def test_fields_are_validated(field, value, allowed):
    with pytest.raises(PointPeftError, match=rf"LoraConfig.{field} is {value}; allowed: {allowed}"):
        LoraConfig(**{field: value})


def test_a_module_under_two_names_is_adapted_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(self.first(x))
            return out

    model = get_peft_model(Twice(), LoraConfig(target_modules=["first", "second"]))
    assert [row.parts["default"] for row in model.get_layer_status()] == [("LoraPart",)]
    assert torch.isfinite(model(torch.rand(2, 3))).all()


# ---- parameters ------------------------------------------------------------------------------------------------------

ALL_LINEAR = r"blocks\..*\.(qkv|proj|fc1|fc2)"


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 147_456),
        ({"target_modules": ["qkv", "proj"]}, 221_184),
        ({"target_modules": ALL_LINEAR}, 589_824),
        ({"qkv": ["q", "v"]}, 147_456),
        ({"qkv": ["v"]}, 73_728),
        ({"use_dora": True, "target_modules": ALL_LINEAR}, 589_824 + 41_472),
        ({"use_dora": True, "qkv": ["q", "v"]}, 147_456 + 12 * 2 * 384),
    ],
)
def test_parameter_counts_on_point_mae(fields: dict[str, Any], count: int) -> None:
    model = get_peft_model(full_point_mae(), LoraConfig(modules_to_save=[], **fields))
    assert model.get_nb_trainable_parameters()[0] == count


# ---- layers ----------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Layers of the kinds that LoRA takes, as many convolutions as there are ways to set one up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.bare = nn.Linear(8, 8, bias=False)
        self.convs = nn.Sequential(
            nn.Conv1d(8, 6, 1),
            nn.Conv1d(6, 5, 3, stride=2, padding=1, bias=False),
            nn.Conv1d(5, 7, 3, padding="same", dilation=2, padding_mode="reflect"),
            nn.Conv1d(7, 4, 2, padding=3, padding_mode="circular"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) to (b, 4, l')"""
        found: Tensor = self.convs(self.bare(self.linear(x)).transpose(-1, -2))
        return found


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"convs.1": 2, "linear": 3}, "alpha_pattern": {r"convs\.\d": 3}},
    "dora patterns": {"use_dora": True, "rank_pattern": {"bare": 9}, "alpha_pattern": {"bare": 20}},
}


def layers(dtype: torch.dtype = torch.float32, seed: int = 1, **fields: Any) -> PointPeftModel:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["linear", "bare", "0", "1", "2", "3"], modules_to_save=[], **fields)
    model = get_peft_model(Layers().to(dtype).eval(), config)
    moved(model.adapters["default"], seed)
    return model


def moved(adapter: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merging_gives_the_same_output_and_unmerging_the_same_base(kind: str, dtype: torch.dtype) -> None:
    model, x = layers(dtype, **KINDS[kind]), batch(dtype)
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    expected = model(x)
    with model.disable_adapter():
        assert not torch.allclose(model(x), expected, atol=0.05)
    model.merge()
    # In half precision a merged weight is rounded to it: as much as the base's own weights are.
    share = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 0.05)
    assert float((model(x) - expected).detach().abs().max()) <= share * float(expected.detach().abs().max())
    model.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.state_dict().items())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = Layers().to(dtype)
    expected = base(batch(dtype))
    config = LoraConfig(target_modules=["linear", "bare", "0", "1", "2", "3"], modules_to_save=[], **KINDS[kind])
    assert torch.equal(get_peft_model(base, config)(batch(dtype)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_without_a_batch_gives_the_same(kind: str) -> None:
    model, x = layers(**KINDS[kind]), batch()
    torch.testing.assert_close(model(x[1]), model(x)[1], atol=1e-5, rtol=1e-5)


def test_ranks_and_scales_of_patterns() -> None:
    model = layers(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"convs.1": 2, r".*1|linear": 3, "0": 5},
                   alpha_pattern={"^linear": 7.5})  # fmt: skip
    found = {path: (part.r, part.scale) for path, part in model.adapters["default"].all_parts()}  # type: ignore[operator]
    assert found == {
        "linear": (3, 7.5 / math.sqrt(3)),
        "bare": (4, 3.0),
        "convs.0": (5, 6 / math.sqrt(5)),
        "convs.1": (2, 6 / math.sqrt(2)),  # the first key that matches counts
        "convs.2": (4, 3.0),
        "convs.3": (4, 3.0),
    }


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_key_that_matches_nothing_is_an_error(field: str) -> None:
    unknown: dict[str, Any] = {field: {"liner": 3}}
    with pytest.raises(MatchError, match=rf"no adapted module matches 'liner' \({field}\); nearest: 'linear'"):
        layers(**unknown)
    broken: dict[str, Any] = {field: {"(": 3}}
    with pytest.raises(MatchError, match=f"{field}: .* is not a regular expression"):
        layers(**broken)


def test_many_keys_are_matched_and_an_expression_cannot_hang() -> None:
    paths = [f"blocks.blocks.{block}.{layer}" for block in range(100) for layer in ("qkv", "proj", "fc1", "fc2")]
    keys = {f"{'(' * 12}[a-z.0-9]*{')*' * 12}{number}!": 1 for number in range(300)}
    with must_end():
        assert pattern_values(dict.fromkeys(paths, 1), paths, "rank_pattern") == dict.fromkeys(paths, 1)
        with pytest.raises(MatchError, match="rank_pattern: .* takes too long to match"):
            pattern_values(keys, paths, "rank_pattern", required=False)


def test_patterns_are_part_of_a_frozen_configuration() -> None:
    ranks = {"b": 2, "a": 1}
    config = LoraConfig(rank_pattern=ranks, alpha_pattern={"a": 0.5})
    ranks["b"] = 5
    assert config.rank_pattern == {"b": 2, "a": 1} and list(config.rank_pattern) == ["b", "a"]
    with pytest.raises(TypeError):
        config.rank_pattern["b"] = 5  # type: ignore[index]
    same = LoraConfig(rank_pattern={"b": 2, "a": 1}, alpha_pattern={"a": 0.5})
    assert config == same and hash(config) == hash(same) and config != LoraConfig(rank_pattern={"b": 2})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    whole = PeftConfig(tuners=[config])
    again = PeftConfig.from_json(whole.to_json())
    assert again == whole and list(again.tuners[0].rank_pattern) == ["b", "a"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ({"a": 0}, "LoraConfig.rank_pattern is {'a': 0}; allowed: ranks of 1 or more"),
        ({"a": 1.5}, r"LoraConfig.rank_pattern is {'a': 1.5}; allowed: a mapping of a string to an integer"),
        ({3: 4}, "LoraConfig.rank_pattern is {3: 4}; allowed: a mapping of a string to an integer"),
        (["a"], r"LoraConfig.rank_pattern is \('a',\); allowed: a mapping"),
        ([["a", 1], ["a", 2]], "LoraConfig.rank_pattern is .*; allowed: a mapping"),
    ],
)
def test_a_pattern_must_be_a_mapping(pattern: Any, match: str) -> None:
    with pytest.raises(PointPeftError, match=match):
        LoraConfig.from_json({"method": "LORA", "rank_pattern": pattern})


def test_a_grouped_convolution_is_refused() -> None:
    with pytest.raises(AnatomyError, match=r"'0' is a Conv1d; LORA adapts linear layers and nn.Conv1d of one group"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(target_modules=["0"]))


# ---- DoRA ------------------------------------------------------------------------------------------------------------


def dora(seed: int = 1, **fields: Any) -> PointPeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0"], modules_to_save=[], **fields)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), config)
    moved(model.adapters["default"], seed)
    return model


def test_doras_equation_and_its_gradient() -> None:
    """y = m V x / |V| + b with V = W + s B A, whose length takes no part in the gradient."""
    model, x = dora(), torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    layer, (_, part) = model.base_model[0], next(model.adapters["default"].all_parts())  # type: ignore[index,operator]
    model(x).square().sum().backward()
    down, up, m = (t.detach().clone().requires_grad_() for t in (
        part.lora_A.weight, part.lora_B.weight, part.lora_magnitude_vector))  # fmt: skip
    v = layer.weight + 1.5 * up @ down
    y = x @ (m[:, None] * v / v.norm(dim=1, keepdim=True).detach()).T + layer.bias
    torch.testing.assert_close(model(x), y)
    y.square().sum().backward()
    for own, expected in ((part.lora_A.weight, down), (part.lora_B.weight, up), (part.lora_magnitude_vector, m)):
        torch.testing.assert_close(own.grad, expected.grad)


def test_doras_magnitude_begins_as_the_length_of_the_rows() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 3, 1))
    with torch.no_grad():
        base.get_parameter("0.weight")[2] = 0.0  # a row of zeros has no direction
    lengths = base.get_parameter("0.weight").norm(dim=1)
    model = get_peft_model(base, LoraConfig(use_dora=True, target_modules=["0", "2"], modules_to_save=[]))
    (_, linear), (_, conv) = model.adapters["default"].all_parts()  # type: ignore[operator]
    assert torch.equal(linear.lora_magnitude_vector, lengths)
    assert conv.lora_magnitude_vector.shape == (1, 3, 1)
    assert torch.equal(model(torch.ones(2, 5)), base(torch.ones(2, 5)))
    moved(model.adapters["default"], 1)
    model(torch.ones(2, 5)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.adapters.parameters() if p.grad is not None)


def test_dora_beside_a_trained_bias_merges_to_what_ran() -> None:
    torch.manual_seed(0)
    tuners = (LoraConfig(use_dora=True, target_modules=["fc1"]), BitFitConfig())
    model = get_peft_model(BACKBONES["point_mae"].build(), PeftConfig(tuners=tuners, modules_to_save=[]))
    moved(model.adapters["default"], 1)
    (points,) = clouds(2, 0)
    expected = model(points)
    model.merge()
    torch.testing.assert_close(model(points), expected, atol=1e-4, rtol=1e-4)


def test_dropout_acts_on_all_that_dora_adds() -> None:
    model, x = dora(lora_dropout=0.5), torch.ones(1, 5)
    model.train()
    part = next(model.adapters["default"].all_parts())[1]  # type: ignore[operator]
    torch.manual_seed(4)
    seen = model(x)
    torch.manual_seed(4)
    dropped = part.dropout(x)
    layer = model.base_model[0]  # type: ignore[index]
    difference = part.weights(layer)["weight"] - layer.weight
    torch.testing.assert_close(seen, layer.weight.sum(1)[None] + layer.bias + dropped @ difference.T)


# ---- some of query, key and value ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("chosen", [["q"], ["q", "v"], ["v", "k"]])
def test_only_the_chosen_rows_change(chosen: list[str], use_dora: bool) -> None:
    fields: dict[str, Any] = {"r": 3, "lora_alpha": 6, "qkv": chosen, "use_dora": use_dora}
    model = adapted(**fields)
    layer = model.base_model.blocks.blocks[1].attn.qkv
    part = model.adapters["default"].parts["blocks/blocks/1/attn/qkv"][0]
    assert part.lora_A.weight.shape == (3 * len(chosen), 24) and part.lora_B.weight.shape == (24 * len(chosen), 3)
    expected = layer.weight.detach().clone().view(3, 24, 24)
    order = sorted(chosen, key="qkv".index)
    for index, name in enumerate(order):
        up, down = part.lora_B.weight.view(-1, 24, 3)[index], part.lora_A.weight.view(-1, 3, 24)[index]
        expected["qkv".index(name)] += (2.0 * up @ down).detach()
        if use_dora:
            rows = expected["qkv".index(name)]
            rows *= (part.lora_magnitude_vector.view(-1, 24)[index] / rows.norm(dim=1)).detach()[:, None]
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(layer(x), x @ expected.view(72, 24).T, atol=1e-4, rtol=1e-4)
    (points,) = clouds(2, 0)
    before, weight = model(points), layer.weight.detach().clone()
    model.merge()
    torch.testing.assert_close(model(points), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.weight.detach(), expected.view(72, 24), atol=1e-5, rtol=1e-5)
    for name in set("qkv") - set(chosen):
        index = "qkv".index(name)
        assert torch.equal(layer.weight.view(3, 24, 24)[index], weight.view(3, 24, 24)[index])
    model.unmerge()
    assert torch.equal(layer.weight, weight)


def test_all_three_are_one_update_of_the_whole() -> None:
    assert LoraConfig(qkv=["v", "k", "q"]) == LoraConfig()
    part = adapted(qkv=["k", "v", "q"]).adapters["default"].parts["blocks/blocks/1/attn/qkv"][0]
    assert part.lora_A.weight.shape == (8, 24)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_fused_projection_of_an_attention_is_changed_by_its_weight(use_dora: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=True)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.attention(x, x, x)[0]
            return found

    config = LoraConfig(r=2, target_modules=["attention"], qkv=["q", "v"], use_dora=use_dora, modules_to_save=[])
    model = get_peft_model(Holder(), config)
    moved(model.adapters["default"], 1)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    expected, before = model(x), attention.in_proj_weight.detach().clone()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.adapters.parameters())
    model.merge()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    changed = (attention.in_proj_weight != before).any(1)
    assert changed.view(3, 12).all(1).tolist() == [True, False, True] and not changed[12:24].any()


class SplitBlock(nn.Module):
    """A block whose query, key and value are layers of their own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.norm = nn.LayerNorm(6)
        # Of two layers, the second makes key and value.
        made = {name: nn.Linear(6, 12 if len(names) == 2 and name == names[1] else 6) for name in names}
        self.attention = nn.ModuleDict({**made, "out": nn.Linear(6, 6)})
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.cat([self.attention[name](self.norm(x)) for name in self.names], -1).chunk(3, -1)
        x = x + self.attention["out"](nn.functional.scaled_dot_product_attention(q, k, v))
        found: Tensor = x + self.mlp(x)
        return found


def split(*names: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("blocks", nn.Sequential(*[SplitBlock(names) for _ in range(2)]))
    return model


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("query", "key", "value")])
def test_split_projections_are_chosen_by_their_names(names: tuple[str, str, str]) -> None:
    config = LoraConfig(qkv=["q", "v"], modules_to_save=[])
    model = get_peft_model(split(*names), config, example_inputs=torch.randn(2, 5, 6))
    chosen = [f"blocks.{block}.attention.{name}" for block in range(2) for name in (names[0], names[2])]
    assert [row.name for row in model.get_layer_status()] == chosen


def test_the_layers_of_a_convolution_on_graphs_are_chosen_by_their_names() -> None:
    """In torch_geometric's, `lin_dst` makes the query, `lin_src` the key and `lin` the value."""
    pytest.importorskip("torch_geometric")
    backbone = BACKBONES["pyg_point_transformer"]
    config = LoraConfig(qkv=["q", "v"], modules_to_save=[])
    model = get_peft_model(backbone.build(), config, example_inputs=backbone.example)
    moved(model.adapters["default"], 1)
    names = [row.name for row in model.get_layer_status()]
    assert sorted(names) == sorted(f"layers.{block}.conv.{name}" for block in range(2) for name in ("lin_dst", "lin"))
    args = backbone.inputs(2, 1)
    output = model.eval()(*args)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.adapters.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert not torch.allclose(model(*args), output)


def test_a_layer_of_key_and_value_is_chosen_whole_or_not_at_all() -> None:
    x = torch.randn(2, 5, 6)

    def adapted(qkv: list[Any]) -> list[str]:
        config = LoraConfig(qkv=qkv, layers_to_transform=[0], modules_to_save=[])
        model = get_peft_model(split("q", "kv"), config, example_inputs=x)
        return [row.name.rpartition(".")[2] for row in model.get_layer_status()]

    assert adapted(["q"]) == ["q"] and adapted(["k", "v"]) == ["kv"]
    with pytest.raises(AnatomyError, match=r"qkv=\('q', 'v'\): 'blocks.0.attention.kv' makes k and v together"):
        adapted(["q", "v"])


def test_where_query_key_and_value_cannot_be_told_it_is_refused() -> None:
    x = torch.randn(2, 5, 6)
    with pytest.raises(AnatomyError, match=r"qkv=\('q',\) chooses rows of a fused projection, and .* \(6, 6\) is none"):
        config = LoraConfig(qkv=["q"], target_modules=["q_proj"], modules_to_save=[])
        get_peft_model(split("q_proj", "k_proj", "v_proj"), config, example_inputs=x)
    with pytest.raises(AnatomyError, match=r"qkv=\('q',\): whether '.*src' makes the query, the key or the value"):
        get_peft_model(split("src", "key", "value"), LoraConfig(qkv=["q"]), example_inputs=x)


@pytest.mark.parametrize("value", [[], ["q", "q"]])
def test_the_choice_is_of_each_once(value: list[Any]) -> None:
    with pytest.raises(PointPeftError, match=r"LoraConfig.qkv is .*; allowed: one or more of 'q', 'k', 'v', each once"):
        LoraConfig(qkv=value)
    with pytest.raises(PointPeftError, match=r"LoraConfig.qkv is \('x',\); allowed: a list of 'q' or 'k' or 'v'"):
        LoraConfig(qkv=["x"])  # type: ignore[list-item]


# ---- weighted combinations -------------------------------------------------------------------------------------------


def two(**second: Any) -> PointPeftModel:
    """A model with adapters "default" and "other" at the same layers."""
    first = {name: value for name, value in second.items() if name not in ("r", "lora_alpha", "use_rslora")}
    model = layers(r=4, lora_alpha=6, **first)
    config = LoraConfig(
        target_modules=["linear", "bare", "0", "1", "2", "3"], modules_to_save=[], **{"lora_alpha": 3.0, **second}
    )
    model.add_adapter("other", config)
    moved(model.adapters["other"], 5)
    return model


def changes(model: PointPeftModel, name: str) -> dict[str, Tensor]:
    """The update that an adapter adds to each weight."""
    found = {}
    for path, part in model.adapters[name].all_parts():  # type: ignore[operator]
        module = model.base_model.get_submodule(path)
        (key, value), = part.weights(module).items()  # fmt: skip
        found[path] = (value - module.get_parameter(key)).detach()
    return found


@pytest.mark.parametrize("weights", [(0.7, 0.6), (1.0, -0.5), (-2, 0), (-0.3, -1.1)])
def test_cat_is_the_weighted_sum_of_the_changes(weights: tuple[float, float]) -> None:
    model = two(r=3, use_rslora=True, lora_dropout=0.1)
    model.add_weighted_adapter(["default", "other"], weights, "sum", "cat")
    one, other, found = (changes(model, name) for name in ("default", "other", "sum"))
    for path in found:
        torch.testing.assert_close(found[path], weights[0] * one[path] + weights[1] * other[path])
    assert {part.r for _, part in model.adapters["sum"].all_parts()} == {7}  # type: ignore[operator]
    assert model.active_adapters == ("default",)
    assert not any(p.requires_grad for p in model.adapters["sum"].parameters())
    with model.use_adapter("sum"):
        expected = model(batch())
    model.set_adapter("sum")
    model.merge()
    torch.testing.assert_close(model(batch()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", [(0.7, 0.6), (1.0, -0.5)])
def test_svd_is_the_best_approximation_of_its_rank(weights: tuple[float, float]) -> None:
    model = two(r=3)
    for name, rank in (("best", None), ("two", 2), ("whole", 20)):
        model.add_weighted_adapter(["default", "other"], weights, name, "svd", rank)
    one, other = changes(model, "default"), changes(model, "other")
    for name, rank in (("best", 4), ("two", 2), ("whole", 20)):
        for path, found in changes(model, name).items():
            wanted = weights[0] * one[path] + weights[1] * other[path]
            lengths = torch.linalg.svdvals(wanted.flatten(1))
            error = torch.linalg.svdvals((wanted - found).flatten(1)).norm()
            torch.testing.assert_close(error, lengths[rank:].norm(), atol=1e-4, rtol=1e-3)


def test_a_combination_of_patterns_of_q_and_v_and_of_one() -> None:
    fields: dict[str, Any] = {"qkv": ["q", "v"], "rank_pattern": {"0.attn.qkv": 3}}
    model = adapted(r=2, **fields)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=1, modules_to_save=[], **fields))
    moved(model.adapters["other"], 5)
    model.add_weighted_adapter(["default", "other"], [0.5, -2], "sum", "cat")
    one, other, found = (changes(model, name) for name in ("default", "other", "sum"))
    for path in found:
        torch.testing.assert_close(found[path], 0.5 * one[path] - 2 * other[path], atol=1e-5, rtol=1e-5)
    ranks = [part.r for _, part in model.adapters["sum"].all_parts()]
    assert ranks[0] == 6 and set(ranks[1:]) == {6}
    kinds: tuple[Any, ...] = ("linear", "cat", "svd")
    for kind in kinds:
        model.add_weighted_adapter(["other"], [-0.5], f"one_{kind}", kind)
        for path, change in changes(model, f"one_{kind}").items():
            torch.testing.assert_close(change, -0.5 * other[path], atol=1e-5, rtol=1e-5)
    ranks = [part.r for _, part in model.adapters["one_linear"].all_parts()]
    assert ranks[0] == 3 and set(ranks[1:]) == {4}


def test_a_combination_is_saved_and_read_again(tmp_path: Any) -> None:
    model = two(r=3, rank_pattern={"linear": 2})
    model.add_weighted_adapter(["default", "other"], [1, 2], "sum", "svd")
    model.save_pretrained(tmp_path, "sum")
    torch.manual_seed(0)
    again = PointPeftModel.from_pretrained(Layers(), tmp_path)
    with model.use_adapter("sum"):
        assert torch.equal(again(batch()), model(batch()))


def test_equal_heads_are_taken_over_and_others_refused() -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("fc", nn.Linear(6, 6))
        model.add_module("head", nn.Linear(6, 2))
        return model

    config = LoraConfig(target_modules=["fc"], modules_to_save=["head"])
    model = get_peft_model(base(), config)
    model.add_adapter("other", config)
    model.adapters["other"].load_state_dict(model.adapters["default"].state_dict())
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "same", "cat")
    assert torch.equal(*(dict(model.adapters[name].own_modules())["head"].weight for name in ("same", "other")))  # type: ignore[operator]
    moved(model.adapters["other"], 3)
    with pytest.raises(AdapterError, match=r"'default' and 'other' have modules of their own that differ in 'head\.w"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", "cat")
    assert list(model.adapters) == ["default", "other", "same"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((["default", "third"], [1, 1], "sum"), "there is no adapter 'third'"),
        ((["default", "default"], [1, 1], "sum"), "named twice"),
        (([], [], "sum"), "an empty list of adapters cannot be combined"),
        ((["default", "other"], [1], "sum"), r"weights is '?\[1\]'?; allowed: a finite number for each of the 2"),
        ((["default"], [float("nan")], "sum"), r"weights is \[nan\]; allowed: a finite number for each of the 1"),
        ((["default"], [1e300], "sum"), r"weights \[1e\+300\] give values at 'linear' that are not finite"),
        ((["default"], [True], "sum"), "weights is .*; allowed: a finite number"),
        ((["default", "other"], [1, 1], "other"), "there is an adapter 'other' already"),
        ((["default", "other"], [1, 1], "s.m"), "adapter name 's.m' is not valid"),
        (
            (["default", "other"], [1, 1], "sum", "tie"),
            "combination_type is 'tie'; allowed: 'linear' or 'cat' or 'svd'",
        ),
        ((["default", "other"], [1, 1], "sum", "cat", 3), "svd_rank is 3; allowed: None with combination_type='cat'"),
        ((["default", "other"], [1, 1], "sum", "svd", 0), "svd_rank is 0; allowed: 1 or more"),
        ((["default"], [1e300], "sum", "linear"), r"weights \[1e\+300\] give values at 'linear' that are not finite"),
        ((["default", "other"], [1, 1], "sum", "linear"), r"'linear' needs equal ranks, at '.*' they are \[4, 3\]:"),
        ((["default", "dora"], [1, 1], "sum"), "adapter 'dora' uses DoRA, whose changes do not add up"),
        ((["default", "mixed"], [1, 1], "sum"), r"adapter 'mixed' \(LORA, LORA\) cannot be combined: only LORA alone"),
        ((["default", "fewer"], [1, 1], "sum"), "'default' and 'fewer' adapt other layers: only one has 'bare'"),
    ],
)
def test_what_cannot_be_combined_is_refused(arguments: Any, match: str) -> None:
    model = two(r=3)
    shared: dict[str, Any] = {"target_modules": ["linear", "bare", "0", "1", "2", "3"], "modules_to_save": []}
    model.add_adapter("dora", LoraConfig(use_dora=True, **shared))
    tuners = [LoraConfig(**{**shared, "target_modules": [name]}) for name in ("linear", "bare")]
    model.add_adapter("mixed", PeftConfig(tuners=tuners))
    model.add_adapter("fewer", LoraConfig(target_modules=["linear", "0", "1", "2", "3"], modules_to_save=[]))
    names, expected = list(model.adapters), model(batch())
    with pytest.raises(PointPeftError, match=match):
        model.add_weighted_adapter(*arguments)
    assert list(model.adapters) == names and torch.equal(model(batch()), expected)
