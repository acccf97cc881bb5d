"""Adapters of two halves of a set, combined in every way, beside one adapter of all of it; and one that is subtracted.

    python -m benchmarks.arithmetic                 trains, combines, and writes its part of docs/many_adapters.md
    python -m benchmarks.arithmetic --seeds 1 --epochs 2

The lifted digits of scikit-learn, which need no file. Half of the training clouds are as they are, the other half as a
sensor sees them that is mounted turned by 90 degrees; the test clouds are given both ways. A linear head is fitted
first, on the frozen features of a few clouds of both halves, and is then frozen for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.results import spread
from benchmarks.accuracy.stem import Store
from benchmarks.marked import write_between
from point_peft import LoraConfig, PointPeftModel, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.config import CombinationType
from point_peft.quickstart.data import Split, load_digits_clouds, take
from point_peft.quickstart.training import Recipe, accuracy, optimisation, predict
from tools.methods import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "many_adapters.md"
BEGIN = "<!-- arithmetic: written by `python -m benchmarks.arithmetic` -->"
END = "<!-- arithmetic: up to here -->"
HEAD = "cls_head_finetune"
TYPES: tuple[CombinationType, ...] = get_args(CombinationType)
ADAPTERS = ("upright", "turned", "all", "one")
CONFIG = LoraConfig(target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=[])
WEIGHTS = (0.5, 1.0)
"""Of both adapters."""
DENSITY = 0.5
CLOUDS, CLOUDS_OF_HEAD = 240, 50
"""Of each half to train an adapter, and to fit the head."""
LR = 3e-3
FORGOTTEN = 3
"""The digit that is subtracted."""
AMOUNTS = (0.25, 0.5, 1.0)
Figures = dict[str, list[float]]
"""Name of a row -> its figures."""


def turned(split: Split) -> Split:
    """The clouds turned by a right angle about z."""
    points, labels = split
    return torch.stack([-points[..., 1], points[..., 0], points[..., 2]], dim=-1), labels


def together(*splits: Split) -> Split:
    """The clouds of several splits."""
    return torch.cat([points for points, _ in splits]), torch.cat([labels for _, labels in splits])


def of_class(split: Split, label: int, *, without: bool = False) -> Split:
    """The clouds of one class, or of all others."""
    points, labels = split
    chosen = (labels == label) != without
    return points[chosen], labels[chosen]


def fitted_head(features: Tensor, labels: Tensor) -> nn.Linear:
    """Logistic regression on features (m, c), with a little decay."""
    head = nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(features), labels) + 1e-3 * head.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return head


def train(model: PointPeftModel, name: str, split: Split, epochs: int) -> None:
    """Train one adapter, and leave it frozen."""
    model.set_adapter(name)
    model.train_adapter(name)
    model.train()
    points, labels = split
    recipe = Recipe(epochs=epochs)
    orders = [torch.randperm(len(labels)) for _ in range(epochs)]
    steps = [chosen for order in orders for chosen in torch.split(order, recipe.batch_size)]
    parameters = list(model.adapters[name].parameters())
    optimizer, schedule = optimisation(parameters, recipe, LR, len(steps))
    for chosen in steps:
        loss = F.cross_entropy(model(points[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.freeze_adapter(name)


def adapted(halves: Mapping[str, Split], epochs: int, store: Store) -> PointPeftModel:
    """The backbone with a head that is common to all, and with the four adapters, trained."""
    base: Any = default_backbone(cls_dim=10)
    some = together(*(take(half, CLOUDS_OF_HEAD) for half in halves.values()))
    base.cls_head_finetune = nn.Identity()
    base.cls_head_finetune = fitted_head(predict(base, some[0]).clone(), some[1])
    model = get_peft_model(base, CONFIG, adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.add_adapter(name, CONFIG)
    every = together(*halves.values())
    with store.serving(model):
        for name, split in zip(ADAPTERS, (*halves.values(), every, of_class(every, FORGOTTEN)), strict=True):
            train(model, name, split, epochs)
    return model


def run(seed: int, epochs: int) -> tuple[Figures, Figures]:
    """What comes of one seed: accuracies by row of the first and of the second table."""
    torch.manual_seed(seed)
    data, store = load_digits_clouds(), Store(Path())
    drawn = take(data.train, 2 * CLOUDS, seed)
    halves = {
        "upright": (drawn[0][:CLOUDS], drawn[1][:CLOUDS]),
        "turned": turned((drawn[0][CLOUDS:], drawn[1][CLOUDS:])),
    }
    tests = [data.test, turned(data.test)]
    model = adapted(halves, epochs, store)
    both = together(*tests)
    digits = [of_class(both, FORGOTTEN), of_class(both, FORGOTTEN, without=True)]
    sums, less = {}, {}
    with store.serving(model):
        with model.disable_adapter():
            sums["no adapter"] = [accuracy(model, test) for test in tests]
        for name in ADAPTERS[:3]:
            model.set_adapter(name)
            sums[name] = [accuracy(model, test) for test in tests]
        less["all"] = [accuracy(model, split) for split in digits]
        for kind in TYPES:
            for weight in WEIGHTS:
                sums[f"{kind} {weight}"] = combined(model, ["upright", "turned"], [weight, weight], kind, tests)
        for kind in ("svd", "ties_svd"):
            for amount in AMOUNTS:
                less[f"{kind} {amount}"] = combined(model, ["all", "one"], [1.0, -amount], kind, digits)
    return sums, less


def combined(
    model: PointPeftModel, names: list[str], weights: list[float], kind: CombinationType, tests: Sequence[Split]
) -> list[float]:
    """The accuracies of a combination."""
    density = DENSITY if kind not in ("linear", "cat", "svd") else None
    model.add_weighted_adapter(names, weights, "combined", kind, density=density)
    with model.use_adapter("combined"):
        found = [accuracy(model, test) for test in tests]
    model.delete_adapter("combined")
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def rows(found: Sequence[Figures], mean: str | None = None) -> list[list[str]]:
    """A row for each name, its figures over the seeds, and the mean of a seed's figures where that is asked for."""
    cells = []
    for name in found[0]:
        columns = [list(column) for column in zip(*(figures[name] for figures in found), strict=True)]
        columns += [] if mean is None else [[fmean(figures[name]) for figures in found]]
        cells.append([name, *map(spread, columns)])
    return cells


def lines(found: Sequence[tuple[Figures, Figures]], epochs: int) -> Iterator[str]:
    """What stands between the marks."""
    sums, less = [one for one, _ in found], [other for _, other in found]
    yield f"Test accuracy in percent, mean ± standard deviation of {len(found)} seeds. LoRA of rank {CONFIG.r} on all"
    yield f"linear layers of the blocks, {epochs} epochs on {CLOUDS} clouds of each half; density {DENSITY}, where"
    yield "there is one. The number behind a type is the weight of both adapters."
    yield ""
    yield from table(rows(sums, mean="both"), ["", "upright", "turned", "both"])
    yield ""
    yield f"`all`, less so much of an adapter that saw the digit {FORGOTTEN} alone:"
    yield ""
    yield from table(rows(less), ["", f"digit {FORGOTTEN}", "other digits"])


def main(argv: Sequence[str] | None = None) -> None:
    """Do all seeds and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args(argv)
    found = []
    for seed in range(args.seeds):
        found.append(run(seed, args.epochs))
        print(f"seed {seed}: done", flush=True)
    write_between(PAGE, BEGIN, END, lines(found, args.epochs))


if __name__ == "__main__":
    main()
