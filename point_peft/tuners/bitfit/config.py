"""The configuration of BitFit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from point_peft.config import TunerConfig
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone, narrowed
from point_peft.parts.base import Blueprint
from point_peft.parts.tuned import block_biases, tuned_biases


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(TunerConfig):
    """BitFit; `target_modules=None` means the norms and linear layers of every block, and the final norm."""

    method: ClassVar[str] = "BITFIT"

    def build(self, backbone: Backbone) -> Blueprint:
        blocks = [block for _, block in backbone.select_blocks(self.method, None, None, self.layers_to_transform)]
        if self.target_modules is not None:
            paths = list(match_names(self.target_modules, list(backbone.modules)))
        else:
            paths = block_biases(backbone, blocks)
            if self.layers_to_transform is None:
                paths += backbone.known_anatomy(self.method).final_norms
        within = None if self.layers_to_transform is None else blocks
        return Blueprint(parts=tuned_biases(backbone, narrowed(paths, self.method, self.exclude_modules, within)))
