"""Progress of a training as people expect it: a bar on a terminal, elsewhere a line an epoch; one process tells."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

WARM = 10
"""Steps after which it is said how long an epoch takes: the first ones are slow."""


class Progress:
    """The bar, or the lines, of one training on one process."""

    def __init__(self, steps: int, per_epoch: int, shown: bool, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.shown = shown
        self.steps, self.per_epoch, self.done = steps, per_epoch, 0
        self.validation = ""
        self.begin = time.monotonic()
        self.first = self.clouds = 0
        self.bar: tqdm[None] | None = None

    def start(self, step: int) -> None:
        """Begin to count at this step."""
        self.first = self.done = step
        self.begin = time.monotonic()
        if self.shown and self.stream.isatty():
            self.bar = tqdm(total=self.steps, initial=step, file=self.stream, unit="step", dynamic_ncols=True)

    def say(self, line: str) -> None:
        """Write a line, above the bar where there is one."""
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            self.stream.write(line + "\n")
            self.stream.flush()

    def step(self, loss: float, clouds: int) -> None:
        """Count one step with its loss and the number of its clouds."""
        self.done += 1
        self.clouds += clouds
        taken = self.done - self.first
        if taken == WARM and self.per_epoch > WARM:
            self.say(f"an epoch takes about {duration(self.per_epoch * (time.monotonic() - self.begin) / WARM)}")
        if self.bar is not None:
            epoch = (self.done - 1) // self.per_epoch + 1
            self.bar.set_description(f"epoch {epoch}/{self.steps // self.per_epoch}", refresh=False)
            self.bar.set_postfix_str(
                f"loss {loss:.3f}{self.validation}, {self.clouds_per_second():.0f} clouds/s", refresh=False
            )
            self.bar.update()

    def epoch(self, number: int, loss: float, val: Mapping[str, float]) -> None:
        """Say how an epoch went; on a terminal the bar shows it."""
        self.validation = f", validation {in_words(val)}" if val else ""
        left = (self.steps - self.done) * (time.monotonic() - self.begin) / max(self.done - self.first, 1)
        if self.bar is None:
            rest = f", {duration(left)} left" if self.done < self.steps else ""
            self.say(
                f"epoch {number}/{self.steps // self.per_epoch}: loss {loss:.3f}{self.validation}, "
                f"{self.clouds_per_second():.0f} clouds/s{rest}"
            )

    def clouds_per_second(self) -> float:
        """Training clouds of all processes, validation's time included."""
        return self.clouds / max(time.monotonic() - self.begin, 1e-9)

    def close(self) -> None:
        """Take the bar off."""
        if self.bar is not None:
            self.bar.close()


def say(text: str) -> None:
    """Write a result, on the standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """A time in words: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def in_words(figures: Mapping[str, float]) -> str:
    """Figures on one line: loss 0.512, accuracy 81.2 %."""
    return ", ".join(f"{name} {in_unit(name, value)}" for name, value in figures.items())


def in_unit(name: str, value: float) -> str:
    """A figure in its unit: a loss has none, all else are percent."""
    return f"{value:.3f}" if name == "loss" else f"{value:.1f} %"
