"""The configuration of BitFit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.matching import match_names
from point_peft.tuners.base import Backbone, Blueprint, block_biases, tuned_biases


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(TunerConfig):
    """BitFit; `target_modules=None` means the norms and linear layers of every block, and the final norm."""

    method: ClassVar[str] = "BITFIT"

    def build(self, backbone: Backbone) -> Blueprint:
        blocks = backbone.select_blocks(self.method, None, None, self.layers_to_transform)
        if self.target_modules is not None:
            paths = list(match_names(self.target_modules, list(backbone.modules)))
            if self.layers_to_transform is not None:
                paths = [path for path in paths if any(path.startswith(block.path + ".") for _, block in blocks)]
        else:
            paths = block_biases(backbone, [block for _, block in blocks])
            if self.layers_to_transform is None:
                paths += backbone.known_anatomy(self.method).final_norms
        if self.exclude_modules is not None:
            excluded = set(match_names(self.exclude_modules, paths, field="exclude_modules"))
            paths = [path for path in paths if path not in excluded]
        if not paths:
            raise AnatomyError(f"{self.method}: exclude_modules and layers_to_transform leave no module")
        return Blueprint(parts=tuned_biases(backbone, paths))
