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
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.entries import entry
from benchmarks.accuracy.pool import ENVIRONMENT, say
from benchmarks.memory import peak_bytes
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
TIMED_STEPS = 5
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
        if method != PROBE:
            try:
                Row("adapter", method).model(example, 0)
                adapters.append(method)
            except (PointPeftError, TypeError) as error:
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

    peak, taken = peak_bytes(step, torch.device("cpu")), []
    for _ in range(TIMED_STEPS):
        start = time.process_time()
        step()
        taken.append(time.process_time() - start)
    return {"peak_bytes": peak, "seconds": median(taken)}


def run(row: Row, seed: int, lr: float, epochs: int, split: Split, data: dict[Split, list[Piece]]) -> dict[str, Any]:
    """What came of one training, as JSON."""
    example = data["train"][0][0]
    model = row.model(example, seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model = trained(model, data["train"], lr, epochs, seed)
    found = {"row": str(row), "seed": seed, "lr": lr, "epochs": epochs, "trainable": trainable, "split": split}
    found |= {"val": mean_iou(model, data["val"])}
    if split == "test":
        found |= {"test": mean_iou(model, data["test"]), **cost(model, max(data["train"], key=lambda own: len(own[1])))}
    return found


# ---- all runs --------------------------------------------------------------------------------------------------------


def path_of(out: Path, row: Row, seed: int, lr: float, split: Split) -> Path:
    """The file of a run."""
    return out / f"{str(row).replace(' ', '-')}-{split}-seed{seed}-lr{lr:g}.json"


def best_rate(out: Path, row: Row) -> float | None:
    """The rate that is best on validation; None while some are not tried."""
    paths = [path_of(out, row, 0, lr, "val") for lr in RATES]
    if not all(path.exists() for path in paths):
        return None
    tried = [json.loads(path.read_text("utf-8")) for path in paths]
    return float(max(tried, key=lambda one: one["val"])["lr"])


Due = tuple[Row, int, float, int, Split]
"""Row, seed, rate, epochs, and the split that is measured: a run that is to be done."""


def due(out: Path, chosen: Sequence[Row], epochs: int) -> Iterator[Due]:
    """The runs that are not done and can be: rates first, and then all rows with one seed after the other."""
    for lr in RATES:
        for row in chosen:
            if not path_of(out, row, 0, lr, "val").exists():
                yield row, 0, lr, max(1, epochs // 2), "val"
    for seed in SEEDS:
        for row in chosen:
            rate = best_rate(out, row)
            if rate is not None and not path_of(out, row, seed, rate, "test").exists():
                yield row, seed, rate, epochs, "test"


def work(out: Path, chosen: Sequence[Row], epochs: int, workers: int, data: dict[Split, list[Piece]]) -> None:
    """Do what is due, each run in a forked process."""
    fork = multiprocessing.get_context("fork")
    busy: dict[Any, Due] = {}
    while True:
        active = [own for process, own in busy.items() if process.is_alive()]
        for process in [process for process in busy if not process.is_alive()]:
            if process.exitcode:
                raise PointPeftError(f"{busy[process]} ended with {process.exitcode}")
            del busy[process]
        waiting = [own for own in due(out, chosen, epochs) if own not in active]
        for own in waiting[: workers - len(active)]:
            process = fork.Process(target=_into_file, args=(out, own, data))
            process.start()
            busy[process] = own
        if not busy:
            return
        wait([process.sentinel for process in busy])


def _into_file(out: Path, own: Due, data: dict[Split, list[Piece]]) -> None:
    row, seed, lr, epochs, split = own
    start = time.monotonic()
    found = run(row, seed, lr, epochs, split, data)
    path = path_of(out, row, seed, lr, split)
    path.write_text(json.dumps(found) + "\n", "utf-8")
    say(f"{path.stem}: val {found['val']:.1f}, {time.monotonic() - start:.0f} s")


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
        spread = f" ± {stdev(one['test'] for one in runs):.1f}" if len(runs) > 1 else ""
        seconds = median(one["seconds"] for one in runs)
        cells.append(
            [
                name,
                f"{mean(one['test'] for one in runs):.1f}{spread}",
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
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    text = "\n".join([BEGIN, "", *lines(found, about), "", END])
    PAGE.write_text(before + text + rest.partition(END)[2], "utf-8")
    PAGE.with_suffix(".json").write_text(json.dumps({"about": about, "runs": found}, indent=0) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--rows", help='divided by commas, as "full,adapter LORA" (default: all)')
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--scan", type=Path, default=SCAN)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    if args.what == "page":
        return write_page(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # spconv's kernels are right on one thread
    data = pieces(args.scan)
    every, refused = rows(data["train"][0][0])
    chosen = every if args.rows is None else [row_of(name.strip(), every) for name in args.rows.split(",")]
    points = ", ".join(f"{sum(len(labels) for _, labels in data[split]):,}" for split in ("train", "val", "test"))
    about = {"points": points, "epochs": args.epochs, "refused": refused}
    (args.out / "about.json").write_text(json.dumps(about) + "\n", "utf-8")
    return work(args.out, chosen, args.epochs, args.workers, data)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.scenes", *sys.argv[1:]], {**os.environ, **ENVIRONMENT}
        )
    main()
