"""Three tasks on one backbone: all of them for one cloud, one for each cloud, or the one that a cloud is for.

    python -m examples.many_tasks

Two tasks are on the lifted digits (which digit; even or odd) and one on shapes, by three methods. The two of which a
routing bank is kept are found without being named.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from examples.shapes import KINDS, shape
from point_peft import (
    BitFitConfig,
    LoraConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftModel,
    RoutingBankConfig,
    get_peft_model,
)
from point_peft.backbones import default_backbone
from point_peft.quickstart.data import Split, load_digits_clouds, take, unit_sphere

HEAD = "cls_head_finetune"  # the backbone's name for it


def shapes(each: int, points: int, seed: int) -> Split:
    """Clouds of each of the shapes, and which of them it is."""
    rng = np.random.default_rng(seed)
    clouds = np.stack([unit_sphere(shape(kind, points, rng)) for kind in KINDS for _ in range(each)])
    return torch.from_numpy(clouds.astype(np.float32)), torch.arange(len(KINDS)).repeat_interleave(each)


def train(model: PointPeftModel, name: str, split: Split, steps: int) -> None:
    """Train one of the adapters, which alone is active and learns, and fill its bank, if it has one."""
    model.freeze_adapter(list(model.adapters))
    model.train_adapter(name)
    points, labels = split
    optimizer = torch.optim.AdamW(model.parameter_groups(3e-3))
    with model.use_adapter(name):
        for _ in range(steps):
            chosen = torch.randint(len(labels), (16,))
            loss = nn.functional.cross_entropy(model.train()(points[chosen]), labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    if name != "parity":
        model.build_memory_bank(torch.split(points, 32), adapter_name=name)
    model.eval()


def main(argv: list[str] | None = None) -> None:
    """Train three tasks, then ask them in three ways; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each task")
    parser.add_argument("--train", type=int, default=400, help="clouds to train each task on")
    parser.add_argument("--test", type=int, default=40, help="clouds of digits, and of shapes, to ask about")
    parser.add_argument("--points", type=int, default=512)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits_clouds(args.points)
    seen, new = take(digits.train, args.train), take(digits.test, args.test)
    seen_shapes = shapes(args.train // len(KINDS), args.points, seed=0)
    new_shapes = shapes(args.test // len(KINDS), args.points, seed=1)

    # One backbone; each adapter brings its method and its head.
    bank = RoutingBankConfig()
    model = get_peft_model(default_backbone(cls_dim=10), PeftConfig(tuners=(PointPEFTConfig(), bank)), "digit")
    heads = {width: {HEAD: default_backbone(cls_dim=width).cls_head_finetune} for width in (2, 4)}
    model.add_adapter("parity", BitFitConfig(), heads=heads[2])
    model.add_adapter("shape", PeftConfig(tuners=(LoraConfig(r=4), bank)), heads=heads[4])
    train(model, "digit", seen, args.steps)
    train(model, "parity", (seen[0], seen[1] % 2), args.steps)
    train(model, "shape", seen_shapes, args.steps)

    with torch.inference_mode():
        # Every task for every cloud: what the frozen backbone computes for all alike is computed once.
        begin = time.perf_counter()
        answers = model.forward_tasks(new[0], ["digit", "parity"])
        seconds = time.perf_counter() - begin
        for name, truth in (("digit", new[1]), ("parity", new[1] % 2)):
            share = 100 * float((answers[name].argmax(dim=1) == truth).float().mean())
            print(f"{name}: {share:.1f} % of {len(truth)} clouds")
        print(f"both in one call: {1000 * seconds / len(new[0]):.0f} ms a cloud")

        # A batch of digits and shapes in any order, an adapter for each.
        order = torch.randperm(len(new[0]) + len(new_shapes[0]))
        points = torch.cat([new[0], new_shapes[0]])[order]
        truth = torch.cat([new[1], new_shapes[1]])[order]
        names = ["digit" if place < len(new[0]) else "shape" for place in order.tolist()]
        mixed = model(points, adapter_names=names)
        hits = sum(int(row.argmax()) == label for row, label in zip(mixed, truth.tolist(), strict=True))
        print(f"digits and shapes in one batch: {100 * hits / len(names):.1f} % right; logits {{10}} and {{4}}")

        # Nobody says which is which: the bank that a cloud is most like, or none.
        chosen, _ = model.route(points)
        found = sum(own == name for own, name in zip(chosen, names, strict=True))
        print(f"routed: {found} of {len(names)} to their own adapter, {sum(own is None for own in chosen)} to none")


if __name__ == "__main__":
    main()
