"""All tasks that are loaded, and their answers for the clouds that were asked for last."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from point_peft.demo.answer import Answer, Refusal, answer_cloud, timed_swap
from point_peft.demo.shown import ShownCloud, noting, read_shown
from point_peft.demo.task import LoadedTask, open_task, unused_name
from point_peft.errors import DataError

HERE = Path(__file__).parent
SHIPPED, SAMPLES = HERE / "shipped", HERE / "samples"
SETS = ("radar", "digits", "ground")
"""The order of the shipped adapters, and of their samples."""
KEPT = 16
"""Clouds whose answers are kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """The answers of all tasks for one cloud."""

    shown: ShownCloud
    of: dict[str, Answer | Refusal]
    """Name of the task -> its answer, in the order of the tasks."""
    notes: tuple[str, ...]
    """Sentences that were said on the way."""
    seconds: float
    """For all tasks, with everything that is shown."""
    swap: float | None
    """Seconds that it takes to make another adapter the active one."""


class Board:
    """The tasks of the page. Adapters of one backbone are in one model, however many there are."""

    def __init__(self) -> None:
        self.tasks: tuple[LoadedTask, ...] = ()
        self.lock = threading.Lock()
        """Forwards are watched by hooks on the model, one at a time."""
        self.known: OrderedDict[tuple[Path, int, tuple[str, ...]], Answers] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """The names of the tasks, in the order in which they were added."""
        return [task.name for task in self.tasks]

    def add(self, source: str) -> LoadedTask:
        """Load an adapter of a folder or of a repository of the Hub; raises `PointPeftError`, and all is as it was."""
        with self.lock:
            name = unused_name(Path(source).name, self.names)
            task = open_task(source, name, self.tasks)
            self.tasks = (*self.tasks, task)
        return task

    def answers(self, path: Path) -> Answers:
        """The answers of all tasks for the cloud of a file, found once; raises `PointPeftError` for a bad one."""
        with self.lock:
            try:
                key = (path, path.stat().st_mtime_ns, tuple(self.names))
            except OSError as error:
                raise DataError(f"{path.name} cannot be read any more: choose or upload a cloud again") from error
            if key not in self.known:
                self.known[key] = self._found(path)
            self.known.move_to_end(key)
            while len(self.known) > KEPT:
                self.known.popitem(last=False)
            return self.known[key]

    def _found(self, path: Path) -> Answers:
        shown = read_shown(path)
        with noting(path) as notes:
            began = time.perf_counter()
            of = answer_cloud(shown, self.tasks)
            seconds = time.perf_counter() - began
        said = tuple(dict.fromkeys((*shown.notes, *notes)))
        return Answers(shown=shown, of=of, notes=said, seconds=seconds, swap=timed_swap(self.tasks))


def shipped_folders() -> list[Path]:
    """The folders of the adapters that come with the package."""
    return [SHIPPED / name for name in SETS]


def sample_files() -> dict[str, Path]:
    """Name -> file of the clouds that come with the package."""
    files = [path for name in SETS for path in sorted(SAMPLES.glob(f"{name}_*"))]
    return {path.stem.replace("_", " "): path for path in files}


def opened_board(sources: Sequence[str]) -> Board:
    """A board with the shipped adapters and these; raises `PointPeftError` for one that cannot be loaded."""
    board = Board()
    for source in [*map(str, shipped_folders()), *sources]:
        board.add(source)
    # The first forward of a process is slow, and is not to be the first that somebody sees.
    board.answers(next(iter(sample_files().values())))
    board.known.clear()
    return board
