"""All runs of a folder as one compact record, which is kept beside the page."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.accuracy.entries import entry
from benchmarks.accuracy.jobs import RATES, RUNS, path_of
from benchmarks.accuracy.measuring import unpacked
from benchmarks.accuracy.protocol import FILE
from benchmarks.accuracy.rates import Tried, best_rate, on_validation, over_sets
from benchmarks.accuracy.statistics import Difference, paired_difference, slope
from point_peft.errors import PointPeftError
from point_peft.training.folder import write_file

KEPT = (
    *("part", "task", "entry", "seed", "lr", "clouds", "accuracy", "validated", "ece", "right", "count"),
    *("corrupted", "uncorrupted", "trainable", "trainable_without_head", "file_bytes", "seconds_an_epoch"),
    *("peak_bytes_of_a_step", "slope", "chosen"),
)
"""What the record has of each run."""
COMMANDS = "commands.txt"
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The runs of a comparison."""

    about: Mapping[str, Any]
    runs: Sequence[Run]
    rates: Sequence[Run]
    """Learning rates that were tried: task, entry, tried {rate: [accuracy, less loss]}."""

    def to_json(self) -> str:
        """The record, a line for each run."""
        lists = {"runs": self.runs, "rates": self.rates}
        body = ",\n".join(f'"{k}": [\n' + ",\n".join(json.dumps(run) for run in v) + "\n]" for k, v in lists.items())
        return f'{{"about": {json.dumps(self.about)},\n{body}}}\n'

    @staticmethod
    def read(path: Path) -> Results:
        """The record of a file."""
        return Results(**json.loads(path.read_text("utf-8")))

    def tasks(self, part: str) -> list[str]:
        """The tasks of a part."""
        return sorted({run["task"] for run in self.runs if run["part"] == part})

    def of(self, part: str, task: str) -> dict[str, dict[int, Run]]:
        """Entry -> seed -> run."""
        found: dict[str, dict[int, Run]] = defaultdict(dict)
        for run in self.runs:
            if (run["part"], run["task"]) == (part, task):
                found[run["entry"]][run["seed"]] = run
        return dict(found)

    def tried(self, task: str) -> dict[str, Tried]:
        """Entry -> the rates that were tried for it on a set."""
        return {
            one["entry"]: {float(rate): (pair[0], pair[1]) for rate, pair in one["tried"].items()}
            for one in self.rates
            if one["task"] == task
        }

    def chosen(self, entry: str) -> Tried:
        """The rates that were tried for an entry, over all sets; none where none were."""
        return over_sets([own[entry] for task in self.rate_tasks() if entry in (own := self.tried(task))])

    def rate_tasks(self) -> list[str]:
        """The sets on which rates were tried."""
        return sorted({one["task"] for one in self.rates})


def collected(out: Path) -> tuple[Results, int]:
    """The record of a folder of runs, and how many were left out, as their method's defaults are others by now."""
    runs, stale = [], 0
    for path in sorted((out / RUNS).glob("*/*/*/*.json")):
        run = json.loads(path.read_text("utf-8"))
        if path.parent.name == _print_of(run["entry"]):
            runs.append(run)
        else:
            stale += 1
    tried: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(dict)
    for run in runs:
        if run["part"] == RATES:
            tried[run["task"], run["entry"]][f"{run['lr']:g}"] = list(on_validation(run))
    rates = [{"task": task, "entry": name, "tried": own} for (task, name), own in tried.items()]
    commands = out / COMMANDS
    about = {
        "protocol": json.loads((out / FILE).read_text("utf-8")),
        "commands": commands.read_text("utf-8").splitlines() if commands.exists() else [],
        "prints": {label: _print_of(label) for label in sorted({run["entry"] for run in runs})},
    }
    whole = Results(about=about, runs=[], rates=rates)
    kept = [compact(run) for run in _of_one_rate([run for run in runs if run["part"] != RATES], whole)]
    return Results(about=about, runs=kept, rates=rates), stale


def restore(results: Results, out: Path) -> int:
    """Put the runs of a record into an empty folder, where they count as done; returns how many there are.

    What a transfer begins with, the trained values, is in no record. Raises `PointPeftError` if the folder has runs.
    """
    if (out / RUNS).exists():
        raise PointPeftError(f"{out} holds runs: name a folder without, by --out")
    tried = [
        {"part": RATES, "task": one["task"], "entry": one["entry"], "seed": 0, "lr": float(rate)}
        | {"validated": accuracy, "validated_loss": -less_loss}
        for one in results.rates
        for rate, (accuracy, less_loss) in one["tried"].items()
    ]
    restored = [*tried, *({"lr": None, **run} for run in results.runs)]
    for run in restored:
        # Under the name that it had: if defaults are others by now, it is left out as any run of the old ones.
        own = results.about["prints"][run["entry"]]
        path = path_of(out, run["part"], run["task"], own, run["seed"], run["lr"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(run) + "\n")
    write_file(out / FILE, json.dumps(results.about["protocol"], indent=1) + "\n")
    write_file(out / COMMANDS, "".join(f"{line}\n" for line in results.about["commands"]))
    return len(restored)


@cache
def _print_of(label: str) -> str | None:
    """The name in files of what a label means by now; None if it means nothing any more."""
    try:
        return entry(label).print
    except PointPeftError:
        return None


def compact(run: Run) -> Run:
    """What is kept of a run, in few digits."""
    whole = {"slope": slope(run.get("val", ())), **run}  # a run of a record has its slope, and no curve
    return {name: _rounded(whole[name]) for name in KEPT if whole.get(name) is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return {name: _rounded(one) for name, one in value.items()} if isinstance(value, dict) else value


def _of_one_rate(runs: Sequence[Run], results: Results) -> list[Run]:
    """The runs of one learning rate for each entry on each task: the chosen one, else that of most runs."""
    counts: dict[tuple[str, ...], Counter[float]] = defaultdict(Counter)
    for run in runs:
        counts[run["part"], run["task"], run["entry"]][run["lr"]] += 1
    chosen = {}
    for key, own in counts.items():
        tried = results.chosen(key[2])
        best = best_rate(tried) if tried else None
        chosen[key] = best if best in own else max(own, key=lambda rate: own[rate])
    return [run for run in runs if run["lr"] == chosen[run["part"], run["task"], run["entry"]]]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return "-"
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{around}"


def answers_of(runs: Mapping[int, Run], seeds: Sequence[int]) -> npt.NDArray[np.bool_]:
    """The answers (seeds, clouds) of an entry that were right."""
    return np.stack([unpacked(runs[seed]["right"], runs[seed]["count"]) for seed in seeds])


def difference(runs: Mapping[int, Run], other: Mapping[int, Run], *, same_clouds: bool = True) -> Difference | None:
    """One entry less another, over the seeds that both have; None if they have none."""
    seeds = sorted(set(runs) & set(other))
    if not seeds:
        return None
    return paired_difference(answers_of(runs, seeds), answers_of(other, seeds), same_clouds=same_clouds)


def told(found: Difference | None) -> str:
    """A difference in words: -1.2 [-2.3, -0.1] worse."""
    if found is None:
        return "-"
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}] {found.verdict}".strip()
