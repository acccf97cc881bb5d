"""Trainings in two processes, and what one process makes of the same: for `tests/test_processes.py`, which starts them.

All methods are trained, in as few adapters as can be, on batches that two processes cannot share evenly.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from point_peft import PeftConfig, PointPEFTConfig, PointPeftModel, TunerConfig
from point_peft.files.format import TENSOR_FILE
from point_peft.training import Run, fit, pictures
from tests.adapting import METHOD_NAMES
from tests.methods import config
from tests.training import QUICK, Interrupted, adapted, backbone, losses, shapes

RECIPE = dataclasses.replace(QUICK, epochs=1, batch_size=8, lr=1e-3, ema=0.5, label_smoothing=0.1, checkpoint_steps=1)
TRAIN, VAL, ODD = shapes(13, 1), shapes(5, 2), shapes(1, 3)
"""Batches of 7 and 6 clouds; of 5; and of one, of which the second process has none."""
GROUPS: dict[str, TunerConfig | PeftConfig] = {
    f"methods {first}": PeftConfig(tuners=tuple(map(config, METHOD_NAMES[first::2]))) for first in range(2)
}
CASES: dict[str, TunerConfig | PeftConfig | None] = {
    **GROUPS,
    "no bank": PointPEFTConfig(memory_bank=True, num_prompts=3),
    "plain": None,
}


def _train(
    folder: Path, case: str, clouds: Dataset[Any] = TRAIN, shard: Callable[[PointPeftModel], None] | None = None
) -> Run:
    how = CASES[case]
    model: nn.Module = backbone() if how is None else adapted(how, head_norm=True)
    if shard is not None:
        assert isinstance(model, PointPeftModel)
        shard(model)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the memory bank is empty")
        for name in ("curves", "confusions", "samples"):
            patch.setattr(pictures, name, lambda *arguments: b"")
        recipe = dataclasses.replace(RECIPE, memory_bank=case != "no bank")
        return fit(model, clouds, VAL, recipe, out=folder, test=ODD, resume=True, classes="012")


def train_all(folder: Path, shard: Callable[[PointPeftModel], None]) -> None:
    """Train everything, in each process of two; go on with what one process has begun; and train a sharded model."""
    for case in CASES:
        _train(folder / f"two {case}", case)
    _train(folder / "begun by one", "no bank")
    _train(folder / "sharded", "no bank", shard=shard)


def interrupt_one(folder: Path) -> None:
    """Begin a training in one process and interrupt it in the middle."""
    with pytest.raises(KeyboardInterrupt):
        _train(folder / "begun by one", "no bank", Interrupted(TRAIN, 28))


def check_trained(folder: Path) -> None:
    """Compare with one process: the curve to rounding, what was trained, and the figures to the last sample."""
    for case in CASES:
        _train(folder / f"one {case}", case)
        _check(folder / f"one {case}", folder / f"two {case}", 2e-4)
    _check(folder / "one no bank", folder / "begun by one", 2e-4)
    _check(folder / "one no bank", folder / "sharded", 2e-4)


def _check(one: Path, two: Path, tolerance: float) -> None:
    assert losses(two) == pytest.approx(losses(one), abs=tolerance), two.name
    records = [json.loads((path / "run.json").read_text("utf-8")) for path in (one, two)]
    for split, figures in records[0]["results"].items():
        assert records[1]["results"][split] == pytest.approx(figures, abs=1e-3), f"{two.name}: {split}"
    name = TENSOR_FILE if (one / TENSOR_FILE).exists() else "model.safetensors"
    first, second = (load_file(path / name) for path in (one, two))
    shapes_of = [{key: value.shape for key, value in tensors.items()} for tensors in (first, second)]
    assert shapes_of[0] == shapes_of[1]  # their values differ where Adam divides one rounding by another
