"""The package PEFT and point_peft, with the same LoRA: what both can do is called by the same names."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import point_peft
from tests.zoo.operators import supply_torchvision_schemas

OURS, THEIRS = "point_peft", "PEFT"


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
