"""A configuration of every registered method, as small as the tiny backbones. A new method needs no entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from point_peft import METHODS, TunerConfig
from point_peft.tokens import Args, Kwargs
from point_peft.tuners.base import Backbone, Blueprint, Call, Part, SharedState

SIZES: Mapping[str, Mapping[str, int]] = {}
"""Method -> fields that must be smaller than their defaults for the tiny backbones; sizes only."""


def config(method: str, **changes: Any) -> TunerConfig:
    """The method's defaults, at a tiny size, with changes."""
    return METHODS[method](**{**SIZES.get(method, {}), **changes})


# ---- a method of the tests -------------------------------------------------------------------------------------------


class ToyPart(Part):
    """tokens <- tokens * scale of this block + shift of all blocks, before a block."""

    prefix = "toy"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        shift = call.state("toy", ToyState).shift
        return (args[0] * self.scale + shift, *args[1:]), kwargs


class ToyState(SharedState):
    prefix = "toy"
    shift: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))


@dataclass(frozen=True, kw_only=True)
class ToyConfig(TunerConfig):
    """The least that a method can be: one part a block and one state that the parts share."""

    method: ClassVar[str] = "TOY"
    fails: bool = False

    def build(self, backbone: Backbone) -> Blueprint:
        fields = (self.target_modules, self.exclude_modules, self.layers_to_transform)
        chosen = backbone.select_blocks(self.method, *fields)
        width = backbone.known_anatomy(self.method).stages[0].width
        plan = Blueprint(parts=[(block.path, ToyPart(width)) for _, block in chosen], shared={"toy": ToyState(width)})
        if self.fails:
            raise RuntimeError("the toy fails while it builds")
        return plan


del METHODS["TOY"]  # it is for the tests that name it
