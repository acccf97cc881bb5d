"""Forgetting, measured by `point_peft.training.compare`: trained on one set, then on another, measured on the first.

    python -m benchmarks.comparing              all seeds, then the section of docs/many_adapters.md; goes on
    python -m benchmarks.comparing --example    two runs of the command line and what the command compare says of them

The sets are scikit-learn's digits lifted to clouds, upright, and others of them lying, as a scanner whose third axis is
up has them; both have the same ten classes. A model is trained on upright digits and then goes on with lying ones: all
of it, or one adapter. Beside that, each of the two sets gets an adapter of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.accuracy.entries import entry
from benchmarks.accuracy.pool import with_environment, work
from benchmarks.accuracy.protocol import Protocol
from benchmarks.accuracy.results import spread
from benchmarks.marked import write_between
from point_peft import PeftConfig, TunerConfig, cli
from point_peft.quickstart.data import load_digits_clouds
from point_peft.training import Comparison, Recipe, compare, fit
from point_peft.training.folder import write_file
from tools.methods import table

OUT = Path("build/comparing")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "many_adapters.md"
BEGIN = "<!-- compare: written by `python -m benchmarks.comparing` -->"
END = "<!-- compare: up to here -->"
RATES = {"FULL": 1e-3, "POINT_PEFT": 3e-3, "LORA": 1e-2}
"""Method -> its learning rate, that of docs/accuracy.md."""
WORDS = {"FULL": "full fine-tuning", "POINT_PEFT": "Point-PEFT", "LORA": "LoRA"}
SEEDS = (0, 1, 2)
TRAIN, TEST, EPOCHS = 100, 150, 10
"""Clouds of each set, and epochs on each."""
POINTS, GROUPS = 256, 16
"""Points of a cloud and tokens of the backbone: few, so that all of it takes minutes."""


class Job(NamedTuple):
    """One method with one seed."""

    method: str
    seed: int

    @property
    def path(self) -> Path:
        """The file of what came out."""
        return OUT / f"{self.method}-{self.seed}.json"


class Digits(NamedTuple):
    """Clouds of one orientation."""

    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]


@cache
def digits(lying: bool, seed: int) -> Digits:
    """The digits upright, or others of them lying; a seed draws the training clouds, the test has the same digits."""
    drawn = load_digits_clouds(POINTS)
    points, labels = drawn.train
    order = np.random.default_rng(seed).permutation(len(labels))
    own = order[TRAIN : 2 * TRAIN] if lying else order[:TRAIN]
    train, test = (points[own], labels[own]), tuple(part[:TEST] for part in drawn.test)
    sets = [TensorDataset(_lying(clouds) if lying else clouds, numbers) for clouds, numbers in (train, test)]
    return Digits(sets[0], sets[1], drawn.class_names)


def _lying(points: Tensor) -> Tensor:
    """Clouds (m, n, 3) turned by a right angle about x."""
    x, y, z = points.unbind(dim=2)
    return torch.stack([x, -z, y], dim=2)


def run_job(job: Job) -> None:
    """Train on both sets in turn, compare, and write down what came out."""
    upright, lying = digits(False, job.seed), digits(True, job.seed)
    model = Protocol(groups=GROUPS).model(entry(job.method), len(upright.classes), job.seed)
    _trained(model, upright, job)
    before = copy.deepcopy(model)
    found: dict[str, Any] = {}
    if job.method != "FULL":
        model = copy.deepcopy(before)
        found |= _own_adapters(model, job, upright, lying)
        model = copy.deepcopy(before)
    _trained(model, lying, job)
    found["forgetting"] = _figures(compare(before, model, upright.test, upright.classes))
    found["second"] = _figures(compare(before, model, lying.test, lying.classes))
    write_file(job.path, json.dumps(found, indent=1) + "\n")


def _own_adapters(model: Any, job: Job, upright: Digits, lying: Digits) -> dict[str, Any]:
    """The comparisons of an adapter for each of two sets, on one backbone; the model has the first of them."""
    (config,) = entry(job.method).configs
    torch.manual_seed(job.seed)
    model.add_adapter("lying", PeftConfig(tuners=(TunerConfig.from_json(config),)))
    model.set_adapter("lying")
    model.freeze_adapter("default")
    _trained(model, lying, job)
    found = {}
    for name, own, order in (
        ("own_upright", upright, ("default", "lying")),
        ("own_lying", lying, ("lying", "default")),
    ):
        compared = compare(model, model, own.test, own.classes, adapters=order, together=True)
        found[name] = _figures(compared)
    return found


def _trained(model: nn.Module, own: Digits, job: Job) -> None:
    """Train what is to be trained of a model, for the epochs of one set; the last one counts."""
    folder = Path(tempfile.mkdtemp())
    recipe = Recipe(epochs=EPOCHS, lr=RATES[job.method], seed=job.seed, keep="last", checkpoint_steps=10**6, augment=())
    fit(model, own.train, None, recipe, out=folder / "run", classes=own.classes)
    shutil.rmtree(folder)


def _figures(found: Comparison) -> dict[str, Any]:
    lead = found.lead
    assert lead is not None
    together = None if found.together is None else found.together.accuracy
    return {
        "a": found.a.accuracy,
        "b": found.b.accuracy,
        "together": together,
        "agreement": found.agreement,
        "error_a": found.a.calibration_error,
        "error_b": found.b.calibration_error,
        "p": lead.p,
    }


def example() -> int:
    """Train LoRA and Point-PEFT on the upright digits by the command line, and compare the two runs."""
    own, folder = digits(False, 0), OUT / "example"
    folder.mkdir(parents=True)
    parts = {"train": own.train.tensors, "test": own.test.tensors}
    points, labels = (np.concatenate([part[i].numpy() for part in parts.values()]) for i in (0, 1))
    split = np.repeat(list(parts), [len(part[1]) for part in parts.values()])
    np.savez(folder / "digits.npz", points=points, labels=labels, split=split, class_names=np.array(own.classes))
    runs = [str(folder / name) for name in ("lora", "point_peft")]
    for out, rate in zip(runs, ("1e-2", "3e-3"), strict=True):
        told = ["--method", Path(out).name, "--lr", rate, "--epochs", "6", "--num-points", str(POINTS)]
        if cli.main(["train", str(folder / "digits.npz"), "--out", out, *told]):
            return 1
    return cli.main(["compare", *runs, "--out", str(folder / "comparison")])


# ---- the page --------------------------------------------------------------------------------------------------------


def page(found: dict[Job, dict[str, Any]]) -> Iterator[str]:
    """The lines of the section."""
    seeds = sorted({job.seed for job in found})
    yield f"Digits of {POINTS} points: {TRAIN} clouds of each set to train on, {EPOCHS} epochs each, and {TEST} of the"
    yield f"test; {GROUPS} tokens of `point-mae-small`; mean ± standard deviation over {len(seeds)} seeds, in percent."
    yield "Learning rates: " + ", ".join(f"{WORDS[method]} {rate:g}" for method, rate in RATES.items()) + "."
    yield from ("", "One model trained on upright digits, A, that then went on with lying ones, B:", "")
    columns = ["", "upright, A", "upright, B", "forgotten", "A and B agree", "calibration error, A", "B", "lying, B"]
    yield from table([_row(method, found) for method in RATES], columns)
    yield from (
        "",
        "An adapter for each set on one backbone, and both active at once, with the head of the set's own:",
        "",
    )
    columns = ["", "upright: its own", "the other's", "both", "lying: its own", "the other's", "both"]
    yield from table([_own_row(method, found) for method in RATES if method != "FULL"], columns)


def _row(method: str, found: dict[Job, dict[str, Any]]) -> list[str]:
    first = [own["forgetting"] for job, own in found.items() if job.method == method]
    lying = [own["second"]["b"] for job, own in found.items() if job.method == method]
    cells = [[own[name] for own in first] for name in ("a", "b")]
    cells.append([own["a"] - own["b"] for own in first])
    cells += [[own[name] for own in first] for name in ("agreement", "error_a", "error_b")]
    return [WORDS[method], *map(spread, [*cells, lying])]


def _own_row(method: str, found: dict[Job, dict[str, Any]]) -> list[str]:
    runs = [own for job, own in found.items() if job.method == method]
    cells = [[own[of][who] for own in runs] for of in ("own_upright", "own_lying") for who in ("a", "b", "together")]
    return [WORDS[method], *map(spread, cells)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, and write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--example", action="store_true", help="only that")
    options = parser.parse_args(argv)
    if options.example:
        return example()
    jobs = [Job(method, seed) for seed in SEEDS for method in RATES]
    OUT.mkdir(parents=True, exist_ok=True)
    _, failed = work(
        lambda: [job for job in jobs if not job.path.exists()],
        run_job,
        lambda job: job.path.with_suffix(".log"),
        workers=options.workers,
        hours=None,
    )
    if failed:
        return 1
    write_between(PAGE, BEGIN, END, page({job: json.loads(job.path.read_text("utf-8")) for job in jobs}))
    return 0


if __name__ == "__main__":
    with_environment("benchmarks.comparing", sys.argv[1:])
    sys.exit(main())
