"""The example that adapts every registered backbone: its rows, and what it says of a row that fails."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from point_peft.anatomy.presets import known_anatomy
from tests.zoo import BACKBONES, Compact, clouds, register
from tests.zoo.registry import linear_head
from tools import any_backbone

NAMES = ["point_m2ae", "pointgpt", "pyg_point_transformer"]


@pytest.mark.parametrize("options", [[], ["--traced"]], ids=["presets", "traced"])
def test_rows_of_three_backbones(capsys, options):
    names = [name for name in NAMES if name in BACKBONES]
    assert any_backbone.main(["--backbone", *names, *options]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= any_backbone.WIDTH for line in printed.splitlines())
    rows = {line.split()[0]: re.split(r" +", line) for line in printed.splitlines() if line.split()[:1]}
    assert {"2+1+1", "bgc,", "12,24,24", "fused", "POINT_PEFT"} <= set(rows["point_m2ae"])
    assert {"2", "gbc,", "24", "torch", "POINT_PEFT"} <= set(rows["pointgpt"])
    for name in names:
        assert rows[name][-2:] == ["yes", "yes"]
        assert float(rows[name][-3]) < float(rows[name][-4])
        assert ("traced" in rows[name]) == (bool(options) or known_anatomy(BACKBONES[name].build()) is None)
    if "pyg_point_transformer" in names:
        assert {"packed", "split", "POINT_PEFT"} <= set(rows["pyg_point_transformer"])
    assert re.search(rf"^{len(names)} backbones in [\d.]+ s, failed: none$", printed, re.MULTILINE)


def test_a_mark_says_what_a_backbone_asks_for(capsys):
    assert any_backbone.main(["--backbone", "official_ptv1"]) == 0
    printed = capsys.readouterr().out
    assert "POINT_PEFT¹" in printed and "¹ adapter_scale=0.0" in printed


def test_a_method_falls_back_where_it_is_unsupported(capsys):
    assert any_backbone.main(["--backbone", "padded_patches"]) == 0
    assert " LORA " in capsys.readouterr().out
    assert any_backbone.choose("padded_patches", "BITFIT") == "BITFIT"


class Forgetful(Compact):
    """It gives another output each time."""

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        logits = super().forward(points)
        return logits + torch.rand_like(logits)


class Unreadable(nn.Module):
    """It has no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(points.amax(1))
        return logits


@pytest.mark.parametrize(("kind", "said"), [(Forgetful, "no"), (Unreadable, "no transformer block was found")])
def test_a_broken_row_gives_exit_status_1(capsys, kind, said):
    @register(inputs=clouds, slice=lambda args, i: args, heads=("head",), other_head=linear_head(3))
    def broken() -> nn.Module:
        model: nn.Module = kind()
        return model

    try:
        assert any_backbone.main(["--backbone", "broken", "compact"]) == 1
    finally:
        del BACKBONES["broken"]
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if line.startswith("broken"))
    assert said in row
    assert "failed: broken\n" in printed
