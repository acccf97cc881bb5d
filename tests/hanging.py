"""Guards against a test that would never end. They judge no speed: what they guard takes a fraction of a second."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LONG = 600
"""Seconds after which a thread, a process or an answer never comes, on however busy a machine."""


@contextmanager
def must_end(seconds: float = 60, timer: int = signal.ITIMER_VIRTUAL) -> Iterator[None]:
    """Raise in what is done within once it has taken so much time of the processor, or of the clock (ITIMER_REAL)."""
    number = signal.SIGVTALRM if timer == signal.ITIMER_VIRTUAL else signal.SIGALRM

    def stop(*_: Any) -> None:
        raise AssertionError(f"as good as hung: it did not end in {seconds} seconds")

    before = signal.signal(number, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, before)


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another thread or process brings about; `AssertionError` where it never does."""
    end = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < end, "as good as hung"
        time.sleep(0.0005)
