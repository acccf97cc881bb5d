"""Norm tuning: only the weights and biases of norms are trained.

S. Basu, D. Massiceti, S. X. Hu, S. Feizi: "Strong Baselines for Parameter Efficient Few-Shot Fine-tuning", AAAI 2024,
https://arxiv.org/abs/2304.01917

The norms of every block and the final norm get trained copies of their weight w and bias b:

    y = w * normalised(x) + b

A LayerNorm runs with them in the place of the backbone's own, which stay as they are; to what other norms give, the
difference is added. Running statistics of a BatchNorm are the frozen backbone's. Merged, the copies take the place of
the tensors they are copies of for good.

When to use it: as the smallest baseline that is worth beating, and for few-shot tasks, where so few parameters can
hardly overfit. With more data, SSF or LoRA reach further.
"""

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
        norms = () if self.target_modules is not None else backbone.known_anatomy(self.method).final_norms
        paths = self.chosen_modules(backbone, lambda block: block.norms, behind=norms)
        return Blueprint(parts=tuned_norms(backbone, paths))
