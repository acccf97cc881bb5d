"""A save that is killed at any moment leaves a complete adapter, the old one or the new, and the next save works."""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from point_peft import LoraConfig, PointPeftModel, VPTConfig
from point_peft.adapting.adapter import get_adapter
from point_peft.files import format as writing_module
from point_peft.files.format import CARD_FILE, CONFIG_FILE, TENSOR_FILE, leftovers, read_folder, write_folder
from tests.adapting import adapt, assert_same_values
from tests.forks import Server
from tests.hanging import until
from tests.zoo import BACKBONES

BACKBONE = BACKBONES["compact"]
NAMES = [CARD_FILE, CONFIG_FILE, TENSOR_FILE]
KILLS = 15
READS = 500


@functools.cache
def models() -> list[PointPeftModel]:
    """Two adapters with other values, other configurations and files of other formats."""
    return [
        adapt(BACKBONE, LoraConfig(r=3, target_modules=["q", "v"]), seed=1),
        adapt(BACKBONE, VPTConfig(num_prompts=3), seed=2),
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("saved") for _ in models()]
    for model, folder in zip(models(), folders, strict=True):
        model.save_pretrained(folder)
    return folders


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def which(folder: Path, saved: list[Path]) -> int:
    """The number of the adapter that a folder holds; it is complete, and read as what it is."""
    found, originals = read_folder(folder), [read_folder(original) for original in saved]
    number = [original.config for original in originals].index(found.config)
    assert_same_values(found.tensors, originals[number].tensors)
    assert found.record == originals[number].record and not found.edited
    model = PointPeftModel.from_pretrained(BACKBONE.build(), folder, example_inputs=BACKBONE.example)
    loaded, written = get_adapter(model, "default"), get_adapter(models()[number], "default")
    assert_same_values(loaded.tensors(), written.tensors())
    assert [tuner.method for tuner in loaded.config.tuners] == [tuner.method for tuner in written.config.tuners]
    return number


# ---- jobs of the other process ---------------------------------------------------------------------------------------


def saving(folder: str) -> Callable[[], None]:
    """Save the one and the other by turns."""
    both = models()

    def work() -> None:
        Path(folder).with_suffix(".begun").touch()
        for model in itertools.cycle(both):
            model.save_pretrained(folder)

    return work


def saving_until(folder: str, number: str, step: str) -> Callable[[], None]:
    """Save an adapter once, and be killed just before the change of that number that it makes to the folder."""
    model, left = models()[int(number)], [int(step)]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir") or (event == "open" and arguments[2] & os.O_CREAT)
        if changes and str(arguments[0]).startswith(folder):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    def work() -> None:
        sys.addaudithook(watch)
        model.save_pretrained(folder)

    return work


def writing(folder: str) -> Callable[[], None]:
    def work() -> None:
        for value in range(10**9):
            write(Path(folder), value)

    return work


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [0, 1])
def test_killed_before_every_change_of_the_folder(saved: list[Path], tmp_path: Path, server: Server, new: int) -> None:
    folder, seen = tmp_path / "adapter", []
    for step in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[1 - new], folder)
        status = server.wait(server.start(saving_until, folder, new, step))
        seen.append(which(folder, saved))
        if status == 0:
            break
        assert status == signal.SIGKILL
        models()[1 - new].save_pretrained(folder)
        assert which(folder, saved) == 1 - new and names(folder) == NAMES
    else:
        raise AssertionError("the save never ended")
    switch = seen.index(new)
    assert seen == [1 - new] * switch + [new] * (len(seen) - switch) and switch >= 5 and len(seen) - switch >= 2


def test_killed_at_random_moments(saved: list[Path], tmp_path: Path, server: Server) -> None:
    folder, choice = tmp_path / "adapter", random.Random(0)
    begun = folder.with_suffix(".begun")
    start = time.monotonic()
    for model in models():
        model.save_pretrained(folder)
    both = time.monotonic() - start
    seen, inside = [], 0
    for number in range(20 * KILLS):
        child = server.start(saving, folder)
        until(begun.exists)
        time.sleep(choice.uniform(0, 4 * both))
        os.kill(child, signal.SIGKILL)
        assert server.wait(child) == signal.SIGKILL
        begun.unlink()
        inside += bool(leftovers(folder))
        seen.append(which(folder, saved))
        # Every other time the next save is by the next child, which may be killed as well.
        if number % 2:
            models()[number // 2 % 2].save_pretrained(folder)
            assert which(folder, saved) == number // 2 % 2 and names(folder) == NAMES
        # Where children are slower than this process, some more have to be killed until one is within a save.
        if number + 1 >= KILLS and set(seen) == {0, 1} and inside:
            break
    print(f"{inside} of {len(seen)} kills left files behind")
    assert set(seen) == {0, 1} and inside


# ---- crashes of a crash's repair -------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone."""


def crash_at(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """The process is gone at the call of that number that changes a folder; nothing is tidied up after it."""
    left = [number]
    names: list[tuple[Any, str]] = [(os, "replace"), (Path, "unlink"), (writing_module, "_write")]
    real: dict[tuple[Any, str], Callable[..., Any]] = {(owner, name): getattr(owner, name) for owner, name in names}

    def watched(name: tuple[Any, str]) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                if left[0] == -1 and name[1] == "_write":
                    arguments[0].write_bytes(arguments[1][: len(arguments[1]) // 2])
                raise Crash
            return real[name](*arguments, **named)

        return call

    for owner, name in real:
        patch.setattr(owner, name, watched((owner, name)))
    return left


def write(folder: Path, value: int) -> None:
    config = {"peft_type": "POINT_PEFT", "format_version": 1, "value": value}
    write_folder(folder, config, {"a": torch.full((3,), float(value))}, lambda existing, size: "card")


def read(folder: Path) -> int:
    found = read_folder(folder)
    value = int(found.config["value"])
    assert torch.equal(found.tensors["a"], torch.full((3,), float(value)))
    return value


def test_two_crashes_wherever_they_come_leave_a_complete_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, number = range(14), 0
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # processes die here, not the machine
    for first in steps:
        for second in steps:
            folder = tmp_path / str(number)
            number += 1
            write(folder, 1)
            (folder / CARD_FILE).unlink()
            expected = {1}
            for value, step in ((2, first), (3, second)):
                with pytest.MonkeyPatch.context() as patch:
                    left = crash_at(patch, step)
                    try:
                        write(folder, value)
                        assert left[0] >= 0
                        expected = {value}
                    except Crash:
                        expected = {*expected, value}
                now = read(folder)
                assert now in expected
                expected = {now}
            write(folder, 4)
            assert read(folder) == 4
            assert names(folder) == ["README.md", CONFIG_FILE, TENSOR_FILE]


# ---- readers beside writers ------------------------------------------------------------------------------------------


def test_a_reader_beside_two_writers_sees_complete_adapters(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "x"
    write(folder, 0)
    writers = [server.start(writing, folder) for _ in range(2)]
    try:
        seen: list[int] = []

        def often_enough() -> bool:
            seen.append(read(folder))
            return len(seen) >= READS and len(set(seen)) > 5

        until(often_enough)
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
