"""Many threads on one model, each with its own adapters, while others are loaded and deleted: no wrong output.

In the suite some hundred forwards; POINT_PEFT_FORWARDS=10000 in the environment asks for more.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
from pathlib import Path

import pytest
from torch import Tensor

from point_peft import PointPeftModel
from tests.adapting import METHOD_NAMES, adapt, add, distance, in_threads, run
from tests.zoo import BACKBONES

FORWARDS = int(os.environ.get("POINT_PEFT_FORWARDS", "160"))
THREADS = 8
BACKBONE = BACKBONES["point_mae"]
SETS: list[tuple[str, ...]] = [(), *((method,) for method in METHOD_NAMES), ("LORA", "IDPT"), ("SSF", "POINT_PEFT")]
CLOUDS = [BACKBONE.inputs(1, seed) for seed in (5, 6)]


@pytest.fixture(scope="module")
def crowd() -> tuple[PointPeftModel, dict[tuple[tuple[str, ...], int], Tensor]]:
    """One model with an adapter of every method, and what each of `SETS` makes of each of the clouds."""
    first, *others = METHOD_NAMES
    model = adapt(BACKBONE, first, adapter_name=first)
    for number, method in enumerate(others):
        add(model, BACKBONE, method, method, seed=number + 1)
    expected = {}
    for names, cloud in itertools.product(SETS, range(len(CLOUDS))):
        with model.use_adapter(names):
            expected[names, cloud] = run(model, BACKBONE, CLOUDS[cloud])
    return model, expected


def test_no_output_is_another_adapters(
    crowd: tuple[PointPeftModel, dict[tuple[tuple[str, ...], int], Tensor]], tmp_path: Path
) -> None:
    model, expected = crowd
    for (key, one), (other, two) in itertools.combinations(expected.items(), 2):
        assert distance(one, two) > 1e-4, (key, other)
    model.save_pretrained(tmp_path, "LORA")
    wrong: list[str] = []
    answered = [0] * THREADS

    def serve(thread: int) -> None:
        draw = random.Random(thread)
        for _ in range(FORWARDS // THREADS):
            names, cloud = draw.choice(SETS), draw.randrange(len(CLOUDS))
            how = draw.choice(["use", "set", "within"])
            if how == "set":
                model.set_adapter(names)
                output = run(model, BACKBONE, CLOUDS[cloud])
            elif how == "use":
                with model.use_adapter(names):
                    output = run(model, BACKBONE, CLOUDS[cloud])
            else:
                with model.use_adapter(draw.choice(SETS)), model.disable_adapter(), model.use_adapter(names):
                    output = run(model, BACKBONE, CLOUDS[cloud])
            # Threads may round otherwise.
            if distance(output, expected[names, cloud]) > 1e-5:
                wrong.append(f"thread {thread}: {names} on cloud {cloud} by {how}")
            answered[thread] += 1

    def change() -> None:
        for _ in range(max(10, FORWARDS // 100)):
            model.load_adapter(tmp_path, "passing")
            model.swap_adapter_(tmp_path, "passing")
            model.delete_adapter("passing")

    in_threads([*(functools.partial(serve, thread) for thread in range(THREADS)), change])
    assert not wrong, wrong[:5]
    assert sum(answered) == FORWARDS
