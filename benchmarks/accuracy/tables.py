"""The tables of the page, each from nothing but the record."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, median

from benchmarks.accuracy.entries import FULL, PROBE
from benchmarks.accuracy.jobs import FEW_SHOT, PEOPLE_OUT, SETS, TRANSFER
from benchmarks.accuracy.rates import best_rate, on_edge
from benchmarks.accuracy.results import Results, Run, difference, spread, told
from point_peft.data.corrupting import CORRUPTIONS
from tools.methods import table

FLAGSHIP = "POINT_PEFT"
Runs = Mapping[str, Mapping[int, Run]]
Lines = list[str]


def by_accuracy(runs: Runs) -> list[str]:
    """The entries, the best first."""
    return sorted(runs, key=lambda name: -fmean(run["accuracy"] for run in runs[name].values()))


def values(runs: Mapping[int, Run], name: str) -> list[float]:
    """A figure of an entry, seed by seed, where it has it."""
    return [run[name] for _, run in sorted(runs.items()) if name in run]


def of_set(results: Results, task: str) -> Lines:
    """One set: accuracy, differences, sizes and times."""
    runs = results.of(SETS, task)
    full, flagship = runs.get(FULL, {}), runs.get(FLAGSHIP, {})
    cells = []
    for name in by_accuracy(runs):
        own = runs[name]
        cells.append(
            [
                name,
                spread(values(own, "accuracy")),
                "" if name == FULL else told(difference(own, full)),
                "" if name == FLAGSHIP else told(difference(own, flagship)),
                _number(values(own, "trainable_without_head")),
                _number(values(own, "trainable")),
                _scaled(values(own, "file_bytes"), 1e-6, 2),
                ratio(own, full),
                _scaled(values(own, "peak_bytes_of_a_step"), 2**-20, 0),
            ]
        )
    header = ["", "accuracy", f"less {FULL}", f"less {FLAGSHIP}", "trained", "with head"]
    return table(cells, [*header, "file, MB", f"time / {FULL}", "memory, MiB"])


def ratio(runs: Mapping[int, Run], full: Mapping[int, Run]) -> str:
    """Seconds of training an epoch, of those of full fine-tuning with the same seed; the median over the seeds."""
    name = "seconds_an_epoch"
    own = [runs[seed][name] / full[seed][name] for seed in runs if name in runs[seed] and name in full.get(seed, {})]
    return f"{median(own):.2f}" if own else "-"


def _number(given: Sequence[float]) -> str:
    return f"{given[0]:,.0f}" if given else "-"


def _scaled(given: Sequence[float], factor: float, digits: int) -> str:
    return f"{factor * median(given):.{digits}f}" if given else "-"


def over_tasks(results: Results, part: str, cell: Callable[[Mapping[int, Run]], str]) -> Lines:
    """A cell for each entry and task of a part."""
    tasks = results.tasks(part)
    columns = {task: results.of(part, task) for task in tasks}
    return table(
        [[name, *(cell(columns[task].get(name, {})) for task in tasks)] for name in names_of(columns)], ["", *tasks]
    )


def names_of(columns: Mapping[str, Runs]) -> list[str]:
    """All entries of some tasks, in the order in which they first come."""
    return list(dict.fromkeys(name for runs in columns.values() for name in runs))


def calibration(results: Results) -> Lines:
    """The expected calibration error of each entry on each set."""
    return over_tasks(results, SETS, lambda runs: spread(values(runs, "ece")))


def flatness(results: Results) -> Lines:
    """The rise of validation at the end."""

    def cell(runs: Mapping[int, Run]) -> str:
        rises = values(runs, "slope")
        return f"{fmean(rises):+.1f}" if rises else "-"

    return over_tasks(results, SETS, cell)


def rates(results: Results) -> Lines:
    """Every learning rate that was tried, with the accuracy on validation; the chosen one bold, ! on the edge."""
    tasks = results.rate_tasks()
    of_tasks = [results.tried(task) for task in tasks]
    cells = []
    for name in sorted({one["entry"] for one in results.rates}):
        whole = results.chosen(name)
        best = best_rate(whole) if whole else None
        row = [name]
        for own in (whole, *(tried.get(name, {}) for tried in of_tasks)):
            words = [f"{rate:g}: {own[rate][0]:.1f}" for rate in sorted(own)]
            row.append(", ".join(f"**{w}**" if r == best else w for w, r in zip(words, sorted(own), strict=True)))
        row[1] += " !" if whole and on_edge(whole) else ""
        cells.append(row)
    return table(cells, ["", "mean over the sets", *tasks])


def robustness(results: Results, task: str) -> Lines:
    """Accuracy under each corruption at three strengths, means over the seeds, and how much is lost on the whole."""
    runs = results.of(SETS, task)
    cells = []
    for name in by_accuracy(runs):
        own = [run for run in runs[name].values() if "corrupted" in run]
        if own:
            plain = fmean(run["uncorrupted"] for run in own)
            means = {
                kind: [fmean(column) for column in zip(*(run["corrupted"][kind] for run in own), strict=True)]
                for kind in CORRUPTIONS
            }
            whole = fmean(fmean(three) for three in means.values())
            words = [" / ".join(f"{value:.0f}" for value in means[kind]) for kind in CORRUPTIONS]
            cells.append([name, f"{plain:.1f}", *words, f"{whole:.1f}", f"{whole - plain:+.1f}"])
    return table(cells, ["", "as they are", *CORRUPTIONS, "mean", "change"]) if cells else []


def few_shot(results: Results) -> Lines:
    """Mean ± standard deviation over the episodes, and less full fine-tuning; each episode has its own test clouds."""
    return compared(results, FEW_SHOT, FULL, same_clouds=False)


def people(results: Results) -> Lines:
    """Each person left out, and less full fine-tuning."""
    return compared(results, PEOPLE_OUT, FULL)


def transfer(results: Results) -> Lines:
    """A converged probe on the adapted features, and less that on the features as they were."""
    return compared(results, TRANSFER, PROBE)


def variants(results: Results) -> dict[str, Lines]:
    """Method -> its variants beside its defaults, of those that no other table compares so."""
    known = names_of({task: results.of(SETS, task) for task in results.tasks(SETS)})
    methods = {name.partition(":")[0] for name in known if ":" in name} & set(known)
    return {
        method: compared(results, SETS, method, only=re.compile(rf"{method}(:.*)?").fullmatch)
        for method in sorted(methods - {FLAGSHIP})
    }


def compared(
    results: Results, part: str, reference: str, *, same_clouds: bool = True, only: Callable[[str], object] = bool
) -> Lines:
    """Accuracy and the difference from a reference, for each task of a part, of all entries or some."""
    tasks = results.tasks(part)
    columns = {task: results.of(part, task) for task in tasks}

    def row(name: str) -> Iterator[str]:
        yield name
        for task in tasks:
            own, other = columns[task].get(name, {}), columns[task].get(reference, {})
            yield spread(values(own, "accuracy"))
            yield "" if name == reference else told(difference(own, other, same_clouds=same_clouds))

    header = [text for task in tasks for text in (task, f"less {reference}")]
    return table([list(row(name)) for name in names_of(columns) if only(name)], ["", *header])
