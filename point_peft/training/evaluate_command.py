"""The command evaluate: the figures of a run on clouds, as they are and corrupted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from statistics import fmean

from point_peft.data.corrupting import CORRUPTIONS, SEVERITIES
from point_peft.errors import PointPeftError, nearest_names, quoted
from point_peft.training.objective import monitored
from point_peft.training.opening import Corrupted, clouds_of, open_run
from point_peft.training.progress import in_unit, in_words, say
from point_peft.training.tasks import name_of_data

Figures = Mapping[str, float]
PLAIN = "as they are"


def evaluate(options: argparse.Namespace) -> int:
    """Measure as the command line asks; returns the exit code."""
    kinds = _kinds(options.corruptions)
    run = open_run(options.folder)
    part = clouds_of(run, options.data, options.split, options.skip_bad)
    measured = {PLAIN: run.inference.measure(part)[0]}
    for kind in kinds:
        for severity in SEVERITIES:
            measured[f"{kind} {severity}"] = run.inference.measure(Corrupted(part, kind, severity))[0]
    if options.json:
        say(json.dumps({"split": options.split, "clouds": len(part), "results": measured}, indent=2))
    else:
        name = name_of_data(options.data) if options.data else run.record["name"]
        say(f"{options.folder} on {name} ({options.split}), {len(part):,} clouds")
        say("\n".join(_table(measured, kinds, monitored(run.inference.segmentation))))
    return 0


def _kinds(text: str | None) -> list[str]:
    if text is None:
        return []
    kinds = list(CORRUPTIONS) if text == "all" else [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in CORRUPTIONS:
            near = nearest_names(kind, list(CORRUPTIONS), what="corruption")
            there = ", ".join(CORRUPTIONS)
            raise PointPeftError(f"no corruption is called {quoted(kind)}; nearest: {near}; there are {there}, and all")
    return kinds


def _table(measured: Mapping[str, Figures], kinds: list[str], measure: str) -> Iterator[str]:
    yield f"  {PLAIN}: {in_words(measured[PLAIN])}"
    if not kinds:
        return
    width = max(map(len, kinds))
    yield f"  {measure} by severity of a corruption:"
    yield f"  {'':<{width}} " + "".join(f"{severity:>9}" for severity in [*map(str, SEVERITIES), "mean"])
    means = []
    for kind in kinds:
        values = [measured[f"{kind} {severity}"][measure] for severity in SEVERITIES]
        means.append(fmean(values))
        yield f"  {kind:<{width}} " + "".join(f"{in_unit(measure, value):>9}" for value in [*values, means[-1]])
    if len(kinds) > 1:
        yield f"  {'mean':<{width}} " + f"{in_unit(measure, fmean(means)):>{9 * (len(SEVERITIES) + 1)}}"
