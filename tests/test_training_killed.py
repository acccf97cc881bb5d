"""A training that is killed at any moment is resumed to the same adapter, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from point_peft import PointPEFTConfig
from point_peft.files.format import TENSOR_FILE
from point_peft.training import Run, fit, pictures
from point_peft.training.folder import CHECKPOINT_FILE, METRICS_FILE
from tests.forks import Server
from tests.training import QUICK, adapted, shapes

RECIPE = dataclasses.replace(QUICK, ema=0.9, augment=("scale_translate", "jitter"))


def train(folder: Path, resume: bool) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "confusions", "samples"):
            patch.setattr(pictures, name, lambda *arguments: b"")  # they take longer than the training
        model = adapted(PointPEFTConfig(memory_bank=True, num_prompts=3))
        return fit(model, shapes(10, 1), shapes(6, 2), RECIPE, out=folder, resume=resume)


def training_until(folder: str, change: str) -> Callable[[], None]:
    """Train, and be killed just before the change of that number that is made to the folder."""
    left = [int(change)]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_APPEND)
        if (event in ("os.rename", "os.remove", "os.mkdir") or opened) and str(arguments[0]).startswith(folder):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    def work() -> None:
        sys.addaudithook(watch)
        with open(os.devnull, "w") as sys.stderr:
            train(Path(folder), False)

    return work


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The training that the tests kill."""
    return train(tmp_path_factory.mktemp("whole") / "run", False)


# While the run is begun; around checkpoints within an epoch and at its end; at the end.
@pytest.mark.parametrize("change", [3, 10, 24])
def test_killed_before_a_change_of_the_folder(tmp_path: Path, whole: Run, server: Server, change: int) -> None:
    folder = tmp_path / "run"
    status = server.wait(server.start(training_until, folder, change))
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert TENSOR_FILE not in left or CHECKPOINT_FILE in left
    run = train(folder, True)
    assert (folder / TENSOR_FILE).read_bytes() == (whole.folder / TENSOR_FILE).read_bytes()
    assert (folder / METRICS_FILE).read_text("utf-8") == (whole.folder / METRICS_FILE).read_text("utf-8")
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.folder.iterdir()}
    assert run.results == whole.results
