"""The configuration of LoRA and its part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from point_peft.anatomy import linear_shape
from point_peft.config import TunerConfig, require
from point_peft.errors import AnatomyError
from point_peft.matching import match_names
from point_peft.tuners.base import Args, Backbone, Blueprint, Call, Kwargs, Part, narrowed


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TunerConfig):
    """LoRA on linear layers; `target_modules=None` means the query, key and value projections of every block."""

    method: ClassVar[str] = "LORA"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r >= 1, self, "r", "1 or more")
        require(self.lora_alpha > 0, self, "lora_alpha", "more than 0")
        require(0.0 <= self.lora_dropout < 1.0, self, "lora_dropout", "0 or more and less than 1")

    def build(self, backbone: Backbone) -> Blueprint:
        scale = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        plan = Blueprint()
        for path in self._targets(backbone):
            module = backbone.modules[path]
            shape = linear_shape(module)
            if shape is None:
                raise AnatomyError(f"'{path}' is a {type(module).__name__}; {self.method} adapts linear layers")
            plan.parts.append((path, LoraPart(shape, self.r, scale, self.lora_dropout)))
        return plan

    def _targets(self, backbone: Backbone) -> list[str]:
        blocks = None
        if self.target_modules is None or self.layers_to_transform is not None:
            blocks = [block for _, block in backbone.select_blocks(self.method, None, None, self.layers_to_transform)]
        if self.target_modules is not None:
            paths = list(match_names(self.target_modules, list(backbone.modules)))
        else:
            paths = [path for block in blocks or () for path in block.qkv]
            if not paths:
                raise AnatomyError(
                    f"{self.method}: the attention of the blocks has no query, key and value layers that are called: "
                    "name linear layers in target_modules"
                )
        return narrowed(paths, self.method, self.exclude_modules, blocks)


class LoraPart(Part):
    """y <- y + scale * B A dropout(x)"""

    mergeable = True

    def __init__(self, shape: tuple[int, int], r: int, scale: float, dropout: float) -> None:
        super().__init__()
        out, width = shape
        self.scale = scale
        self.lora_A = nn.Linear(width, r, bias=False)
        self.lora_B = nn.Linear(r, out, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        return output + self.scale * self.lora_B(self.lora_A(self.dropout(x))).to(output.dtype)

    def merge(self, module: nn.Module) -> dict[str, Tensor]:
        weight = module.get_parameter("weight")
        update = self.lora_B.weight.detach().float() @ self.lora_A.weight.detach().float()
        return {"weight": (weight.detach().float() + self.scale * update).to(weight.dtype)}
