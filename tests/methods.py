"""A configuration of every registered method, as small as the tiny backbones. A new method needs no entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from point_peft import METHODS, TunerConfig
from point_peft.anatomy.description import Stage
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call, Part, SharedState
from point_peft.running.nested import Args, Kwargs, put_argument
from point_peft.running.tokens import block_tokens
from tools.capabilities import labelled

SIZES: Mapping[str, Mapping[str, Any]] = {
    "POINT_LORA": {"num_groups": (20, 10), "group_size": (8, 12), "num_selected": (8, 4)},
    "PPT": {"num_groups": 20, "group_size": 8, "mlp_width": 32},
}
"""Method -> fields that are smaller than their defaults; sizes only, and only where the defaults take long."""

PARTS: Mapping[str, Mapping[str, Any]] = {"POINT_PEFT": {"memory_bank": True}}
"""Method -> fields that add what its defaults leave out, so that what holds of a method holds of all its parts."""


HEADS_ALONE = ("INPUT_ADAPTER", "LINEAR_PROBE", "ROUTING_BANK")
"""Methods that by their defaults put nothing into the backbone and train heads alone."""


def config(method: str, **changes: Any) -> TunerConfig:
    """The method's defaults, at a tiny size and with all its parts, with changes; a label of `tools.capabilities` holds
    changes too.
    """
    name, stated = labelled(method)
    return METHODS[name](**{**SIZES.get(name, {}), **PARTS.get(name, {}), **stated, **changes})


# ---- a method of the tests -------------------------------------------------------------------------------------------


class ToyPart(Part):
    """tokens <- tokens * scale of this block + shift of all blocks, before a block."""

    prefix = "toy"

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.scale = nn.Parameter(torch.ones(stage.width))

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        tokens = block_tokens(self.stage, call.path, args, kwargs)
        changed = tokens * self.scale + call.state("toy", ToyState).shift
        return put_argument(args, kwargs, self.stage.tokens, changed)


class ToyState(SharedState):
    prefix = "toy"
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))


@dataclass(frozen=True, kw_only=True)
class ToyConfig(TunerConfig):
    """The least that a method can be: one part a block and one state that the parts share."""

    method: ClassVar[str] = "TOY"
    fails: bool = False

    def build(self, backbone: Backbone) -> Blueprint:
        fields = (self.target_modules, self.exclude_modules, self.layers_to_transform)
        chosen = backbone.select_blocks(self.method, *fields)
        anatomy = backbone.known_anatomy(self.method)
        parts = [(block.path, ToyPart(anatomy.stages[anatomy.stage_of(block)])) for _, block in chosen]
        if self.fails:
            raise RuntimeError("the toy fails while it builds")
        return Blueprint(parts=list(parts), shared={"toy": ToyState()})


del METHODS["TOY"]  # it is for the tests that name it
