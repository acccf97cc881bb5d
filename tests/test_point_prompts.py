"""GAPrompt's learned points among clouds of 1,024 points: they learn, or it is said that they do not."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from point_peft import GAPromptConfig, PointPeftModel, get_peft_model
from point_peft.backbones.layers import Group
from point_peft.quickstart.data import lift
from tests.adapting import PAIRS, adapt, each, few, loss_of
from tests.zoo import BACKBONES, Args, TinyBackbone

CLOUDS = torch.from_numpy(np.stack([lift(digit, 1024, np.random.default_rng(0)) for digit in load_digits().images[:3]]))
COARSE = few([(method, backbone) for method, backbone in PAIRS if method == "GA_PROMPT"])
"""Backbones of 12 to 16 groups of 8 points."""


def point_prompts(model: PointPeftModel) -> nn.Parameter:
    (found,) = [p for name, p in model.adapters.named_parameters() if name.endswith("point_prompts")]
    return found


def step(model: nn.Module, backbone: TinyBackbone, args: Args) -> list[str]:
    """The warnings of a forward and a backward pass."""
    model.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_of(backbone.select(model(*args))).backward()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", ["point_mae", "part_seg"])
def test_some_of_the_published_groups_hold_them(name: str) -> None:
    backbone = BACKBONES[name]
    base: Any = backbone.build()
    base.group_divider = Group(64, 32)
    model = get_peft_model(base, GAPromptConfig()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        assert not step(model, backbone, tuple(map(_of_a_digit, backbone.inputs(3, 1))))
        gradient = point_prompts(model).grad
        assert gradient is not None and gradient.any(dim=1).sum() >= 3
        optimizer.step()


@each(COARSE)
def test_of_few_small_groups_none_does_which_is_said_and_mended(method: str, backbone: TinyBackbone) -> None:
    args = tuple(map(_of_a_digit, backbone.inputs(3, 1)))
    for reach in (0.01, 0.2):
        model = adapt(backbone, GAPromptConfig(point_prompt_init=reach), fresh=True).train()
        said = step(model, backbone, args)
        gradient = point_prompts(model).grad
        assert gradient is not None and bool(gradient.any()) == (not said)
        assert not said if reach > 0.01 else "set point_prompt_init=0.2" in said[0]


def test_it_is_said_once() -> None:
    backbone = BACKBONES["point_mae"]
    model = adapt(backbone, GAPromptConfig(), fresh=True).train()
    assert [len(step(model, backbone, (CLOUDS,))) for _ in range(2)] == [1, 0]


def _of_a_digit(value: Any) -> Any:
    """Real points in the place of those of a cloud (b, n, 3) or (b, 3, n)."""
    if isinstance(value, dict):
        return {name: _of_a_digit(item) for name, item in value.items()}
    if not isinstance(value, Tensor) or value.ndim != 3:
        return value
    return CLOUDS if value.shape[2] == 3 else CLOUDS.mT
