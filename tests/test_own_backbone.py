"""docs/own_backbone.md: its model, from the first look to a reload, and what it says goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    Anatomy,
    AnatomyError,
    LoraConfig,
    PointPEFTConfig,
    PPTConfig,
    VPTConfig,
    describe,
    get_peft_model,
)

TEXT = (Path(__file__).parents[1] / "docs" / "own_backbone.md").read_text("utf-8")
CLOUDS = torch.rand(4, 512, 3)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The names that the page's code leaves behind, and what it prints."""
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(tmp_path_factory.mktemp("own"))
        for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
            exec(compile(block, "own_backbone.md", "exec"), names)
    return names, printed.getvalue()


def test_it_prints_what_the_page_shows(followed: tuple[dict[str, Any], str]) -> None:
    (shown,) = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in shown.splitlines():
        assert line.removesuffix("…") in followed[1]
    assert "prompts: 3 of 3 blocks" in str(followed[0]["anatomy"])
    again = followed[0]["again"]
    assert again(CLOUDS)["fine"].shape == (4, 4) and again.anatomy.heads == ("fine",)


class Mistakes:
    """What somebody does wrong with the model of the page, by the words that are then said."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.kind: type[nn.Module] = names["CloudTransformer"]
        self.anatomy: Anatomy = names["anatomy"]

    def state(self, anatomy: Anatomy) -> None:
        get_peft_model(self.kind().eval(), PointPEFTConfig(anatomy=anatomy))(CLOUDS)

    def no_example(self) -> None:
        get_peft_model(self.kind(), LoraConfig())

    def not_corrected(self) -> None:
        get_peft_model(self.kind(), PointPEFTConfig(), example_inputs=(CLOUDS,))

    def misspelt(self) -> None:
        self.state(dataclasses.replace(self.anatomy, heads=("finn",)))

    def other_prefix(self) -> None:
        stage = dataclasses.replace(self.anatomy.stages[0], prefix_tokens=0)
        self.state(dataclasses.replace(self.anatomy, stages=(stage,)))

    def prompts_left_out(self) -> None:
        stage = dataclasses.replace(self.anatomy.stages[0], prompts=False)
        get_peft_model(self.kind(), VPTConfig(anatomy=dataclasses.replace(self.anatomy, stages=(stage,))))

    def grouping(self) -> None:
        get_peft_model(self.kind(), PPTConfig(anatomy=self.anatomy))

    def part_by_part(self) -> None:
        kind: Any = self.kind

        class Bare(kind):
            def forward(self, cloud: Tensor) -> Tensor:
                tokens: Tensor = self.place(cloud)
                for layer in self.layers:
                    tokens = tokens + layer.attention(layer.norm1(tokens))
                    tokens = tokens + layer.mlp(layer.norm2(tokens))
                scores: Tensor = self.fine(tokens.amax(dim=1))
                return scores

        describe(Bare(), CLOUDS)


IN_THE_ORDER_OF_THE_TABLE: list[Callable[[Mistakes], None]] = [
    Mistakes.no_example,
    Mistakes.not_corrected,
    Mistakes.misspelt,
    Mistakes.prompts_left_out,
    Mistakes.other_prefix,
    Mistakes.grouping,
    Mistakes.part_by_part,
]


def test_the_table_says_what_is_said(followed: tuple[dict[str, Any], str]) -> None:
    said = re.findall(r"^\| `(.+?)`[ ,(]", TEXT.split("## What you may meet")[1], flags=re.MULTILINE)
    for words, mistake in zip(said, IN_THE_ORDER_OF_THE_TABLE, strict=True):
        with pytest.raises(AnatomyError, match=".*".join(map(re.escape, words.split("…")))):
            mistake(Mistakes(followed[0]))
