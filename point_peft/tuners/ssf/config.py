"""The configuration of SSF: which features it scales and shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.scale_shift import block_sites, channels_of, key_layers, patch_taps
from point_peft.tuners.ssf.parts import PatchPart, ScaleShiftPart


@dataclass(frozen=True, kw_only=True)
class SSFConfig(TunerConfig):
    """SSF; `target_modules` and `exclude_modules` name norms, linear layers, and modules that make patch tokens.

    `target_modules=None` means the patch embedding where it is known, the norms and all linear layers of every block,
    and the final norm; with `layers_to_transform`, what lies in these blocks alone. The fused projection of an
    `nn.MultiheadAttention` is meant by the name of the attention itself.
    """

    method: ClassVar[str] = "SSF"

    only_mergeable: bool = False
    """Leave out what cannot be folded into the backbone's weights: the shift of a layer without bias, and the patch
    embedding where the module that ends it is not a linear layer."""

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        patches, keys = patch_taps(anatomy), key_layers(anatomy)
        plan = Blueprint()
        for path in self.chosen_modules(backbone, block_sites, ahead=patches, behind=anatomy.final_norms):
            module = backbone.modules[path]
            if channels_of(module) is not None:
                part = ScaleShiftPart(module, shift=path not in keys, only_mergeable=self.only_mergeable)
                plan.parts.append((path, part))
            elif path not in patches:
                raise AnatomyError(
                    f"'{path}' is a {type(module).__name__}; {self.method} adapts linear layers, norms with a weight "
                    "and the modules that make patch tokens: leave it out with exclude_modules"
                )
            elif not self.only_mergeable:
                plan.parts.append((path, PatchPart(*patches[path])))
        if not plan.parts:
            raise AnatomyError(f"{self.method} with only_mergeable=True leaves nothing to scale")
        return plan
