"""Linear probing: the backbone stays as it is, only the heads of the adapter are trained.

G. Alain, Y. Bengio: "Understanding intermediate layers using linear classifier probes", ICLR 2017 workshop,
https://arxiv.org/abs/1610.01644

    logits = head(backbone(points))         the backbone frozen

The head is a trained copy of the backbone's, or another that `heads` gives: a single linear layer for probing proper,
or an MLP, as the research on point clouds mostly means by it.

When to use it: to see what a pre-trained backbone knows by itself, and as the baseline that every other method has to
beat; it needs no gradient through the backbone, so a step costs about as much as inference.
"""

from dataclasses import dataclass
from typing import ClassVar

from point_peft.config import TunerConfig, require
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(TunerConfig):
    """No parts: what is trained are the modules of `modules_to_save`, by default the heads that the anatomy finds."""

    method: ClassVar[str] = "LINEAR_PROBE"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "layers_to_transform"):
            require(getattr(self, name) is None, self, name, "None, because linear probing adapts no module")

    def build(self, backbone: Backbone) -> Blueprint:
        return Blueprint()
