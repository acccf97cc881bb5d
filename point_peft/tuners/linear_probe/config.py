"""The configuration of linear probing."""

from __future__ import annotations

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
