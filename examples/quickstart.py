"""The main job from data to adapter file: freeze a backbone, train one small adapter per task, swap between them.

    python examples/quickstart.py                                     # lifted digits, nothing to download
    python examples/quickstart.py --data radhar --file radhar.npz     # real radar recordings
    python examples/quickstart.py --seeds 3                           # the comparison three times: mean and deviation

It compares Point-PEFT with linear probing (frozen backbone, the same head) and full fine-tuning under one recipe: the
same head, augmentation, batch size, epochs, optimiser and schedule; only the learning rate is each method's own, chosen
on the validation split (see LEARNING_RATES). The last epoch counts, and the test split is used once per method. To stay
below five minutes on two cores it trains on a part of the training split; `--train 100000` takes all of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from examples.data import Clouds, Split, activity_groups, load_digits_clouds, load_radhar, parity
from point_peft import PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.backbones import PointTransformer, default_backbone

HEAD = "cls_head_finetune"
METHODS = ("linear probing", "full fine-tuning", "Point-PEFT")

CONFIG = PointPEFTConfig(modules_to_save=[HEAD])

# Chosen on the whole validation split of the digits after the last epoch, from three values each; accuracy in percent.
# Seed 0: linear probing 1e-3: 78.0, 3e-3: 81.9, 1e-2: 81.6; full fine-tuning 5e-4: 85.2, 1e-3: 90.5, 2e-3: 89.4;
# Point-PEFT 3e-3: 89.1, 5e-3: 87.7. Seed 1: Point-PEFT 2e-3: 86.9, 3e-3: 87.5.
LEARNING_RATES = {"linear probing": 3e-3, "full fine-tuning": 1e-3, "Point-PEFT": 3e-3}


@dataclass
class Recipe:
    """What all methods share."""

    epochs: int = 8
    batch_size: int = 16
    weight_decay: float = 0.05
    warm_up: float = 0.1
    rotation: float = 0.1  # radians about the z axis, either way
    stretch: float = 0.1  # share of each axis, either way


@dataclass
class Run:
    """What one training left behind."""

    method: str
    trainable: int
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # by epoch
    val: list[float] = field(default_factory=list)  # by epoch
    test: float = 0.0


def fresh_backbone(classes: int) -> PointTransformer:
    """The embedded backbone with a new head."""
    return default_backbone(cls_dim=classes)


def augment(points: Tensor, recipe: Recipe) -> Tensor:
    """(b, n, 3) -> (b, n, 3): each cloud turned a little about z and stretched a little along each axis."""
    b = len(points)
    angle = (2 * torch.rand(b) - 1) * recipe.rotation
    turn = torch.eye(3).repeat(b, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 0, 1], turn[:, 1, 0] = angle.sin(), -angle.sin()
    return points @ turn * (1 + (2 * torch.rand(b, 1, 3) - 1) * recipe.stretch)


def batches(split: Split, size: int) -> Iterator[Split]:
    """(points, labels) in order, for evaluation and the memory bank."""
    points, labels = split
    yield from zip(torch.split(points, size), torch.split(labels, size), strict=True)


@torch.inference_mode()
def predict(model: nn.Module, points: Tensor, size: int = 32) -> Tensor:
    """Logits (m, classes) of clouds (m, n, 3)."""
    model.eval()
    return torch.cat([model(part) for part in torch.split(points, size)])


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of a split that is classified correctly, in percent."""
    points, labels = split
    return 100 * float((predict(model, points).argmax(dim=1) == labels).float().mean())


def train(model: nn.Module, train_mode: nn.Module, data: Clouds, recipe: Recipe, run: Run, lr: float) -> Run:
    """Train the parameters that require gradients, with `train_mode` (the model or only its head) in train mode."""
    points, labels = data.train
    per_epoch = max(len(labels) // recipe.batch_size, 1)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = recipe.epochs * per_epoch
    warm_up = max(int(recipe.warm_up * steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * np.cos(np.pi * step / steps))
    )
    start = time.perf_counter()
    with tqdm(total=steps, desc=f"{run.method:>24}") as bar:
        for _ in range(recipe.epochs):
            model.eval()
            train_mode.train()
            losses = []
            for chosen in torch.split(torch.randperm(len(labels)), recipe.batch_size)[:per_epoch]:
                logits = model(augment(points[chosen], recipe))
                loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(params, 10.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.update()
            run.losses.append(float(np.mean(losses)))
            run.val.append(accuracy(model, data.val))
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}", val=f"{run.val[-1]:.1f}")
    run.seconds = time.perf_counter() - start
    run.test = accuracy(model, data.test)
    return run


def baseline(method: str, data: Clouds, recipe: Recipe, lr: float, seed: int) -> Run:
    """Linear probing or full fine-tuning of a fresh copy of the backbone."""
    torch.manual_seed(seed)
    model = fresh_backbone(len(data.class_names))
    head = model.get_submodule(HEAD)
    probing = method == "linear probing"
    if probing:
        model.requires_grad_(False)
        head.requires_grad_(True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return train(model, head if probing else model, data, recipe, Run(method, trainable), lr)


def point_peft(
    data: Clouds, recipe: Recipe, lr: float, seed: int, config: PointPEFTConfig = CONFIG
) -> tuple[PointPeftModel, Run]:
    """Point-PEFT on a fresh copy of the backbone, which stays frozen."""
    torch.manual_seed(seed)
    backbone = fresh_backbone(len(data.class_names))
    model = get_peft_model(backbone, config)
    model.build_memory_bank(batches(data.train, 32))
    model.print_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, train(model, model, data, recipe, Run("Point-PEFT", trainable), lr)


def second_task(model: PointPeftModel, data: Clouds, recipe: Recipe, lr: float, seed: int) -> Run:
    """Another adapter on the same backbone, for other classes: it brings a head of its own shape."""
    torch.manual_seed(seed)
    classes = len(data.class_names)
    model.add_adapter("second", CONFIG, heads={HEAD: lambda: fresh_backbone(classes).get_submodule(HEAD)})
    model.set_adapter("second")
    model.build_memory_bank(batches(data.train, 32))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return train(model, model, data, recipe, Run("Point-PEFT, second task", trainable), lr)


def swap_seconds(model: PointPeftModel, repeats: int = 1000) -> float:
    """Mean time of one change between the two adapters."""
    start = time.perf_counter()
    for _ in range(repeats):
        model.set_adapter("second")
        model.set_adapter("default")
    return (time.perf_counter() - start) / (2 * repeats)


def folder_size(folder: Path) -> float:
    """Megabytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def figure(path: Path, data: Clouds, other: Clouds, answers: Tensor, others: Tensor, runs: list[Run]) -> None:
    """Draw example test clouds with the answers of both adapters (m,), and the validation curves of all runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plot = plt.figure(figsize=(14, 9), layout="constrained")
    top, bottom = plot.subfigures(2, 1, squeeze=False, height_ratios=[1.2, 1]).ravel()
    points, labels = data.test
    shown = min(10, len(labels))
    for cell, axes in enumerate(top.subplots(2, 5).flat):
        axes.set_axis_off()
        if cell >= shown:
            continue
        x, y, z = points[cell].T.numpy()
        axes.scatter(x, y, c=z, s=2, cmap="viridis")
        axes.set_aspect("equal")
        right = answers[cell] == labels[cell] and others[cell] == other.test[1][cell]
        title = f"{data.class_names[answers[cell]]} · {other.class_names[others[cell]]}"
        truth = "" if right else f" (is {data.class_names[labels[cell]]} · {other.class_names[other.test[1][cell]]})"
        axes.set_title(title + truth, color="black" if right else "crimson")
    top.suptitle(f"{data.name}: test clouds, answers of two adapters on one backbone")
    left, right_axes = bottom.subplots(1, 2)
    for run in runs:
        epochs = range(1, len(run.val) + 1)
        label = f"{run.method} ({run.trainable / 1e3:,.0f} k)"
        left.plot(epochs, run.val, marker=".", label=label)
        right_axes.plot(epochs, run.losses, marker=".", label=label)
    left.set(xlabel="epoch", ylabel="validation accuracy, %")
    right_axes.set(xlabel="epoch", ylabel="training loss")
    left.legend(title="trainable parameters")
    for axes in (left, right_axes):
        axes.grid(alpha=0.3)
    plot.savefig(path, dpi=90)
    plt.close(plot)


def report(all_runs: dict[str, list[Run]]) -> None:
    """Print one line per method: trainable parameters, test accuracy (mean and deviation over seeds), seconds."""
    print(f"\n{'':>24} {'trainable':>10} {'test accuracy':>16} {'training':>10}")
    for method, runs in all_runs.items():
        tests = [run.test for run in runs]
        spread = f" ± {np.std(tests, ddof=1):.1f}" if len(tests) > 1 else ""
        seconds = np.mean([run.seconds for run in runs])
        print(f"{method:>24} {runs[0].trainable:>10,} {f'{np.mean(tests):.1f} %{spread}':>16} {seconds:>8.0f} s")


def load(args: argparse.Namespace) -> tuple[Clouds, Clouds]:
    """The data of the first task and of the second, cut to the sizes that were asked for."""
    if args.data == "radhar" and args.file is None:
        raise SystemExit("--data radhar needs --file PATH of radhar.npz")
    full = load_radhar(args.file) if args.data == "radhar" else load_digits_clouds()
    data = full.subset(args.train, args.val, args.test)
    for part in ("train", "val", "test"):
        print(f"{data.name}, {part}: {len(getattr(data, part)[1])} of {len(getattr(full, part)[1])} clouds")
    return data, activity_groups(data) if args.data == "radhar" else parity(data)


def main(argv: list[str] | None = None) -> None:
    """The whole story; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "radhar"], default="digits")
    parser.add_argument("--file", type=Path, help="radhar.npz")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--train", type=int, default=600, help="at most so many training clouds")
    parser.add_argument("--val", type=int, default=100, help="at most so many validation clouds")
    parser.add_argument("--test", type=int, default=None, help="at most so many test clouds")
    parser.add_argument("--seeds", type=int, default=1, help="repeat the comparison with so many seeds")
    parser.add_argument(
        "--out", type=Path, default=Path("build/quickstart"), help="folder for the adapters and the picture"
    )
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    recipe = Recipe(epochs=args.epochs)
    data, other = load(args)

    all_runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    for seed in range(args.seeds):
        for method in METHODS[:2]:
            all_runs[method].append(baseline(method, data, recipe, LEARNING_RATES[method], seed))
        model, run = point_peft(data, recipe, LEARNING_RATES["Point-PEFT"], seed)
        all_runs["Point-PEFT"].append(run)
    report(all_runs)

    # One file per task. A fresh copy of the backbone with the file answers exactly as the trained model did.
    first = args.out / "first"
    model.save_pretrained(first)
    answers = predict(model, data.test[0])
    reloaded = PointPeftModel.from_pretrained(fresh_backbone(len(data.class_names)), first)
    assert torch.equal(predict(reloaded, data.test[0]), answers)
    print("saved, loaded into a fresh backbone: logits are equal bit for bit")

    # A second task on the same frozen backbone, with a head of another shape.
    second = second_task(
        model, other, replace(recipe, epochs=(recipe.epochs + 1) // 2), LEARNING_RATES["Point-PEFT"], seed=0
    )
    model.save_pretrained(args.out / "second", "second")
    others = predict(model, data.test[0])
    print(f"second task ({other.name}): {second.test:.1f} % of the test clouds")

    model.set_adapter("default")
    assert torch.equal(predict(model, data.test[0]), answers)
    print(f"a swap takes {1e6 * swap_seconds(model):.0f} microseconds; the first task's logits are as before")

    backbone = sum(p.numel() * 4 for p in fresh_backbone(len(data.class_names)).parameters()) / 1e6
    sizes = [folder_size(args.out / name) for name in ("first", "second")]
    print(f"a full copy of the model is {backbone:.1f} MB, the adapters are {sizes[0]:.2f} MB and {sizes[1]:.2f} MB")
    picture = args.out / "quickstart.png"
    figure(picture, data, other, answers.argmax(dim=1), others.argmax(dim=1), [runs[-1] for runs in all_runs.values()])
    print(f"picture: {picture}; all of it took {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
