"""Adapters to try a server with: files of random values, and what each of them answers alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from point_peft import BitFitConfig, IDPTConfig, LoraConfig, PointPeftModel, get_peft_model
from point_peft.backbones import PointTransformer

HEAD = "cls_head_finetune"
CONFIGS = (LoraConfig(r=4, target_modules=["qkv"]), BitFitConfig(), IDPTConfig())
WIDTHS = (10, 4)
"""Classes of the adapters, by turns."""

Build = Callable[[int], PointTransformer]
"""Makes the backbone, the same each time but for its head, which is of so many classes."""


def write_adapters(build: Build, folder: Path, count: int) -> None:
    """Write so many, as if they came from training or from the Hub; the same each time."""
    torch.manual_seed(0)
    backbone, heads = build(WIDTHS[0]), [build(width).cls_head_finetune for width in WIDTHS]
    for number in range(count):
        head = copy.deepcopy(heads[number % len(heads)])
        model = get_peft_model(backbone, CONFIGS[number % len(CONFIGS)], heads={HEAD: head})
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.adapters.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"task{number:02}")
        model.unload()


def answers_alone(build: Build, folder: Path, clouds: Tensor) -> dict[str, Tensor]:
    """The probabilities (clouds, classes) that each adapter gives when no other is there."""
    expected = {}
    for path in sorted(folder.iterdir()):
        model = PointPeftModel.from_pretrained(build(WIDTHS[0]), path).eval()
        with torch.inference_mode():
            expected[path.name] = model(clouds).softmax(dim=1)
    return expected


def apart(expected: Mapping[str, Tensor]) -> float:
    """The distance of the two adapters that are most alike, on the cloud on which they are."""
    pairs = combinations(expected.values(), 2)
    return min((float((a - b).abs().amax(dim=1).min()) for a, b in pairs if a.shape == b.shape), default=math.inf)
