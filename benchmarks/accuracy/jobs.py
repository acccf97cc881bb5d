"""The runs of each part of a comparison, in an order that is fair wherever it stops: seeds outermost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.accuracy.entries import PROBE, Entry
from benchmarks.accuracy.entries import entry as parsed
from benchmarks.accuracy.protocol import Protocol
from benchmarks.accuracy.rates import GRID, Tried, best_rate, missing_rates, on_validation, over_sets
from benchmarks.accuracy.sets import FEW_SHOT_SETS, PEOPLE, Parts, Sets
from benchmarks.accuracy.stem import Store
from benchmarks.accuracy.trial import run_frozen, run_trained, run_transfer
from point_peft.errors import PointPeftError
from point_peft.training.folder import write_file

RUNS, STEMS = "runs", "stems"
WAYS = (5, 10)
SHOTS_TO_TRANSFER = 10
RADARS = ("radhar", "mars")
RATES, SETS, FEW_SHOT, PEOPLE_OUT, TRANSFER = PARTS = ("rates", "sets", "few_shot", "people", "transfer")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run that is to be done."""

    part: str
    task: str
    """The name of the task, with what is drawn from it: `digits-5x10`, or `radhar-to-mars`."""
    entry: Entry
    seed: int
    lr: float | None
    """None where nothing is trained."""

    def path(self, out: Path) -> Path:
        """The file of what came of it."""
        return path_of(out, self.part, self.task, self.entry.print, self.seed, self.lr)

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets whose clouds it needs."""
        if self.part == TRANSFER:
            return tuple(self.task.split("-to-"))
        if self.part == FEW_SHOT:
            return (self.task.rpartition("-")[0],)
        return (self.task,)

    def source(self, out: Path) -> Path:
        """The folder of the run that a transfer begins with."""
        return replace(self, part=SETS, task=self.sets[0]).path(out).with_suffix("")

    def __str__(self) -> str:
        rate = "" if self.lr is None else f", lr {self.lr:g}"
        return f"{self.part}: {self.entry.label} on {self.task}, seed {self.seed}{rate}"


def path_of(out: Path, part: str, task: str, print_of_entry: str, seed: int, lr: float | None) -> Path:
    """The file of what came of a run."""
    rate = "" if lr is None else f"-lr{lr:g}"
    return out / RUNS / part / task / print_of_entry / f"seed{seed}{rate}.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    part: str
    tasks: Sequence[str]
    entries: Sequence[Entry]
    seeds: Sequence[int]
    out: Path
    lr: float | None = None
    """A learning rate for everything, in place of those that were chosen."""
    grid: Sequence[float] = GRID

    def jobs(self) -> list[Job]:
        """All runs of this part that are known by now; done ones are among them."""
        return list(_KINDS[self.part](self))

    def due(self) -> list[Job]:
        """Those that are not done."""
        return [job for job in self.jobs() if not job.path(self.out).exists()]

    def rate(self, entry: Entry) -> float | None:
        """The learning rate of an entry: the chosen one of its own, else of its method with defaults."""
        if not entry.trains or self.lr is not None:
            return self.lr if entry.trains else None
        tasks = sorted(path.name for path in (self.out / RUNS / RATES).glob("*"))
        for own in (entry, parsed(entry.method)):
            tried = over_sets([found for task in tasks if (found := tried_rates(self.out, task, own))])
            if tried:
                return best_rate(tried)
        raise PointPeftError(f"no learning rate was tried for {entry.label}: --part rates first, or state one by --lr")


def tried_rates(out: Path, task: str, entry: Entry) -> Tried:
    """The rates that were tried for an entry on a set, with what validation says of them."""
    found = {}
    for path in sorted((out / RUNS / RATES / task).glob(f"{entry.print}/*.json")):
        run = json.loads(path.read_text("utf-8"))
        found[run["lr"]] = on_validation(run)
    return found


def _rates(request: Request) -> Iterator[Job]:
    """The rates that were tried and those that are missing, one for each entry on all sets, then the next."""
    columns = []
    for entry in request.entries:
        tried = over_sets([tried_rates(request.out, task, entry) for task in request.tasks])
        lrs = [*tried, *missing_rates(tried, request.grid)] if entry.trains else []
        job = partial(Job, part=RATES, entry=entry, seed=request.seeds[0])
        columns.append([[job(task=task, lr=lr) for task in request.tasks] for lr in lrs])
    yield from (job for row in zip_longest(*columns, fillvalue=()) for jobs in row for job in jobs)


def _sets(request: Request) -> Iterator[Job]:
    yield from _crossed(request, SETS, request.tasks)


def _few_shot(request: Request) -> Iterator[Job]:
    names = [f"{task}-{ways}x10" for task in request.tasks if task in FEW_SHOT_SETS for ways in WAYS]
    yield from _crossed(request, FEW_SHOT, names)


def _people(request: Request) -> Iterator[Job]:
    yield from _crossed(request, PEOPLE_OUT, PEOPLE)


def _transfer(request: Request) -> Iterator[Job]:
    for job in _crossed(request, TRANSFER, [f"{source}-to-{target}" for source, target in (RADARS, RADARS[::-1])]):
        if job.entry.trains and not job.source(request.out).exists():
            raise PointPeftError(f"{job} begins with the same run of --part sets --tasks {job.sets[0]}: do it first")
        if job.entry.trains or job.entry.method == PROBE:
            yield job


def _crossed(request: Request, part: str, tasks: Sequence[str]) -> Iterator[Job]:
    """Seeds, then tasks, then entries."""
    rates = [request.rate(entry) for entry in request.entries]
    for seed in request.seeds:
        for task in tasks:
            for entry, lr in zip(request.entries, rates, strict=True):
                yield Job(part=part, task=task, entry=entry, seed=seed, lr=lr)


_KINDS: Mapping[str, Callable[[Request], Iterator[Job]]] = {
    RATES: _rates,
    SETS: _sets,
    FEW_SHOT: _few_shot,
    PEOPLE_OUT: _people,
    TRANSFER: _transfer,
}


def run_job(job: Job, sets: Sets, protocol: Protocol, out: Path, timed_seed: int) -> None:
    """Do one run, and write its file at the end, at once; those of one seed are timed, as it is the same for all."""
    path = job.path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = parts_of(job, sets, protocol)
    folder = path.with_suffix("")
    own_epochs = {FEW_SHOT: protocol.few_shot_epochs, RATES: protocol.rate_epochs}
    epochs = own_epochs.get(job.part) or protocol.recipe.epochs
    corrupted = protocol.corrupted_clouds if job.part == SETS else 0
    own = replace(protocol, corrupted_clouds=corrupted)
    stem = Store.read(out / STEMS / f"{job.task}-seed{job.seed}.pt")
    if job.part == TRANSFER:
        classes = len(sets.clouds(job.sets[0]).classes)
        found = run_transfer(job.entry, parts, own, job.seed, job.source(out), classes, stem)
    elif job.lr is None:
        model = protocol.model(job.entry, len(parts.train.classes), job.seed)
        found = run_frozen(job.entry, model, parts, corrupted, stem)
    else:
        recipe = replace(protocol.recipe, lr=job.lr, seed=job.seed, epochs=epochs)
        keep = job.part == SETS and job.task in RADARS
        test, timed = job.part != RATES, job.part != RATES and job.seed == timed_seed
        found = run_trained(job.entry, parts, own, recipe, folder, stem, test=test, timed=timed, keep=keep)
    stem.write()
    about: dict[str, Any] = {
        "part": job.part,
        "task": job.task,
        "entry": job.entry.label,
        "method": job.entry.method,
        "configs": list(job.entry.configs),
        "seed": job.seed,
        "lr": job.lr,
        "clouds": [len(part) for part in parts],
    }
    write_file(path, json.dumps({**about, **found}) + "\n")


def parts_of(job: Job, sets: Sets, protocol: Protocol) -> Parts:
    """The clouds of a run."""
    if job.part == FEW_SHOT:
        ways = int(job.task.rpartition("-")[2].split("x")[0])
        return sets.few_shot(job.sets[0], ways, job.seed)
    if job.part != TRANSFER:
        return sets.parts(job.task, protocol, job.seed)
    parts = sets.parts(job.sets[1], replace(protocol, train_clouds=0), job.seed)
    taken: dict[int, int] = {}
    few = []
    for place, entry in enumerate(parts.train.entries):
        label = -1 if entry.label is None else entry.label
        taken[label] = taken.get(label, 0) + 1
        few += [place] if taken[label] <= SHOTS_TO_TRANSFER else []
    return parts._replace(train=parts.train.subset(few))
