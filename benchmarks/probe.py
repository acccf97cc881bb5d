"""Frozen features of pre-trained backbones beside each other: a converged probe, and retrieval, which trains nothing.

    python -m benchmarks.probe point_peft/backbones/point_mae_small.safetensors OTHER.safetensors --groups 32,64

A file is one that `tools.pretrain` writes, with its constructor's arguments as json beside it. Training, validation and
test clouds are all that the three sets of `benchmarks.accuracy` have: digits, radhar and mars; and the mean over the
four persons of mars, each left out once, as one person alone is a small sample of people.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy.frozen import converged_probe, retrieval
from benchmarks.accuracy.measuring import answers
from benchmarks.accuracy.protocol import Protocol
from benchmarks.accuracy.sets import FILES, PEOPLE, SETS, Parts, Sets
from point_peft.backbones import PointTransformer, load_checkpoint
from tools.methods import table

HEAD = "cls_head_finetune"


def backbone(path: Path, groups: int) -> PointTransformer:
    """The backbone of a file, with so many groups; a class token that it lacks is zero."""
    arguments = json.loads(path.with_suffix(".json").read_text("utf-8"))
    model = PointTransformer(**{**arguments, "num_group": groups})
    for name in ("cls_token", "cls_pos"):
        nn.init.zeros_(model.get_parameter(name))
    load_checkpoint(model, path)
    return model.requires_grad_(False).eval()


def accuracies(model: nn.Module, parts: Parts) -> tuple[float, float]:
    """Test accuracy in percent of the converged probe and of retrieval."""
    classes = len(parts.train.classes)
    probe, _ = converged_probe(model, HEAD, parts.train, parts.val, classes)
    near = retrieval(model, HEAD, parts.train, classes)
    return answers(probe, parts.test).accuracy, answers(near, parts.test).accuracy


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each file and number of groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--groups", default="64", help="numbers of groups, divided by commas (default: 64)")
    parser.add_argument("--radhar", type=Path, default=FILES / "radhar.npz")
    parser.add_argument("--mars", type=Path, default=FILES / "mars.npz")
    args = parser.parse_args(argv)
    sets = Sets(radhar=args.radhar, mars=args.mars)
    every = Protocol(train_clouds=0, val_clouds=0, test_clouds=0)
    cells = []
    for path in args.files:
        for groups in map(int, args.groups.split(",")):
            model = backbone(path, groups)
            found = {task: accuracies(model, sets.parts(task, every, 0)) for task in (*SETS, *PEOPLE)}
            people = np.mean([found[person] for person in PEOPLE], axis=0)
            pairs = [*(found[task] for task in SETS), people]
            cells.append([path.stem, str(groups), *(f"{probe:.1f} / {near:.1f}" for probe, near in pairs)])
            print(f"{path}, {groups} groups: done", flush=True)
    print("\n".join(["", *table(cells, ["probe / retrieval", "groups", *SETS, "mars, each person once"])]))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
