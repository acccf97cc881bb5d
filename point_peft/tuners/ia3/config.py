"""The configuration of IA3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from point_peft.anatomy.description import Block
from point_peft.anatomy.roles import projects
from point_peft.anatomy.structure import linear_shape, mlp_linears
from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Part
from point_peft.tuners.ia3.parts import HiddenPart, KeyValuePart


@dataclass(frozen=True, kw_only=True)
class IA3Config(TunerConfig):
    """IA3; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "IA3"

    scale_mlp: bool = True
    """Scale the hidden activation of the MLP too; blocks without an MLP need False."""

    def build(self, backbone: Backbone) -> Blueprint:
        plan = Blueprint()
        for _, block in self.chosen_blocks(backbone):
            plan.parts += self._keys_and_values(backbone, block)
            if self.scale_mlp:
                plan.parts.append(self._hidden(backbone, block))
        return plan

    def _keys_and_values(self, backbone: Backbone, block: Block) -> list[tuple[str, Part]]:
        if not block.qkv:
            attention = backbone.modules[block.attention]
            fused = attention._parameters.get("in_proj_weight")
            if not isinstance(attention, nn.MultiheadAttention) or fused is None:
                raise AnatomyError(f"{self.method}: '{block.attention}' has no one projection of keys and values")
            part = KeyValuePart("qkv", fused.shape[0], "in_proj_")
            part.act_by_weight(block.attention)
            return [(block.attention, part)]
        made = {path: projects(block, path) for path in block.qkv}
        if {"k", "v"} - set("".join(made.values())):
            raise AnatomyError(
                f"{self.method} scales keys and values, and the names of {', '.join(map(repr, block.qkv))} do not tell "
                "which of them makes these"
            )
        shapes = {path: linear_shape(backbone.modules[path]) or (0, 0) for path in block.qkv}
        return [(path, KeyValuePart(roles, shapes[path][0])) for path, roles in made.items() if {"k", "v"} & set(roles)]

    def _hidden(self, backbone: Backbone, block: Block) -> tuple[str, Part]:
        ends = mlp_linears(block)
        if ends is None:
            raise AnatomyError(
                f"{self.method} scales the hidden activation of every MLP, and '{block.path}' has none that was found: "
                "set scale_mlp=False to do without, or name it in config.anatomy"
            )
        width = (linear_shape(backbone.modules[ends[1]]) or (0, 0))[1]
        return ends[1], HiddenPart(width)
