"""The plan of a training: which cloud is when in which batch and process, and that processes draw as one would."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from point_peft import PointPeftError
from point_peft.backbones.layers import DropPath
from point_peft.data.cloud import Sample
from point_peft.training.global_batch import GlobalBatch
from point_peft.training.objective import Loss, balanced_weights, confusion, figures, flat_scores
from point_peft.training.plan import Drawn, check_shares, epoch_batches, in_order, shares
from point_peft.training.recipe import Recipe

counts = st.integers(1, 60)


@given(counts, counts, st.integers(0, 5), st.integers(0, 3))
def test_every_cloud_is_in_one_batch_of_an_epoch(count: int, size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(count, size, seed, epoch)
    assert sorted(cloud for batch in batches for cloud in batch) == list(range(count))
    lengths = {len(batch) for batch in batches}
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1 and len(batches) == -(-count // size)
    assert [cloud for batch in in_order(count, size) for cloud in batch] == list(range(count))


def test_epochs_and_seeds_are_shuffled_apart() -> None:
    orders = {tuple(epoch_batches(40, 40, seed, epoch)[0]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4))
def test_processes_share_a_batch_in_its_order(count: int, accumulate: int, ranks: int) -> None:
    batch = list(range(100, 100 + count))
    parts = [shares(batch, accumulate, rank, ranks) for rank in range(ranks)]
    assert [cloud for part in range(accumulate) for own in parts for cloud in own[part].clouds] == batch
    for part in range(accumulate):
        assert {tuple(own[part].sizes) for own in parts} == {tuple(len(own[part].clouds) for own in parts)}


def test_a_process_without_clouds_is_refused() -> None:
    check_shares(13, 5, 2, 2)
    with pytest.raises(PointPeftError, match="batches of 4 of the 13 training clouds are too small for 5 processes"):
        check_shares(13, 5, 1, 5)


class Noisy(Dataset[Any]):
    """A data set that draws from every generator there is."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([drawn]), torch.tensor(index)


def test_random_numbers_of_a_cloud_depend_on_seed_epoch_and_cloud_alone() -> None:
    clouds = Drawn(Noisy(), (), 3)
    first = clouds[2, 5][0]
    torch.manual_seed(1)
    clouds[0, 4]
    assert torch.equal(clouds[2, 5][0], first)
    others = [Drawn(Noisy(), (), 4)[2, 5][0], clouds[3, 5][0], clouds[2, 6][0]]
    assert not any(torch.isclose(other, first).any() for other in others)


def test_clouds_of_every_form_are_augmented() -> None:
    points, label = torch.rand(20, 3), torch.tensor(1)

    class One(Dataset[Any]):
        def __init__(self, sample: Any) -> None:
            self.sample = sample

        def __getitem__(self, index: int) -> Any:
            return self.sample

    forms: list[Any] = [Sample(points, label, torch.tensor(2)), (points, label), [points, label, "name"]]
    moved: list[Any] = [Drawn(One(form), ("jitter",), 0)[0, 0] for form in forms]
    for before, after in zip(forms, moved, strict=True):
        assert type(after) is type(before) and len(after) == len(before)
        assert torch.equal(after[0], moved[0][0]) and not torch.equal(after[0], points)
    assert moved[0].category == 2 and moved[2][2] == "name"


# ---- processes as one ------------------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3, True),
    "in place": lambda x: F.dropout(x.clone(), 0.3, True, True),
    "dropout1d": lambda x: F.dropout1d(x, 0.5, True),
    "module": nn.Dropout(0.4).train(),
    "drop path": DropPath(0.4).train(),
    "flattened": lambda x: F.dropout(x.flatten(0, 1), 0.4, True).unflatten(0, x.shape[:2]),
    "rand": lambda x: x + torch.rand(x.shape[0], 1, 1),
    "randn of a tuple": lambda x: x + torch.randn(x.shape),
    "rand_like": lambda x: x + torch.rand_like(x),
    "bernoulli": lambda x: torch.bernoulli(x.abs().clamp(max=1)),
    "normal_": lambda x: x + torch.empty_like(x).normal_(0, 2),
    "same for all": lambda x: x + torch.rand(7)[0],
}


@pytest.mark.parametrize("name", list(DRAWS))
def test_processes_draw_what_one_would(name: str) -> None:
    x, sizes = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0)), [3, 2, 2]
    prompts = nn.Parameter(torch.ones(6, 4))

    def forward(own: Tensor) -> Tensor:
        drawn = F.dropout(prompts, 0.5, True)  # before clouds are: none of theirs, though 6 is a multiple of 3 and 2
        return DRAWS[name](own) + 10 * drawn[0]

    torch.manual_seed(5)
    whole = forward(x)
    parts = []
    for rank, own in enumerate(x.split(sizes)):
        torch.manual_seed(5)
        with GlobalBatch(sizes, rank):
            parts.append(forward(own))
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(whole, x)


def test_recomputed_blocks_draw_the_same_again() -> None:
    layer, x, sizes = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(), torch.randn(5, 4), [3, 2]

    def gradients(own: Tensor, again: bool) -> Tensor:
        torch.manual_seed(1)
        output = torch.utils.checkpoint.checkpoint(layer, own, use_reentrant=False) if again else layer(own)
        layer.zero_grad()
        output.square().sum().backward()
        gradient = layer.get_parameter("0.weight").grad
        assert gradient is not None
        return gradient.clone()

    whole = gradients(x, False)
    found = []
    for rank, own in enumerate(x.split(sizes)):
        with GlobalBatch(sizes, rank):
            found.append(gradients(own, True))
    torch.testing.assert_close(torch.stack(found).sum(dim=0), whole)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_losses_of_parts_add_up_to_the_mean_over_the_whole() -> None:
    scores, labels = torch.randn(9, 4), torch.tensor([0, 1, 2, 3, -1, 1, 1, -1, 2])
    weights = balanced_weights(torch.bincount(labels[labels >= 0], minlength=4))
    for own in (None, weights):
        loss = Loss(classes=4, label_smoothing=0.2, weights=own)
        total = sum(float(loss.total(scores[part], labels[part])) for part in (slice(0, 4), slice(4, 9)))
        weight = sum(float(loss.weight_of(labels[part])) for part in (slice(0, 4), slice(4, 9)))
        wanted = F.cross_entropy(scores, labels, own, ignore_index=-1, label_smoothing=0.2)
        assert total / weight == pytest.approx(float(wanted), rel=1e-5)
    assert weights.mean() == pytest.approx(1.0)


def test_figures_of_confusions() -> None:
    labels, taken = torch.tensor([0, 0, 0, 1, 1, -1]), torch.tensor([0, 0, 1, 1, 0, 2])
    counts = confusion(F.one_hot(taken, 4).float(), labels)
    assert counts.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    found = figures(counts, True)
    assert found["accuracy"] == pytest.approx(60) and found["class_accuracy"] == pytest.approx(
        100 * (2 / 3 + 1 / 2) / 2
    )
    assert found["miou"] == pytest.approx(100 * (2 / 4 + 1 / 3) / 2)
    with pytest.raises(PointPeftError, match="nothing here has a label"):
        figures(torch.zeros(3, 3), False)


def test_scores_of_every_layout() -> None:
    points, labels = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    flat = points.reshape(-1, 3)
    for output in (points, points.transpose(1, 2), flat, (points, "more")):
        assert torch.equal(flat_scores(output, labels, 3, None), flat)
    assert torch.equal(flat_scores({"seg": points}, labels, 3, lambda output: output["seg"]), flat)
    with pytest.raises(PointPeftError, match=r"gives \(2, 5, 3\) for labels \(2, 5\) of 4 classes"):
        flat_scores(points, labels, 4, None)


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_a_recipe_goes_through_yaml(tmp_path: Any) -> None:
    recipe = Recipe(epochs=3, augment=("jitter", "rotate"), class_weights=(1.0, 2.0), ema=0.99, clip=None)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [Recipe(warm_up=0.2, final_lr=0.1).learning_rate(step, 50) for step in range(50)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == pytest.approx(1.0) and rates.index(max(rates)) == 10
    assert rates == [*sorted(rates[:11]), *sorted(rates[11:], reverse=True)] and 0.1 < rates[-1] < 0.11


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "Recipe.epochs is 0; allowed: 1 or more"),
        ({"lr": -1.0}, "Recipe.lr is -1.0; allowed: more than 0"),
        ({"head_lr": 0.0}, "Recipe.head_lr is 0.0; allowed: more than 0"),
        ({"ema": 1.0}, "Recipe.ema is 1.0; allowed: 0 or more and less than 1"),
        ({"augment": ["jiter"]}, "Recipe.augment is 'jiter'; allowed: .*; nearest: 'jitter'"),
        ({"class_weights": [1.0, -2.0]}, "Recipe.class_weights is .*; allowed: 'none', 'balanced'"),
        ({"batch_size": 4, "accumulate": 5}, "Recipe.accumulate is 5; allowed: at most batch_size, 4"),
        ({"mixed_precision": "bf32"}, "Recipe.mixed_precision is 'bf32'; allowed: 'no' or 'bf16' or 'fp16'"),
        ({"epoch": 3}, "the recipe has a field 'epoch' that no recipe has; nearest: 'epochs'"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PointPeftError, match=message):
        Recipe.from_json(fields)
