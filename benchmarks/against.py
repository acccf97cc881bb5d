"""Two checkouts in one run: a process each, which are asked in turn, so that a busy machine slows both alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from benchmarks.page import ratio_of, spelled
from benchmarks.results import Series, Spread
from tools.methods import FULL, PLAIN, table

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("worker.py")
BEFORE, AFTER = "before", "after"


class Worker:
    """A process that has one checkout's package."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.subjects: list[str] = json.loads(self._line())

    def seconds(self, subject: str) -> float:
        """One run of it."""
        assert self.process.stdin is not None
        print(subject, file=self.process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self.process.wait()}; what it said stands above")
        return line


@contextmanager
def working(checkout: Path, sizes: Mapping[str, int], hide: Sequence[str]) -> Iterator[Worker]:
    """A worker for a checkout, ended afterwards; its folder is the first that Python looks for modules in."""
    hidden = f"sys.modules.update(dict.fromkeys({list(hide)}))"  # an import of these fails
    code = f"import runpy, sys; {hidden}; runpy.run_path({str(WORKER)!r}, None, '__main__')"
    command = [sys.executable, "-c", code, json.dumps(sizes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=checkout) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


def compare(checkout: Path, rounds: int, hide: Sequence[str], *, tiny: bool) -> dict[str, dict[str, list[float]]]:
    """Subject -> the seconds of each side, one value a round, after a round that warms up."""
    sizes = {"batch": 4, "points": 2048, "depth": 12, "groups": 128}
    if tiny:
        sizes = {"batch": 2, "points": 64, "depth": 2, "groups": 8}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(working(folder, sizes, hide))
            for name, folder in ((BEFORE, checkout), (AFTER, ROOT))
        }
        took: dict[str, dict[str, list[float]]] = {
            subject: {name: [] for name in sides} for subject in sides[AFTER].subjects
        }
        for number in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
            for subject, of_sides in took.items():
                for name in list(sides)[:: 1 if number % 2 else -1]:
                    value = sides[name].seconds(subject)
                    if number:
                        of_sides[name].append(value)
    return took


def report(took: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Both ranges of every subject, and how one is to the other and each to its own backbone."""
    cells = []
    for subject, sides in took.items():
        base = f"{subject.split(':')[0]}: {FULL if 'training' in subject else PLAIN}"
        cell = [subject, *(spelled(Spread.of(sides[name]), "s") for name in (BEFORE, AFTER))]
        cell.append(ratio_of(Series(values=sides[AFTER], reference=sides[BEFORE])))
        for name in (BEFORE, AFTER):
            cell.append(ratio_of(Series(values=sides[name], reference=took[base][name])))
        cells.append(cell)
    header = ["", BEFORE, AFTER, f"{AFTER}, of {BEFORE}", f"{BEFORE}, of its backbone's", f"{AFTER}, of its backbone's"]
    return "\n".join(table(cells, header))
