"""How fast point_peft trains, infers, swaps and loads, what memory it takes, and how large its files are.

    python -m benchmarks.speed --write                     everything, into docs/ (over 14 minutes on two cores)
    python -m benchmarks.speed --quick                     tiny backbones, a row a method: a try
    python -m benchmarks.speed --sections published --out build/speed
    python -m benchmarks.speed --against ../before         beside another checkout, in turns (seven minutes)

What is compared takes turns in each round, after one that warms up. The page is printed; `--out` writes it to a folder
(speed.md), with all values (speed.json) and a plot (speed.png). A GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which measures memory, announces itself otherwise

import torch

from benchmarks.against import compare, report
from benchmarks.bases import described, torch_pointcloud_is_there
from benchmarks.page import page
from benchmarks.plot import plot
from benchmarks.results import Measure, Results, Series
from benchmarks.sections import FULL_SETTING, QUICK_SETTING, SECTIONS, Setting
from benchmarks.tables import HEADLINE
from tools.methods import machine, rows_of

DOCS = Path(__file__).resolve().parents[1] / "docs"


def measure(setting: Setting, sections: Sequence[str], command: str) -> Results:
    """Run these sections."""
    values: dict[Measure, Series] = {}
    for name in sections:
        values.update(SECTIONS[name](setting))
    return Results(about=about(setting, command), values=values)


def about(setting: Setting, command: str) -> Mapping[str, str]:
    """Under what conditions it was measured."""
    packages = ("point-peft", "torch", "torch-pointcloud", "peft", "torch-fps")
    there = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is not None]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in there]
    chip = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"
    published = [setting.published] if torch_pointcloud_is_there() else []
    return {
        "command": command,
        "date": str(date.today()),
        "machine": f"{chip}; {os.cpu_count()} cores; {machine()}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "backbones": described([*published, setting.reference, setting.scene]),
        "input": f"{setting.batch} clouds of {setting.reference.points} points, {setting.groups} tokens each",
        "rounds": f"{setting.rounds} that count; {setting.fewer_rounds} for what has no aim",
    }


def parsed(given: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS], default=[*SECTIONS], help="these only")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="rows of these only; default: all registered")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ..."
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny backbones, a row a method: a try, no numbers to quote"
    )
    parser.add_argument("--hide", nargs="+", default=[], metavar="MODULE", help="with --against: import none of these")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="folder for speed.md, speed.json and speed.png")
    where.add_argument("--write", action="store_true", help="write them to docs/: all sections and methods")
    where.add_argument("--against", type=Path, metavar="CHECKOUT", help="print times beside those of another checkout")
    options = parser.parse_args(given)
    if options.write and (options.quick or options.methods or set(options.sections) != set(SECTIONS)):
        parser.error("--write is for all of it: leave out --quick, --methods and --sections, or use --out")
    if options.rounds < 1:
        parser.error("--rounds is 1 or more")
    if options.against and not (options.against / "point_peft").is_dir():
        parser.error(f"--against: no package point_peft in {options.against}")
    return options


def chosen(options: argparse.Namespace) -> Setting:
    """What to measure."""
    rows = rows_of(options.methods)
    if options.quick:  # one a method, and what there are aims for
        first = {row.method: row.label for row in reversed(rows)}
        rows = [row for row in rows if row.label in first.values() or row in HEADLINE[:2]]
    return (QUICK_SETTING if options.quick else FULL_SETTING)(
        headline=[row for row in HEADLINE if row in rows],
        further=[row for row in rows if row not in HEADLINE],
        rounds=options.rounds,
        device=torch.device(options.device),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the page, write what is asked for."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = parsed(given)
    if options.against:
        took = compare(options.against.resolve(), options.rounds, options.hide, tiny=options.quick)
        print(report(took))
        return 0
    results = measure(chosen(options), options.sections, f"python -m benchmarks.speed {shlex.join(given)}".strip())
    text = page(results, "speed.png")
    folder = DOCS if options.write else options.out
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "speed.json").write_text(results.to_json(), encoding="utf-8")
        (folder / "speed.md").write_text(text, encoding="utf-8")
        plot(results, folder / "speed.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
