"""The package PEFT and point_peft, with the same LoRA: what both can do is called by the same names."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import point_peft
from benchmarks.clock import Learner, Timed, seconds
from benchmarks.tables import OURS, THEIRS
from tests.zoo.operators import supply_torchvision_schemas


@dataclass(frozen=True, kw_only=True)
class Library:
    """What handles adapters."""

    name: str
    get_peft_model: Callable[..., Any]
    from_pretrained: Callable[..., Any]
    config: Any
    """LoRA of rank 8 on the qkv of every block, and nothing else."""


def libraries() -> list[Library]:
    """Both, or none where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return []
    peft = _peft()
    return [
        Library(
            name=OURS,
            get_peft_model=point_peft.get_peft_model,
            from_pretrained=point_peft.PointPeftModel.from_pretrained,
            config=point_peft.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=()),
        ),
        Library(
            name=THEIRS,
            get_peft_model=peft.get_peft_model,
            from_pretrained=peft.PeftModel.from_pretrained,
            config=peft.LoraConfig(r=8, target_modules=["qkv"]),
        ),
    ]


def _peft() -> Any:
    """The package; it imports torchvision, whose build for CUDA needs a hand beside a torch for CPUs."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        supply_torchvision_schemas()
    except ImportError:
        pass  # PEFT does without
    return importlib.import_module("peft")


def handling(library: Library, learner: Learner, folder: Path) -> dict[str, Timed]:
    """Whatever one does with adapters, each with a clock; the learner's model is the plain backbone."""
    backbone, config = learner.model, library.config
    model = library.get_peft_model(deepcopy(backbone), config)
    two = library.get_peft_model(deepcopy(backbone), config)
    two.add_adapter("second", config)
    model.save_pretrained(folder / "loaded")
    adapted = replace(learner, model=library.get_peft_model(deepcopy(backbone), config))

    def inject() -> float:
        fresh = deepcopy(backbone)
        return seconds(lambda: library.get_peft_model(fresh, config))

    def load_fresh() -> float:
        fresh = deepcopy(backbone)
        return seconds(lambda: library.from_pretrained(fresh, folder / "loaded"))

    def add() -> float:
        took = seconds(lambda: model.add_adapter("further", config))
        model.delete_adapter("further")
        return took

    def load() -> float:
        took = seconds(lambda: model.load_adapter(folder / "loaded", "further"))
        model.delete_adapter("further")
        return took

    def swap() -> None:
        two.set_adapter("second")
        two.set_adapter("default")

    def disable() -> None:
        with two.disable_adapter():
            pass

    return {
        "get_peft_model": inject,
        "from_pretrained": load_fresh,
        "add_adapter": add,
        "load_adapter": load,
        "save_pretrained": lambda: seconds(lambda: model.save_pretrained(folder / "saved")),
        "set_adapter": lambda: seconds(swap, repeats=20) / 2,
        "disable_adapter": lambda: seconds(disable, repeats=20),
        "a training step": adapted.training_step,
        "inference": adapted.inference,
    }
