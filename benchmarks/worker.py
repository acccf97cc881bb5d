"""One side of a comparison of two checkouts: makes what is timed, and is asked for one run of it after another.

    PYTHONPATH=CHECKOUT python benchmarks/worker.py '{"batch": 4, "points": 2048, "groups": 128, "depth": 12}'

A line of stdin names what to run; a line of stdout gives its seconds. It runs on earlier commits, where modules lie
elsewhere: so of point_peft it imports what users import, and of this folder nothing.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from point_peft import LoraConfig, PointPEFTConfig, get_peft_model
from point_peft.backbones import PointTransformer

OPERATORS = Path(__file__).resolve().parents[1] / "tests" / "zoo" / "operators.py"


def published(depth: int, groups: int) -> nn.Module:
    """torch-pointcloud's Point-MAE; what pyg-lib would do for it is done by this checkout's stand-ins on both sides."""
    spec = importlib.util.spec_from_file_location("operators", OPERATORS)
    assert spec is not None and spec.loader is not None
    operators = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(operators)
    operators.supply_pyg_operators()
    kind = importlib.import_module("torch_pointcloud.models.point_mae").PointMAEClassification
    model: nn.Module = kind(0, 15, num_groups=groups, depth=depth)
    return model


def reference(depth: int, groups: int) -> nn.Module:
    """The encoder of point_peft."""
    return PointTransformer(depth=depth, num_group=groups)


def subjects(*, batch: int, points: int, depth: int, groups: int) -> dict[str, Callable[[], float]]:
    """Name -> what runs it once and gives its seconds."""
    torch.manual_seed(0)
    clouds, labels = torch.randn(batch, points, 3), torch.arange(batch)
    packed = None, clouds.flatten(0, 1), torch.arange(batch).repeat_interleave(points)
    configs = {
        # Stated, because not every commit has the same default.
        "POINT_PEFT": PointPEFTConfig(memory_bank=False),
        "POINT_PEFT with a bank": PointPEFTConfig(memory_bank=True),
        "LORA qkv": LoraConfig(target_modules=["qkv"]),
    }
    runs: dict[str, Callable[[], float]] = {}
    bases: list[tuple[str, Callable[..., nn.Module], tuple[Any, ...]]] = [("reference", reference, (clouds,))]
    if all(importlib.util.find_spec(name) is not None for name in ("torch_geometric", "torch_pointcloud")):
        bases.insert(0, ("published", published, packed))
    else:
        print("The published class: left out (pip install torch-pointcloud torch-geometric).", file=sys.stderr)
    for base, make, inputs in bases:
        runs[f"{base} training: full fine-tuning"] = training(make(depth, groups), inputs, labels)
        runs[f"{base} inference: frozen backbone"] = inference(make(depth, groups), inputs)
        for name, config in configs.items():
            model = get_peft_model(make(depth, groups), config)
            if name == "POINT_PEFT with a bank":
                model.build_memory_bank([moved(inputs, by) for by in range(8)], to_inputs=lambda args: args)
            runs[f"{base} training: {name}"] = training(model, inputs, labels)
            runs[f"{base} inference: {name}"] = inference(model, inputs)
    return runs


def moved(inputs: tuple[Any, ...], by: float) -> tuple[Any, ...]:
    """The same clouds elsewhere: others, for a memory bank, which keeps equal ones once."""
    return tuple(
        value + by if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in inputs
    )


def training(model: nn.Module, inputs: tuple[Any, ...], labels: torch.Tensor) -> Callable[[], float]:
    """Forward, backward and update."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    auxiliary: Any = getattr(model, "auxiliary_loss", float)

    def run() -> float:
        model.train()
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(*inputs), labels) + auxiliary())
        optimizer.step()
        return time.perf_counter() - start

    return run


def inference(model: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], float]:
    """A forward in eval mode."""

    def run() -> float:
        model.eval()
        with torch.no_grad():
            start = time.perf_counter()
            model(*inputs)
            return time.perf_counter() - start

    return run


def main() -> None:
    """Say what there is, then answer until stdin ends."""
    warnings.simplefilter("ignore")
    answers = sys.stdout
    sys.stdout = sys.stderr  # the answers alone go there
    runs = subjects(**json.loads(sys.argv[1]))
    print(json.dumps([*runs]), file=answers, flush=True)
    for line in sys.stdin:
        print(runs[line.strip()](), file=answers, flush=True)


if __name__ == "__main__":
    main()
