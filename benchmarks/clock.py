"""Seconds: everything that is compared takes its turn in each round, so that a busy machine slows all of it alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from point_peft import PointPeftModel

K = TypeVar("K")
Timed = Callable[[], float]
"""Does something once and gives the seconds that it took, without those of its preparations."""


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """How long a run takes, the mean of so many; kernels that it has started on a GPU have ended."""
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait()
    return (time.perf_counter() - start) / repeats


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(runs: Mapping[K, Timed], rounds: int, what: str = "rounds") -> dict[K, list[float]]:
    """The seconds of each, one value a round.

    A first round does not count: it warms up, and the C library's allocator learns in it how large the blocks are that
    it had better keep.
    """
    took: dict[K, list[float]] = {key: [] for key in runs}
    for number in tqdm(range(rounds + 1), desc=what, leave=False, disable=None):
        for key, run in runs.items():
            value = run()
            if number:
                took[key].append(value)
    return took


@dataclass
class Learner:
    """A model, with its inputs for some clouds and their labels (b,), that it is trained and tried on."""

    model: nn.Module
    inputs: tuple[Any, ...]
    labels: Tensor

    def __post_init__(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def training_step(self) -> float:
        """Seconds of forward, backward and update."""
        self.model.train()
        return seconds(self._step)

    def _step(self) -> None:
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(*self.inputs), self.labels)
        if isinstance(self.model, PointPeftModel):
            loss = loss + self.model.auxiliary_loss()
        torch.autograd.backward(loss)
        self.optimizer.step()

    def inference(self) -> float:
        """Seconds of a forward in eval mode."""
        self.model.eval()
        with torch.no_grad():
            return seconds(lambda: self.model(*self.inputs))
