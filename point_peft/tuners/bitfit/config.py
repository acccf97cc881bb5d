"""The configuration of BitFit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.tuned import block_biases, tuned_biases


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(TunerConfig):
    """BitFit; `target_modules=None` means the norms and linear layers of every block, and the final norm."""

    method: ClassVar[str] = "BITFIT"

    def build(self, backbone: Backbone) -> Blueprint:
        norms = backbone.known_anatomy(self.method).final_norms
        paths = self.chosen_modules(backbone, lambda block: block_biases(backbone, [block]), behind=norms)
        return Blueprint(parts=tuned_biases(backbone, paths))
