"""The comparison as a command: `run` a part of it, write its `page`, or `restore` its runs.

python -m benchmarks.accuracy run --part rates                        learning rates, by validation
python -m benchmarks.accuracy run --part sets --seeds 0-4 --hours 1.5 the same again goes on
python -m benchmarks.accuracy run --part sets --tasks digits,mars --methods "POINT_PEFT,POINT_PEFT:memory_bank=true"
python -m benchmarks.accuracy run --part sets --tasks data --data scans/ --num-points 2048
python -m benchmarks.accuracy page                                    docs/accuracy.md, from what there is
python -m benchmarks.accuracy restore                                 build/accuracy from docs/accuracy.json, to go on
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.accuracy.entries import Entry, all_entries, entries
from benchmarks.accuracy.jobs import FEW_SHOT, PARTS, Request, run_job
from benchmarks.accuracy.page import NAME, write
from benchmarks.accuracy.pool import say, with_environment, work
from benchmarks.accuracy.protocol import Protocol
from benchmarks.accuracy.rates import GRID
from benchmarks.accuracy.results import COMMANDS, Results, collected, restore
from benchmarks.accuracy.sets import FEW_SHOT_SETS, FILES, OWN, SETS, Sets
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.errors import PointPeftError
from point_peft.training.flags import ABSENT, add_flags, given_flags
from point_peft.training.models import SMALL
from point_peft.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("build/accuracy")
FOR_THE_MACHINE = ("--out", "--workers", "--hours")
NOT_CHOSEN = ("task", "lr", "seed", "num_workers", "checkpoint_steps", "patience", "head_lr", "prompt_lr")
"""Fields of the recipe that are not stated for everything."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    run = commands.add_parser("run", help="do the runs of one part that are not done", allow_abbrev=False)
    run.add_argument("--part", choices=PARTS, required=True)
    run.add_argument("--tasks", help=f"divided by commas (default: {','.join(SETS)}, and {OWN} with --data)")
    run.add_argument("--methods", help='as "FULL,LORA,POINT_PEFT:memory_bank=true;prior=stem" (default: all)')
    run.add_argument("--seeds", type=numbers, default=range(5), help="as 0-4 or 0,3 (default: 0-4)")
    run.add_argument(
        "--lr", metavar="VALUE", default=ABSENT, help="one for all (default: each one's own, of --part rates)"
    )
    run.add_argument("--grid", type=rates, default=GRID, help="learning rates that are tried first")
    run.add_argument("--hours", type=float, help="no run begins after so many hours")
    run.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    run.add_argument("--out", type=Path, default=OUT, help=f"folder of the runs, of one protocol (default: {OUT})")
    run.add_argument("--radhar", type=Path, default=FILES / "radhar.npz")
    run.add_argument("--mars", type=Path, default=FILES / "mars.npz")
    run.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"your own set, the task {OWN}; another one needs another --out",
    )
    add_flags(run, Protocol, "protocol", without=("recipe",))
    add_flags(run, Recipe, "recipe", without=NOT_CHOSEN)
    add_flags(run, Preparation, "preparation of your own set")
    add_flags(run, DataOptions, "your own set", without=("preparation", "seed", "task"))
    run.set_defaults(call=run_part)
    page = commands.add_parser("page", help="write docs/accuracy.md, .json and .png from the runs")
    page.add_argument("--out", type=Path, default=OUT, help=f"folder of the runs (default: {OUT})")
    page.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    page.set_defaults(call=write_page)
    again = commands.add_parser("restore", help="put the runs of docs/accuracy.json into a new folder, to go on there")
    again.add_argument("--out", type=Path, default=OUT, help=f"the new folder (default: {OUT})")
    again.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the record")
    again.set_defaults(call=restore_folder)
    return made


def restore_folder(options: argparse.Namespace) -> int:
    """Make a folder of runs from the record beside the page."""
    say(f"{options.out}: {restore(Results.read(options.docs / f'{NAME}.json'), options.out)} runs")
    return 0


def write_page(options: argparse.Namespace) -> int:
    """Write the page; without a folder of runs, from the record beside it."""
    if options.out.exists():
        results, stale = collected(options.out)
    else:
        results, stale = Results.read(options.docs / f"{NAME}.json"), 0
    say(f"{write(results, options.docs, stale)}: {len(results.runs)} runs, {stale} of other defaults left out")
    return 0


def run_part(options: argparse.Namespace) -> int:
    """Do the runs of a part; returns the exit code."""
    torch.set_num_threads(1)
    given = given_flags(options, Recipe)
    recipe = replace(Protocol().recipe, **{name: given[name] for name in given if name not in NOT_CHOSEN})
    protocol = Protocol(**given_flags(options, Protocol), recipe=recipe)
    protocol.claim(options.out)
    _note_command(options.out, options.words)
    preparation = Preparation(**given_flags(options, Preparation))
    data = DataOptions(**given_flags(options, DataOptions), preparation=preparation)
    sets = Sets(radhar=options.radhar, mars=options.mars, own=options.data, options=data)
    request = Request(
        part=options.part,
        tasks=_tasks(options, sets),
        entries=_entries(options.methods, protocol),
        seeds=options.seeds,
        out=options.out,
        lr=given.get("lr"),
        grid=options.grid,
    )
    jobs = request.jobs()
    for name in {
        FEW_SHOT_SETS.get(name, name) if request.part == FEW_SHOT else name for job in jobs for name in job.sets
    }:
        sets.clouds(name)  # read once, and shared by the forked processes
    say(f"{len(request.due())} of {len(jobs)} runs are to do, in {options.out}")
    _warm_up()
    run = partial(run_job, sets=sets, protocol=protocol, out=options.out, timed_seed=options.seeds[0])
    done, failed = work(
        request.due,
        run,
        lambda job: job.path(options.out).with_suffix(".log"),
        workers=options.workers,
        hours=options.hours,
    )
    say(f"{done} runs done, {len(failed)} failed")
    return 1 if failed else 0


def _note_command(out: Path, words: Sequence[str]) -> None:
    """Keep the command, for the page."""
    path, line = out / COMMANDS, f"python -m benchmarks.accuracy {shlex.join(of_runs(words))}"
    if line not in (path.read_text("utf-8").splitlines() if path.exists() else []):
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def of_runs(words: Sequence[str]) -> list[str]:
    """The words of a command that say which runs there are, without those for the machine."""
    kept, value_follows = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if value_follows or name in FOR_THE_MACHINE:
            value_follows = not value_follows and not equals
        else:
            kept.append(word)
    return kept


def _warm_up() -> None:
    """Import what each of the forked processes would import for itself: torch's compiler, which optimizers need."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


def _tasks(options: argparse.Namespace, sets: Sets) -> list[str]:
    if options.tasks is None:
        return [*SETS, *([OWN] if options.data else [])]
    return [sets.check(name.strip()) for name in options.tasks.split(",") if name.strip()]


def _entries(text: str | None, protocol: Protocol) -> list[Entry]:
    if text is not None:
        return entries(text)
    found, refused = all_entries(lambda: protocol.plain(2, 0), small=protocol.backbone == SMALL)
    for label, reason in refused.items():
        say(f"left out: {label}: {reason}")
    return found


def numbers(text: str) -> list[int]:
    """Numbers as 0-4 or 0,3."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def rates(text: str) -> list[float]:
    """Learning rates, divided by commas."""
    return [float(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Do as the command line asks."""
    words = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(words, argparse.Namespace(words=words))
    try:
        code: int = options.call(options)
    except PointPeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    with_environment("benchmarks.accuracy", sys.argv[1:])
    sys.exit(main())
