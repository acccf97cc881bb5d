"""Read the golden numbers: recorded runs of the official research code, with weights made from their names."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(os.environ.get("POINT_PEFT_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


def require() -> None:
    """Skip where the golden folder is absent; in CI its absence is a failure."""
    if GOLDEN.is_dir():
        return
    reason = f"no golden numbers at {GOLDEN}; set POINT_PEFT_GOLDEN"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of one recorded method."""
    require()
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def value(name: str, shape: tuple[int, ...], salt: str = "") -> npt.NDArray[Any]:
    """The value of the tensor called `name`, by the rule of the golden README."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    noise = np.random.default_rng(zlib.crc32((salt + name).encode())).standard_normal(shape)
    if leaf == "running_mean":
        noise = 0.1 * noise
    elif leaf == "running_var":
        noise = 0.5 + 0.5 * np.abs(noise)
    elif "gamma" in leaf or (leaf == "weight" and len(shape) == 1) or name.endswith(".scale.bias"):
        noise = 1 + 0.1 * noise
    elif len(shape) <= 1:
        noise = 0.1 * noise
    elif leaf == "weight" or leaf.startswith("lora_"):
        noise = noise / np.sqrt(np.prod(shape[1:]))
    else:
        noise = 0.5 * noise
    small = len(shape) >= 2 and any(part in name for part in ("adapter", "prompt_", "addparam"))
    if leaf == "weight" and ("out_transform" in name or small):
        noise = 0.3 * noise
    return np.asarray(noise, dtype=np.float32)


def weights(description: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a description, by their official names."""
    aliases: dict[str, str] = description["weight_aliases"]
    return {
        name: torch.from_numpy(value(aliases.get(name, name), tuple(shape), description["salt"]))
        for name, shape in description["weights"].items()
    }


def fill(model: nn.Module, description: dict[str, Any]) -> None:
    """Give `model` the weights of a description; names and shapes must agree exactly."""
    tensors = weights(description)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == description["weights"]
    model.load_state_dict(tensors, strict=True)


def points(description: dict[str, Any]) -> Tensor:
    """The input clouds of a description (b, n, 3)."""
    shape = (description["config"]["B"], description["config"]["N"], 3)
    cloud = np.random.default_rng(description["points_seed"]).uniform(-1, 1, shape)
    return torch.from_numpy(cloud.astype(np.float32))


def distance(ours: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value or to one."""
    assert ours.shape == expected.shape, f"{tuple(ours.shape)} is not {tuple(expected.shape)}"
    scale = max(1.0, float(expected.abs().max()))
    return float((ours.detach().double() - expected.double()).abs().max()) / scale


def assert_close(ours: Tensor, expected: Tensor, tol: float = 1e-5) -> None:
    """Compare by the tolerance rule of the golden README: `|a-b| <= tol * max(1, absmax)`."""
    found = distance(ours, expected)
    assert found <= tol, f"differs by {found:.3g} of the largest value, {tol:.3g} is allowed"
