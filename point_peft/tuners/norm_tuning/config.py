"""The configuration of norm tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from point_peft.config import TunerConfig
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone, narrowed
from point_peft.parts.base import Blueprint
from point_peft.parts.tuned import tuned_norms


@dataclass(frozen=True, kw_only=True)
class NormTuningConfig(TunerConfig):
    """Norm tuning; `target_modules=None` means the norms of every block and the final norm.

    With `layers_to_transform`, those of these blocks alone.
    """

    method: ClassVar[str] = "NORM_TUNING"

    def build(self, backbone: Backbone) -> Blueprint:
        blocks = [block for _, block in backbone.select_blocks(self.method, None, None, self.layers_to_transform)]
        within = None if self.layers_to_transform is None else blocks
        if self.target_modules is not None:
            paths: Sequence[str] = match_names(self.target_modules, list(backbone.modules))
        else:
            final = backbone.known_anatomy(self.method).final_norms if within is None else ()
            paths = [*(path for block in blocks for path in block.norms), *final]
        return Blueprint(parts=tuned_norms(backbone, narrowed(paths, self.method, self.exclude_modules, within)))
