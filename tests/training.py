"""Small trainings: a tiny model, clouds of three shapes that it can tell apart, and ways to look at a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from point_peft import LoraConfig, PeftConfig, PointPeftModel, TunerConfig, get_peft_model
from point_peft.backbones import PointTransformer, PointTransformerPartSeg
from point_peft.training import Recipe
from point_peft.training.state import snapshot

SIZES: dict[str, Any] = {
    "trans_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "encoder_dims": 24,
    "num_group": 8,
    "group_size": 8,
}
SHAPES = ("flat", "long", "round")
QUICK = Recipe(epochs=2, batch_size=5, lr=1e-2, checkpoint_steps=2)


def backbone(seed: int = 0, **changes: Any) -> PointTransformer:
    """The tiny model, with the same values each time."""
    torch.manual_seed(seed)
    return PointTransformer(**{**SIZES, "cls_dim": 3, **changes})


def segmenter(seed: int = 0) -> PointTransformerPartSeg:
    """A tiny model that gives each point one of two classes."""
    torch.manual_seed(seed)
    return PointTransformerPartSeg(**SIZES, cls_dim=2, num_labels=1, taps=(0, 1), head_width=16)


def adapted(config: TunerConfig | PeftConfig | None = None, seed: int = 0, **changes: Any) -> PointPeftModel:
    """The tiny model with a fresh adapter."""
    base = backbone(**changes)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=2) if config is None else config)


def shapes(count: int, seed: int = 0, n: int = 48) -> TensorDataset:
    """Clouds (n, 3) stretched along none, one or two axes, and the number of their shape."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(SHAPES)
    stretch = np.array([[1, 1, 0.1], [0.1, 0.1, 1], [1, 1, 1]])[labels]
    points = rng.normal(size=(count, n, 3)) * stretch[:, None]
    return TensorDataset(torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels))


class Interrupted(Dataset[Any]):
    """Clouds of another data set, until so many have been read: then Ctrl-C is pressed, or whatever else happens."""

    def __init__(self, clouds: TensorDataset, reads: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.clouds, self.left, self.error = clouds, reads, error

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.clouds[index]


def losses(folder: Path) -> list[float]:
    """The loss of every step of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def logits(model: nn.Module, clouds: TensorDataset) -> Tensor:
    """The outputs of a model in eval mode."""
    with torch.no_grad():
        output: Tensor = model.eval()(clouds.tensors[0])
    return output


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a training changes."""
    return snapshot(model)
