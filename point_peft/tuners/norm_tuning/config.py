"""The configuration of norm tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.tuned import tuned_norms


@dataclass(frozen=True, kw_only=True)
class NormTuningConfig(TunerConfig):
    """Norm tuning; `target_modules=None` means the norms of every block and the final norm.

    With `layers_to_transform`, those of these blocks alone.
    """

    method: ClassVar[str] = "NORM_TUNING"

    def build(self, backbone: Backbone) -> Blueprint:
        norms = backbone.known_anatomy(self.method).final_norms
        paths = self.chosen_modules(backbone, lambda block: block.norms, behind=norms)
        return Blueprint(parts=tuned_norms(backbone, paths))
