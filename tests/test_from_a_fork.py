"""docs/from_a_fork.md: its checkpoint becomes adapters, and the tests that it names compare with published code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from point_peft import PointPeftError, cli, extract
from point_peft.backbones import PointTransformer, default_backbone, load_checkpoint
from tests.following import follow

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "from_a_fork.md").read_text("utf-8")


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(TEXT, {}, "from_a_fork.md", commands_run=False)
    assert (tmp_path / "from_fork" / "adapter_model.safetensors").exists()


def test_its_commands_are_commands() -> None:
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL):
        words = shlex.split(block)
        assert words[0] == "point-peft"
        cli._parser().parse_args(words[1:])


def test_the_tests_that_it_names_compare_with_recorded_runs() -> None:
    named = re.findall(r"\(\.\./(tests/\w+\.py)\)", TEXT)
    assert len(named) == 11
    for path in named:
        assert "golden.weights(" in (ROOT / path).read_text("utf-8")


def test_the_table_says_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = default_backbone(cls_dim=5).state_dict()

    def load(**content: Any) -> None:
        torch.save(content, "ckpt.pth")
        load_checkpoint(default_backbone(cls_dim=5), "ckpt.pth")

    mistakes = [
        lambda: load(net={"weight": torch.rand(3)}),
        lambda: load(base_model=own, options=Path("here")),
        lambda: load(**{"blocks.blocks.0.norm1.weight": own["norm.weight"]}),
        lambda: load(**PointTransformer(trans_dim=96, encoder_dims=96, num_heads=6, cls_dim=5).state_dict()),
        lambda: extract(default_backbone(cls_dim=5), {name: own[name] for name in own if name != "cls_token"}),
    ]
    said = re.findall(r"^\| `(.+?)` \| ", TEXT.split("## What can go wrong")[1], flags=re.MULTILINE)
    for words, mistake in zip(said, mistakes, strict=True):
        with pytest.raises(PointPeftError, match=".*".join(map(re.escape, words.split("…")))):
            mistake()
