"""How fast point_peft trains, infers, swaps and loads, what memory it takes, and how large its files are.

    python -m benchmarks.speed --write                     everything, into docs/ (some minutes on two cores)
    python -m benchmarks.speed --quick                     a tiny backbone, a row a method: a try
    python -m benchmarks.speed --sections methods memory --methods LORA VPT --out build/speed

One process; what is compared takes turns in each round, and counts by its median. The page is printed; `--out` writes
it to a folder (speed.md), with all values (speed.json) and a plot (speed.png). A GPU is used where there is one.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which measures memory, announces itself otherwise

import torch

from benchmarks.page import page
from benchmarks.plot import plot
from benchmarks.results import Measure, Results
from benchmarks.sections import FULL_SETTING, QUICK_SETTING, SECTIONS, STEM, Setting
from tools.methods import machine, rows_of

DOCS = Path(__file__).resolve().parents[1] / "docs"


def measure(setting: Setting, sections: Sequence[str], command: str) -> Results:
    """Run these sections."""
    values: dict[Measure, Sequence[float]] = {}
    for name in sections:
        values.update(SECTIONS[name](setting))
    return Results(about=about(setting, command), values=values)


def about(setting: Setting, command: str) -> Mapping[str, str]:
    """Under what conditions it was measured."""
    bench = setting.bench
    parameters = sum(parameter.numel() for parameter in bench.make().parameters())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("point-peft", "torch")]
    for name in ("peft", "numba"):
        if importlib.util.find_spec(name) is not None:
            versions.append(f"{name} {importlib.metadata.version(name)}")
    chip = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"
    return {
        "command": command,
        "date": str(date.today()),
        "machine": f"{chip}; {os.cpu_count()} cores; {machine()}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "backbone": f"{bench.name}, {parameters / 1e6:.1f} M parameters",
        "input": f"{setting.batch} clouds of {bench.points} points, {setting.groups} tokens each",
        "rounds": f"{setting.rounds} that count, after one that warms up",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the page, write what is asked for."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS], default=[*SECTIONS], help="these only")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="rows of these only; default: all registered")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ..."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny backbone, a row a method: a try, no numbers to quote"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="folder for speed.md, speed.json and speed.png")
    where.add_argument(
        "--write", action="store_true", help="write them to docs/: all sections and methods, on the base"
    )
    options = parser.parse_args(given)
    if options.write and (options.quick or options.methods or set(options.sections) != set(SECTIONS)):
        parser.error("--write is for all of it: leave out --quick, --methods and --sections, or use --out")
    if options.rounds < 1:
        parser.error("--rounds is 1 or more")
    rows = rows_of(options.methods)
    if options.quick:  # one a method, and both of Point-PEFT, which there are targets for
        first = {row.method: row.label for row in reversed(rows)}
        rows = [row for row in rows if row.label in (*first.values(), STEM.label)]
    setting = (QUICK_SETTING if options.quick else FULL_SETTING)(
        rows=rows, rounds=options.rounds, device=torch.device(options.device)
    )
    results = measure(setting, options.sections, f"python -m benchmarks.speed {shlex.join(given)}".strip())
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
