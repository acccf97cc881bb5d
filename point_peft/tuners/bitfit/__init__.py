"""BitFit: only biases are trained.

E. Ben Zaken, S. Ravfogel, Y. Goldberg: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022, https://arxiv.org/abs/2106.10199

The norms and linear layers of every block, and the final norm, get trained copies b of the biases that they have:

    y = W x + b

They are the adapter's own. Plain layers run with them in the place of the backbone's; to what others give, the
difference is added. Merged, they take their place for good.

When to use it: as a baseline, or where an adapter has to be small and any method that adds to the network is too much.
It needs a backbone that has biases, and moves features less than LoRA or SSF can.

Deviations from the published code, each with its reason:

- Query, key and value layers are left out by default: in point-cloud transformers most have no bias, and of those
  that have one, a softmax takes that of the keys away. `target_modules` can name them.
"""

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
        norms = () if self.target_modules is not None else backbone.known_anatomy(self.method).final_norms
        paths = self.chosen_modules(backbone, lambda block: block_biases(backbone, [block]), behind=norms)
        return Blueprint(parts=tuned_biases(backbone, paths))
