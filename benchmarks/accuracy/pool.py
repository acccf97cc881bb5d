"""Runs in processes of their own, several at a time, until they are done or the time is over."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeVar

J = TypeVar("J")
"""Jobs, which are told apart by being equal, and say in words what they are."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc hands large blocks back to the system otherwise, to ask for them again in the next step.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}


def with_environment(program: str, arguments: Sequence[str]) -> None:
    """Start a module of this checkout again if its process was not started in the environment that the runs need."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        again = [sys.executable, "-m", program, *arguments]
        os.execve(sys.executable, again, {**os.environ, **ENVIRONMENT})


def work(
    due: Callable[[], Sequence[J]],
    run: Callable[[J], None],
    log: Callable[[J], Path],
    *,
    workers: int,
    hours: float | None,
) -> tuple[int, list[J]]:
    """Do what is due, each run in a forked process; returns how many were done, and those that failed.

    No run begins once the hours are over. What is due is asked anew after each run, as it may depend on what came out.
    What a run prints goes to its log, which is kept if it fails.
    """
    fork = multiprocessing.get_context("fork")
    begin, done, spent = time.monotonic(), 0, 0.0
    failed: list[J] = []
    active: dict[Any, tuple[ForkProcess, J, float]] = {}
    while True:
        busy = [job for _, job, _ in active.values()]
        waiting = [job for job in due() if job not in busy and job not in failed]
        over = hours is not None and time.monotonic() - begin >= 3600 * hours
        for job in waiting[: 0 if over else workers - len(active)]:
            process = fork.Process(target=_run, args=(run, job, log(job)))
            process.start()
            active[process.sentinel] = process, job, time.monotonic()
            waiting = waiting[1:]
        if not active:
            if waiting:
                say(f"the time is over; {len(waiting)} runs are left: the same command goes on")
            return done, failed
        for sentinel in wait(list(active)):
            process, job, start = active.pop(sentinel)
            process.join()
            took = time.monotonic() - start
            if process.exitcode:
                failed.append(job)
                say(f"FAILED {job}: {_end_of(log(job))} ({log(job)})")
                continue
            log(job).unlink(missing_ok=True)
            done, spent = done + 1, spent + took
            left = len(waiting) * spent / done / workers / 60
            say(f"{job}: {took:.0f} s; {len(waiting)} runs to begin, about {left:.0f} min")


def _run(run: Callable[[J], None], job: J, log: Path) -> None:
    """The whole of a forked process: what it says, to its last traceback, goes to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.open("w", encoding="utf-8")
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = sys.stderr = file
    run(job)


def _end_of(log: Path) -> str:
    lines = log.read_text("utf-8").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def say(line: str) -> None:
    """Tell how it goes."""
    print(line, flush=True)
