"""Arithmetic with adapters: every type gives PEFT's result, negative weights subtract, bad input changes nothing."""

from __future__ import annotations

import warnings
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from point_peft import AdapterError, LoraConfig, PointPeftError, PointPeftModel, get_peft_model
from point_peft.config import CombinationType
from point_peft.tuners.lora.task_vectors import dropped, elected_mean, trimmed, weighted_sum
from tests.peft_package import peft

NAMES = ["default", "one", "two"]
TYPES: tuple[Any, ...] = get_args(CombinationType)
LAYERS = ["0", "1", "3", "4"]
LINEAR = ["3", "4"]
"""Those that PEFT combines by svd too; it fails with nn.Conv1d."""


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(6, 7, 3, padding=1), nn.Conv1d(7, 8, 1), nn.Tanh(), nn.Linear(5, 9), nn.Linear(9, 6))


def three(
    ranks: tuple[int, ...] = (3, 3, 3), layers: list[str] = LAYERS, negated: tuple[str, ...] = ()
) -> PointPeftModel:
    """Three adapters with values at random, some with A negated."""
    alphas = (5.0, 2.0, 4.0)
    configs = [
        LoraConfig(r=r, lora_alpha=alpha, use_rslora=alpha == 2, target_modules=layers, modules_to_save=[])
        for r, alpha in zip(ranks, alphas, strict=True)
    ]
    model = get_peft_model(base(), configs[0])
    for name, config in zip(NAMES[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in NAMES:
            for key, parameter in model.adapters[name].named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                if name in negated and "lora_A" in key:
                    parameter.neg_()
    return model.eval()


def of_peft(model: PointPeftModel, tmp_path: Any) -> Any:
    """PEFT's model with the same adapters."""
    model.save_pretrained(tmp_path, format="peft")
    read = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    for name in NAMES[1:]:
        read.load_adapter(str(tmp_path / name), name)
    return read


def changes(model: PointPeftModel, name: str) -> dict[str, Tensor]:
    """The change that an adapter makes to each weight."""
    found = {}
    for path, part in model.adapters[name].all_parts():  # type: ignore[operator]
        weight = model.base_model.get_submodule(path).weight
        (value,) = part.weights(model.base_model.get_submodule(path)).values()
        found[path] = (value - weight).detach()
    return found


def changes_of_peft(read: Any, name: str) -> dict[str, Tensor]:
    return {path: read.base_model.model.get_submodule(path).get_delta_weight(name).detach() for path in LAYERS}


def options(kind: Any, density: float, method: Any) -> dict[str, Any]:
    """The arguments of a type, with a density and a vote where it has them."""
    given: dict[str, Any] = {"combination_type": kind}
    if kind not in ("linear", "cat", "svd"):
        given["density"] = density
    if "ties" in kind:
        given["majority_sign_method"] = method
    return given


def compare(model: PointPeftModel, read: Any, weights: list[float], theirs: list[float], given: dict[str, Any]) -> None:
    """Combine here and in PEFT, with masks of the same random numbers, and compare the changes of each weight."""
    undrawn = {"density": 1.0} if "dare" in given["combination_type"] else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a density of 1, at which it draws no mask
        torch.manual_seed(7)
        read.add_weighted_adapter(NAMES, theirs, "undrawn", **{**given, **undrawn})
        state = torch.get_rng_state()  # behind the numbers that PEFT draws when it makes an adapter
        torch.manual_seed(7)
        read.add_weighted_adapter(NAMES, theirs, "sum", **given)
    torch.set_rng_state(state)
    model.add_weighted_adapter(NAMES, weights, "sum", **given)
    found = changes(model, "sum")
    for path in found:
        expected = read.base_model.model.get_submodule(path).get_delta_weight("sum").detach()
        assert bool(expected.any())
        torch.testing.assert_close(found[path], expected, atol=2e-5, rtol=1e-4)
    model.delete_adapter("sum")
    read.delete_adapter("undrawn")
    read.delete_adapter("sum")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_type_gives_the_result_of_peft(kind: str, sign: int, tmp_path: Any) -> None:
    weights = [0.7, sign * 0.5, 1.2]
    elects = "ties" in kind
    # In a vote, PEFT does not see the sign of a weight: it gets the negated adapter.
    layers = LINEAR if "svd" in kind else LAYERS
    model = three(layers=layers)
    read = of_peft(three(layers=layers, negated=("one",) if elects and sign < 0 else ()), tmp_path)
    theirs = list(map(abs, weights)) if elects else weights
    for density, method in ((0.3, "total"), (0.55, "frequency"), (0.8, "total"), (1.0, "frequency")):
        compare(model, read, weights, theirs, options(kind, density, method))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if "svd" in kind or kind == "cat"])
@pytest.mark.parametrize("rank", [None, 2])
def test_adapters_of_different_ranks(kind: str, rank: int | None, tmp_path: Any) -> None:
    model = three(ranks=(3, 2, 4), layers=LINEAR)
    given = options(kind, 0.6, "total") | ({} if kind == "cat" else {"svd_rank": rank})
    compare(model, of_peft(model, tmp_path), [0.7, 0.5, 1.2], [0.7, 0.5, 1.2], given)


@pytest.mark.parametrize("kind", TYPES)
def test_a_negative_weight_is_the_negated_adapter_and_zero_is_none(kind: str) -> None:
    model, negated = three(), three(negated=("one",))
    given = options(kind, 0.6, "total")
    for model_, name, names, weights in (
        (model, "less", NAMES, [1.0, -0.5, 0.25]),
        (negated, "less", NAMES, [1.0, 0.5, 0.25]),
        (model, "without", NAMES, [1.0, 0.0, 0.25]),
        (negated, "without", ["default", "two"], [1.0, 0.25]),
    ):
        torch.manual_seed(2)
        model_.add_weighted_adapter(names, weights, name, **given)
    for path, change in changes(negated, "less").items():
        torch.testing.assert_close(changes(model, "less")[path], change, atol=1e-5, rtol=1e-4)
        if "dare" not in kind:  # the masks of fewer adapters are others
            expected = changes(negated, "without")[path]
            torch.testing.assert_close(changes(model, "without")[path], expected, atol=1e-5, rtol=1e-4)


# ---- the operations --------------------------------------------------------------------------------------------------


def test_trimming_keeps_the_largest_of_each_task() -> None:
    tasks = torch.tensor([[[1.0, -4.0], [3.0, 0.5]], [[-0.1, 0.2], [0.0, 0.3]]])
    expected = torch.tensor([[[0.0, -4.0], [3.0, 0.0]], [[0.0, 0.2], [0.0, 0.3]]])
    assert torch.equal(trimmed(tasks, 0.5), expected) and torch.equal(trimmed(tasks, 0.74), expected)
    assert torch.equal(trimmed(tasks, 1.0), tasks) and not trimmed(tasks, 0.2).any()


def test_dropping_keeps_the_mean() -> None:
    tasks = torch.full((2, 100, 100), 3.0)
    torch.manual_seed(0)
    found = dropped(tasks, 0.25)
    assert found.unique().tolist() == [0, 12] and abs(float(found.mean()) - 3) < 0.2
    torch.manual_seed(0)
    assert torch.equal(dropped(tasks, 0.25), found) and not torch.equal(dropped(tasks, 0.25), found)
    assert torch.equal(dropped(tasks, 1.0), tasks)


def test_the_elected_sign_has_the_mean_of_its_values() -> None:
    """Columns: agreement, a large one against two, zeros, one alone, an even vote."""
    tasks = torch.tensor([[1.0, -1.0, 0.0, 0.0, 2.0], [3.0, -2.0, 0.0, 0.0, -2.0], [2.0, 6.0, 0.0, -5.0, 0.0]])
    weights = torch.tensor([1.0, 0.5, 2.0])
    total = torch.tensor([(1 + 1.5 + 4) / 3, 12, 0, -10, 2])
    assert torch.allclose(elected_mean(tasks, weights, by_number=False), total)
    number = torch.tensor([(1 + 1.5 + 4) / 3, (-1 - 1) / 2, 0, -10, 2])
    assert torch.allclose(elected_mean(tasks, weights, by_number=True), number)
    signs = torch.tensor([1.0, -1.0, 1.0])
    for by_number in (False, True):
        subtracted = elected_mean(tasks, signs * weights, by_number=by_number)
        assert torch.equal(subtracted, elected_mean(signs[:, None] * tasks, weights, by_number=by_number))
    assert torch.allclose(weighted_sum(tasks, weights), weights @ tasks)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"combination_type": "sum"},
            "combination_type is 'sum'; allowed: 'linear' or 'cat' or .*'magnitude_prune_svd'",
        ),
        ({"combination_type": ["svd"]}, r"combination_type is \('svd',\); allowed: 'linear'"),
        ({"combination_type": "ties"}, "density is None; allowed: more than 0, at most 1 with combination_type='ties'"),
        (
            {"combination_type": "dare_linear_svd"},
            "density is None; allowed: .* with combination_type='dare_linear_svd'",
        ),
        ({"combination_type": "ties", "density": 0.0}, "density is 0.0; allowed: more than 0, at most 1"),
        ({"combination_type": "ties", "density": 1.5}, "density is 1.5; allowed: more than 0, at most 1"),
        ({"combination_type": "ties", "density": float("nan")}, "density is nan; allowed: a finite number"),
        ({"density": 0.5}, "density is 0.5; allowed: None with combination_type='svd', which keeps all values"),
        ({"combination_type": "ties", "density": 0.5, "svd_rank": 2}, "svd_rank is 2; allowed: None with .*'ties'"),
        ({"combination_type": "ties_svd", "density": 0.5, "svd_rank": 0}, "svd_rank is 0; allowed: 1 or more"),
        ({"svd_rank": 2.0}, "svd_rank is 2.0; allowed: an integer"),
        (
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"},
            "majority_sign_method is 'most'",
        ),
        ({"majority_sign_method": "frequency"}, "majority_sign_method is 'frequency'; allowed: 'total' with .*'svd'"),
        ({"combination_type": "ties", "density": 0.5}, r"'ties' needs equal ranks, at '0' they are \[3, 2, 4\]: use"),
        ({"weights": [1.0, 1.0]}, "weights is .*; allowed: a finite number for each of the 3 adapters"),
        ({"weights": [1.0, float("inf"), 1.0]}, "weights is .*; allowed: a finite number for each of the 3 adapters"),
        ({"weights": [1, 10**400, 1]}, "weights is .*; allowed: a finite number for each of the 3 adapters"),
        ({"weights": [10**300, 1, 1]}, r"weights \[1e\+300, 1.0, 1.0\] give values at '0' that are not finite"),
        ({"weights": [1e300, 1.0, 1.0]}, r"weights \[1e\+300, 1.0, 1.0\] give values at '0' that are not finite"),
    ],
)
def test_what_is_refused_changes_nothing(arguments: dict[str, Any], match: str) -> None:
    model, clouds = three(ranks=(3, 2, 4)), torch.ones(2, 6, 5)
    expected = model(clouds)
    with pytest.raises(PointPeftError, match=match) as caught:
        model.add_weighted_adapter(
            **{"adapters": NAMES, "weights": [1.0, 1.0, 1.0], "adapter_name": "sum", **arguments}
        )
    assert "\n" not in str(caught.value)
    assert list(model.adapters) == NAMES and torch.equal(model(clouds), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_with_nan_is_refused_by_name(kind: str) -> None:
    model = three()
    with torch.no_grad():
        model.adapters["one"].get_parameter("parts.1.0.lora_B.weight")[0] = torch.nan
    with pytest.raises(AdapterError, match="adapter 'one' has values at '1' that are not finite"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0, 1.0], "sum", **options(kind, 0.5, "total"))
    assert list(model.adapters) == NAMES
