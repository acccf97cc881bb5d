"""What an adapter loses that was extracted from a full fine-tuning, by the share of the change that it keeps.

    python -m benchmarks.extraction         trains what is missing in --out, and writes the table of the page

Full fine-tuning as in docs/accuracy.md: the same recipe, clouds and learning rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.entries import FULL, Entry
from benchmarks.accuracy.measuring import answers, classifier_of
from benchmarks.accuracy.pool import with_environment, work
from benchmarks.accuracy.protocol import Protocol
from benchmarks.accuracy.results import spread
from benchmarks.accuracy.sets import FILES, Parts, Sets
from benchmarks.accuracy.stem import Store
from benchmarks.accuracy.trial import run_trained
from benchmarks.marked import write_between
from point_peft import PointPeftModel, extract
from point_peft.training import Recipe
from point_peft.training.folder import MODEL_FILE, write_file
from point_peft.training.report import load_values

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("build/extraction")
PAGE = ROOT / "docs" / "many_adapters.md"
BEGIN, END = "<!-- extraction: written by `python -m benchmarks.extraction` -->", "<!-- extraction: up to here -->"
TASKS = ("digits", "mars")
SEEDS = (0, 1, 2)
WAYS = tuple((on, energy) for on in ("weights", "clouds") for energy in (0.5, 0.7, 0.8, 0.9, 0.99))
"""What a change is weighed by, and the share of it that is kept."""
BATCH = 20
RATE = 1e-3
"""Of full fine-tuning, by validation, in docs/accuracy.md."""
PROTOCOL = Protocol(
    recipe=Recipe(
        epochs=20, keep="last", label_smoothing=0.1, augment=("rotate_small", "stretch"), checkpoint_steps=10**6
    ),
    train_clouds=200,
    val_clouds=300,
    curve_clouds=40,
    test_clouds=400,
    corrupted_clouds=0,
)


@dataclass(frozen=True)
class Job:
    """A full fine-tuning, and what is extracted from it."""

    task: str
    seed: int

    def file(self, out: Path) -> Path:
        """The file of its figures."""
        return out / f"{self.task}-seed{self.seed}.json"

    def __str__(self) -> str:
        return f"{self.task}, seed {self.seed}"


def run(job: Job, sets: Sets, out: Path) -> None:
    """Fine-tune the whole model, extract at each energy, and measure each adapter as it is read from its file."""
    parts, folder = sets.parts(job.task, PROTOCOL, job.seed), job.file(out).with_suffix("")
    classes = len(parts.train.classes)
    recipe = replace(PROTOCOL.recipe, lr=RATE, seed=job.seed)
    stem = Store.read(out / f"{job}.stem.pt")
    if not (folder / MODEL_FILE).exists():
        run_trained(Entry(FULL, FULL), parts, PROTOCOL, recipe, folder, stem, test=False, timed=False, keep=True)
    full = PROTOCOL.plain(classes, job.seed)
    load_values(full, folder)
    points = torch.stack([parts.train[place].points for place in range(len(parts.train))])
    found: dict[str, Any] = {"full": _accuracy(full.eval(), parts, classes), "bytes": _size(folder), "extracted": []}
    for on, energy in WAYS:
        model, extraction = extract(
            PROTOCOL.plain(classes, job.seed),
            full,
            energy=energy,
            example_inputs=points[:2],
            batches=torch.split(points, BATCH) if on == "clouds" else None,
        )
        model.eval()(points[:2])
        place = folder / f"{on}-{energy}"
        model.save_pretrained(place, half=True)
        read = PointPeftModel.from_pretrained(PROTOCOL.plain(classes, job.seed + 100), place, example_inputs=points[:2])
        row = {
            "on": on,
            "energy": energy,
            "accuracy": _accuracy(read.eval(), parts, classes),
            "bytes": _size(place),
            "rank": mean(layer.rank for layer in extraction.layers),
            "whole": list(extraction.whole),
        }
        found["extracted"].append(row)
    write_file(job.file(out), json.dumps(found, indent=1) + "\n")


def _accuracy(model: nn.Module, parts: Parts, classes: int) -> float:
    return answers(classifier_of(model, classes), parts.test).accuracy


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def table(out: Path) -> Iterator[str]:
    """The lines of the page."""
    yield (
        f"Mean ± standard deviation over {len(SEEDS)} seeds. Size: of the adapter's file in half precision "
        "(`half=True`), which is read for the accuracy, over the fine-tuned model's in float32."
    )
    yield ""
    yield "| set | weighed by | energy | full fine-tuning | extracted | less full | size | mean rank |"
    yield "|---|---|---|---|---|---|---|---|"
    for task in TASKS:
        found = [json.loads(Job(task, seed).file(out).read_text("utf-8")) for seed in SEEDS]
        for number, (on, energy) in enumerate(WAYS):
            rows = [one["extracted"][number] for one in found]
            full, own = [one["full"] for one in found], [row["accuracy"] for row in rows]
            less = spread([mine - theirs for mine, theirs in zip(own, full, strict=True)])
            size = mean(row["bytes"] / one["bytes"] for row, one in zip(rows, found, strict=True))
            rank = mean(row["rank"] for row in rows)
            yield f"| {task} | {on} | {energy} | {spread(full)} | {spread(own)} | {less} | {size:.1%} | {rank:.1f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is missing, and write the table."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with_environment("benchmarks.extraction", given)
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    chosen = options.parse_args(given)
    chosen.out.mkdir(parents=True, exist_ok=True)
    sets = Sets(radhar=FILES / "radhar.npz", mars=FILES / "mars.npz")
    for task in TASKS:
        sets.clouds(task)

    def due() -> list[Job]:
        every = [Job(task, seed) for seed in SEEDS for task in TASKS]
        return [job for job in every if not job.file(chosen.out).exists()]

    _, failed = work(
        due,
        lambda job: run(job, sets, chosen.out),
        lambda job: job.file(chosen.out).with_suffix(".log"),
        workers=chosen.workers,
        hours=None,
    )
    if failed:
        return 1
    write_between(PAGE, BEGIN, END, table(chosen.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
