"""The main job from data to adapter file: freeze a backbone, train one small adapter per task, swap between them.

    python -m point_peft.quickstart                                    # lifted digits, nothing to download
    python -m point_peft.quickstart --data radhar --file radhar.npz    # real radar recordings
    python -m point_peft.quickstart --compare --seeds 3                # instead: beside full fine-tuning

To stay below two minutes on two cores it trains on a part of the training split, for few epochs; `--train 100000
--epochs 8` takes all of it, for longer. The last epoch counts, and the test split is used once a task.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from point_peft import PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.quickstart.compare import LEARNING_RATES, compare
from point_peft.quickstart.data import Clouds, activity_groups, load_digits_clouds, load_radhar, parity
from point_peft.quickstart.picture import draw
from point_peft.quickstart.training import Recipe, accuracy, predict, train

HEAD = "cls_head_finetune"  # the backbone's name for it
LR = LEARNING_RATES["Point-PEFT"]


def tour(data: Clouds, other: Clouds, recipe: Recipe, out: Path) -> None:
    """Train an adapter for each of two tasks on one backbone, and leave their files and a picture in `out`."""
    torch.manual_seed(0)
    classes = len(data.class_names)

    # Two lines: the backbone is frozen and has an adapter and a head to train.
    backbone = default_backbone(cls_dim=classes)
    model = get_peft_model(backbone, PointPEFTConfig())
    model.print_trainable_parameters()

    # A training loop like any other.
    print(f"first task: {data.name}, {classes} classes")
    first = train(model, data, recipe, LR)
    print(f"first task: {accuracy(model, data.test):.1f} % of {len(data.test[1])} test clouds")

    # A file a task. A fresh copy of the backbone with the file answers exactly as the trained model does.
    model.save_pretrained(out / "first")
    logits = predict(model, data.test[0])
    reloaded = PointPeftModel.from_pretrained(default_backbone(cls_dim=classes), out / "first")
    if not torch.equal(predict(reloaded, data.test[0]), logits):
        raise SystemExit("the reloaded adapter answers otherwise than the trained one")
    print("saved, loaded into a fresh backbone: logits are equal bit for bit")

    # A second task on the same frozen backbone, with a head of another shape.
    head = default_backbone(cls_dim=len(other.class_names)).cls_head_finetune
    model.add_adapter("second", PointPEFTConfig(), heads={HEAD: head})
    model.set_adapter("second")
    print(f"second task: {other.name}, {len(other.class_names)} classes, on the same backbone")
    second = train(model, other, replace(recipe, epochs=(recipe.epochs + 1) // 2), LR)
    other_logits = predict(model, other.test[0])
    right = (other_logits.argmax(dim=1) == other.test[1]).float().mean()
    print(f"second task: {100 * right:.1f} % of the test clouds")
    model.save_pretrained(out / "second", "second")

    # Swap as often as you like: nothing is loaded or copied, and the other task stays as it was.
    start = time.perf_counter()
    for _ in range(1000):
        model.set_adapter("default")
        model.set_adapter("second")
    seconds = (time.perf_counter() - start) / 2000
    model.set_adapter("default")
    if not torch.equal(predict(model, data.test[0]), logits):
        raise SystemExit("the first task answers otherwise after the second was trained")
    print(f"a swap takes {1e6 * seconds:.0f} microseconds; the first task's logits are as before, bit for bit")

    sizes = {
        "backbone": sum(p.numel() * p.element_size() for p in backbone.parameters()) / 1e6,
        **{f"{task} adapter": folder_size(out / task) for task in ("first", "second")},
    }
    print("file sizes: " + ", ".join(f"{name} {size:.2f} MB" for name, size in sizes.items()))
    draw(out / "quickstart.png", [data, other], [logits, other_logits], [first, second], sizes)
    print(f"picture: {out / 'quickstart.png'}")


def folder_size(folder: Path) -> float:
    """Megabytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


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
    """The tour, or the comparison; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "radhar"], default="digits")
    parser.add_argument("--file", type=Path, help="radhar.npz")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--train", type=int, default=320, help="at most so many training clouds")
    parser.add_argument("--val", type=int, default=100, help="at most so many validation clouds")
    parser.add_argument("--test", type=int, default=None, help="at most so many test clouds; default: all")
    parser.add_argument("--out", type=Path, default=Path("build/quickstart"), help="folder for adapters and picture")
    parser.add_argument("--compare", action="store_true", help="compare with linear probing and full fine-tuning")
    parser.add_argument("--seeds", type=int, default=1, help="compare with so many seeds")
    args = parser.parse_args(argv)
    if args.seeds != 1 and not args.compare:
        parser.error("--seeds is for --compare")
    data, other = load(args)
    if args.compare:
        compare(data, Recipe(epochs=args.epochs), args.seeds)
    else:
        tour(data, other, Recipe(epochs=args.epochs), args.out)
