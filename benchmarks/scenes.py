"""Ground in an airborne scan: profiles and methods on a small PTv3 that was pre-trained on procedural scenes.

    python -m benchmarks.scenes run                         learning rates by validation, then all seeds; goes on
    python -m benchmarks.scenes run --rows "full,adapter LORA,adapter POINT_PEFT:adapted_share=1.0"
    python -m benchmarks.scenes page                        docs/scenes.md and .json, from what there is

The scan is autzen_trim.laz, split across x: half of the points to train on, a fifth for validation, the rest for the
test, with gaps of 10 feet. It is cut into square columns; a step trains on one of them, turned by right angles and
mirrored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.entries import entry
from benchmarks.accuracy.pool import with_environment, work
from benchmarks.accuracy.results import spread
from benchmarks.marked import write_between
from benchmarks.memory import cost_of
from point_peft import METHODS, PointPeftError, TunerConfig, profiles
from point_peft.data.cloud import Split
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.data.scenes import read_scene
from point_peft.errors import nearest_names, quoted
from tools.methods import table
from tools.pretrain_scenes import turned
from tools.scene_encoder import Cells, cells_of, inputs, load

ROOT = Path(__file__).resolve().parents[1]
SCAN = ROOT.parent / "shared" / "data" / "autzen_trim.laz"
OUT = Path("build/scenes")
PAGE = ROOT / "docs" / "scenes.md"
BEGIN, END = "<!-- from here on written by `python -m benchmarks.scenes page` -->", "<!-- up to here -->"
FEET = 0.3048
OPTIONS = DataOptions(
    kind="scene",
    split_along="x",
    gap=10.0,
    val_share=0.2,
    test_share=0.3,
    tile=100.0,
    classes={"other": [1], "ground": [2]},
    preparation=Preparation(num_points=None),
)
DECODER_WIDTH = 64
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
PROBE = "LINEAR_PROBE"
"""The method that is a profile here."""


@dataclass(frozen=True)
class Row:
    """What is compared: a profile, and the method where it has one, as METHOD or METHOD:field=value;field=value."""

    profile: str
    method: str | None = None

    def __str__(self) -> str:
        return self.profile if self.method is None else f"{self.profile} {self.method}"

    def model(self, example: Cells, seed: int) -> nn.Module:
        """The pre-trained encoder with a head, and with what the profile trains."""
        torch.manual_seed(seed)
        width = DECODER_WIDTH if "decoder" in self.profile else None
        arguments = example.inputs()
        model = profiles.per_point(load(), len(OPTIONS.classes or ()), example_inputs=arguments, decoder_width=width)
        if self.profile.startswith("full"):
            return profiles.full(model)
        if self.method is None:
            return profiles.linear_probe(model) if self.profile == "linear_probe" else profiles.decoder_probe(model)
        make = profiles.adapter if self.profile == "adapter" else profiles.adapter_with_decoder
        (config,) = entry(self.method).configs
        return make(model, TunerConfig.from_json(config), example_inputs=arguments)


def rows(example: Cells) -> tuple[list[Row], dict[str, str]]:
    """All rows, the methods from the registry; and the methods that this encoder refuses, with the reason."""
    adapters, refused = [], {}
    for method in METHODS:
        if method != PROBE and not METHODS[method].adapts_columns:
            try:
                Row("adapter", method).model(example, 0)
                adapters.append(method)
            except PointPeftError as error:
                refused[method] = str(error)
    plain = [Row(name) for name in ("linear_probe", "decoder_probe")]
    ends = [Row("full"), Row("full with decoder")]
    with_decoder = [Row("adapter_with_decoder", method) for method in adapters if method in ("LORA", "POINT_PEFT")]
    return [*plain, *(Row("adapter", method) for method in adapters), *with_decoder, *ends], refused


def row_of(text: str, every: Sequence[Row]) -> Row:
    """The row of that name, or a variant of one; raises `PointPeftError` if there is none."""
    name, *fields = text.split(":")
    for row in every:
        if str(row) == name:
            return Row(row.profile, ":".join([row.method or "", *fields])) if fields else row
    near = nearest_names(name, [str(row) for row in every], what="row")
    raise PointPeftError(f"no row is called {quoted(name)}; nearest: {near}")


# ---- one run ---------------------------------------------------------------------------------------------------------

Piece = tuple[Cells, Tensor]
"""The cells of a piece of the scan, and the label of each of its points."""


def pieces(scan: Path) -> dict[Split, list[Piece]]:
    """The pieces of each split, without those that are too small to be cut into patches."""
    clouds = read_scene([scan], OPTIONS)
    found: dict[Split, list[Piece]] = {"train": [], "val": [], "test": []}
    for piece in clouds.entries:
        cloud = piece.read()
        assert piece.split is not None and cloud.labels is not None
        cells = cells_of(cloud.coordinates * FEET)
        if len(cells.grid) >= 64:
            found[piece.split].append((cells, torch.from_numpy(cloud.labels)))
    return found


def of_points(model: nn.Module, features: Tensor, grid: Tensor, cells: Cells) -> Tensor:
    """Logits (points, classes): every point has those of its cell."""
    batch = torch.zeros(len(grid), dtype=torch.int64)
    logits: Tensor = model(**inputs(features, grid, batch))
    return logits[torch.from_numpy(cells.cell_of)]


def trained(model: nn.Module, train: Sequence[Piece], lr: float, epochs: int, seed: int) -> nn.Module:
    """The model, trained for so many epochs on a cosine schedule with a warm-up."""
    random = np.random.default_rng(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    steps = epochs * len(train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for place in random.permutation(len(train)):
            cells, labels = train[place]
            features, grid = turned(cells, random)
            loss = F.cross_entropy(of_points(model, features, grid, cells), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 3.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def mean_iou(model: nn.Module, held: Sequence[Piece]) -> float:
    """In percent, the mean over the classes, of all points of all pieces together."""
    classes = len(OPTIONS.classes or ())
    confusion = torch.zeros(classes, classes)
    for cells, labels in held:
        answer = of_points(model, cells.features, cells.grid, cells).argmax(dim=1)
        confusion += torch.bincount(labels * classes + answer, minlength=classes**2).view(classes, classes)
    right = confusion.diagonal()
    return 100 * float((right / (confusion.sum(0) + confusion.sum(1) - right)).mean())


def cost(model: nn.Module, piece: Piece) -> dict[str, float]:
    """Memory of a training step, and this process's seconds, by the median of a few; the model is spoilt."""
    cells, labels = piece
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(of_points(model, cells.features, cells.grid, cells), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    peak, seconds = cost_of(step)
    return {"peak_bytes": peak, "seconds": seconds}


@dataclass(frozen=True)
class Run:
    """A training that is to be done, and the split that is measured after it, beside validation."""

    row: Row
    seed: int
    lr: float
    epochs: int
    split: Split

    def __str__(self) -> str:
        return f"{self.row}, {self.split}, seed {self.seed}, lr {self.lr:g}"

    def path(self, out: Path) -> Path:
        """The file of what came of it."""
        return out / f"{str(self.row).replace(' ', '-')}-{self.split}-seed{self.seed}-lr{self.lr:g}.json"

    def do(self, data: dict[Split, list[Piece]]) -> dict[str, Any]:
        """What comes of it, as JSON."""
        model = self.row.model(data["train"][0][0], self.seed)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model = trained(model, data["train"], self.lr, self.epochs, self.seed)
        found = {**vars(self), "row": str(self.row), "trainable": trainable, "val": mean_iou(model, data["val"])}
        if self.split == "test":
            largest = max(data["train"], key=lambda piece: len(piece[1]))
            found |= {"test": mean_iou(model, data["test"]), **cost(model, largest)}
        return found


# ---- all runs --------------------------------------------------------------------------------------------------------


def best_rate(out: Path, row: Row, epochs: int) -> float | None:
    """The rate that is best on validation; None while some are not tried."""
    paths = [Run(row, 0, lr, epochs, "val").path(out) for lr in RATES]
    if not all(path.exists() for path in paths):
        return None
    tried = [json.loads(path.read_text("utf-8")) for path in paths]
    return float(max(tried, key=lambda one: one["val"])["lr"])


def due(out: Path, chosen: Sequence[Row], epochs: int) -> list[Run]:
    """The runs that are not done and can be: rates first, and then all rows with one seed after the other."""
    half = max(1, epochs // 2)
    runs = [Run(row, 0, lr, half, "val") for lr in RATES for row in chosen]
    best = {row: best_rate(out, row, half) for row in chosen}
    runs += [Run(row, seed, lr, epochs, "test") for seed in SEEDS for row, lr in best.items() if lr is not None]
    return [own for own in runs if not own.path(out).exists()]


def do(own: Run, out: Path, data: dict[Split, list[Piece]]) -> None:
    """Do a run and write its file."""
    own.path(out).write_text(json.dumps(own.do(data)) + "\n", "utf-8")


# ---- the page --------------------------------------------------------------------------------------------------------


def lines(found: Sequence[dict[str, Any]], about: dict[str, Any]) -> Iterator[str]:
    """What stands between the marks."""
    tests = [one for one in found if one["split"] == "test"]
    names = list(dict.fromkeys(one["row"] for one in tests))
    own = {name: [one for one in tests if one["row"] == name] for name in names}
    order = sorted(names, key=lambda name: -mean(one["test"] for one in own[name]))
    full = median([one["seconds"] for one in own["full"]]) if "full" in own else float("nan")
    cells = []
    for name in order:
        runs = own[name]
        seconds = median(one["seconds"] for one in runs)
        cells.append(
            [
                name,
                spread([one["test"] for one in runs]),
                f"{mean(one['val'] for one in runs):.1f}",
                f"{runs[0]['trainable']:,}",
                f"{runs[0]['lr']:g}",
                f"{seconds:.2f}",
                f"{seconds / full:.2f}",
                f"{runs[0]['peak_bytes'] / 2**20:.0f}",
            ]
        )
    seeds = sorted({one["seed"] for one in tests})
    yield (
        f"{about['points']} points to train on, validate and test in columns of {OPTIONS.tile:g} feet; seeds "
        f"{', '.join(map(str, seeds))}; {about['epochs']} epochs, the last one counts; the rate of each row is the "
        "best of those below on validation after half of the epochs with seed 0."
    )
    yield ""
    header = ["row", "test mIoU", "val mIoU", "trained", "lr", "step, s", "of full", "memory, MiB"]
    yield from table(cells, header)
    yield from (
        "",
        "Step: seconds of one thread, forward, backward and update on the largest piece, median. Memory: the most",
    )
    yield "that tensors of such a step take at once. Trained: with head and decoder."
    yield from ("", "Rates that were tried, mIoU on validation:", "")
    tried = {(one["row"], one["lr"]): one["val"] for one in found if one["split"] == "val"}
    yield from table(
        [[name, *(f"{tried[name, lr]:.1f}" for lr in RATES)] for name in order], ["row", *(f"{lr:g}" for lr in RATES)]
    )
    yield from ("", "Refused by the library on this encoder:", "")
    yield from (f"- {method}: {reason}" for method, reason in about["refused"].items())


def write_page(out: Path) -> None:
    """Write the page and its record from the runs of a folder."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("*-seed*.json"))]
    about = json.loads((out / "about.json").read_text("utf-8"))
    write_between(PAGE, BEGIN, END, lines(found, about))
    PAGE.with_suffix(".json").write_text(json.dumps({"about": about, "runs": found}, indent=0) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs, or write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--rows", help='divided by commas, as "full,adapter LORA" (default: all)')
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--scan", type=Path, default=SCAN)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    if args.what == "page":
        write_page(args.out)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # spconv's kernels are right on one thread
    data = pieces(args.scan)
    every, refused = rows(data["train"][0][0])
    chosen = every if args.rows is None else [row_of(name.strip(), every) for name in args.rows.split(",")]
    points = ", ".join(f"{sum(len(labels) for _, labels in data[split]):,}" for split in ("train", "val", "test"))
    about = {"points": points, "epochs": args.epochs, "refused": refused}
    (args.out / "about.json").write_text(json.dumps(about) + "\n", "utf-8")
    _, failed = work(
        lambda: due(args.out, chosen, args.epochs),
        partial(do, out=args.out, data=data),
        lambda own: own.path(args.out).with_suffix(".log"),
        workers=args.workers,
        hours=None,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    with_environment("benchmarks.scenes", sys.argv[1:])
    sys.exit(main())
