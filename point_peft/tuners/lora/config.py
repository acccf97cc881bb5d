"""The configuration of LoRA and its part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from point_peft.anatomy import linear_shape
from point_peft.config import TunerConfig, require
from point_peft.errors import AnatomyError
from point_peft.matching import match_names
from point_peft.tokens import Args, Kwargs
from point_peft.tuners.base import Backbone, Blueprint, Call, Part, narrowed


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TunerConfig):
    """LoRA on linear layers; `target_modules=None` means the query, key and value projections of every block.

    Where such a projection is not called but its weight is read (`nn.MultiheadAttention`, EVA attention), the weight is
    adapted; the fused one of `nn.MultiheadAttention` is meant by the name of the attention itself.
    """

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
            weight = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
            shape = linear_shape(module) if weight == "weight" else _in_proj_shape(module)
            if shape is None:
                raise AnatomyError(f"'{path}' is a {type(module).__name__}; {self.method} adapts linear layers")
            part = LoraPart(shape, self.r, scale, self.lora_dropout, weight)
            if weight != "weight":
                part.act_by_weight(path)
            plan.parts.append((path, part))
        return plan

    def _targets(self, backbone: Backbone) -> list[str]:
        blocks = None
        if self.target_modules is None or self.layers_to_transform is not None:
            blocks = [block for _, block in backbone.select_blocks(self.method, None, None, self.layers_to_transform)]
        if self.target_modules is not None:
            paths = list(match_names(self.target_modules, list(backbone.modules)))
        else:
            paths = [path for block in blocks or () for path in block.qkv or (block.attention,)]
        return narrowed(paths, self.method, self.exclude_modules, blocks)


def _in_proj_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of the fused projection of an nn.MultiheadAttention; None where it has three of different widths."""
    weight = module._parameters.get("in_proj_weight")
    return None if weight is None else (weight.shape[0], weight.shape[1])


class LoraPart(Part):
    """y <- y + scale * B A dropout(x); where the module is not called, W <- W + scale * B A for whoever reads W."""

    mergeable = True

    def __init__(self, shape: tuple[int, int], r: int, scale: float, dropout: float, weight: str = "weight") -> None:
        super().__init__()
        out, width = shape
        self.scale = scale
        self.weight = weight
        self.lora_A = nn.Linear(width, r, bias=False)
        self.lora_B = nn.Linear(r, out, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        return output + self.scale * self.lora_B(self.lora_A(self.dropout(x))).to(output.dtype)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        weight: Tensor = getattr(module, self.weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide)
        return {self.weight: (weight.to(wide) + self.scale * update).to(weight.dtype)}

    def act_by_weight(self, path: str) -> None:
        if self.dropout.p:
            raise AnatomyError(
                f"'{path}' is not called, its weight is read by another module, so lora_dropout={self.dropout.p} "
                "cannot act on its input: set lora_dropout=0.0 or leave it out with exclude_modules"
            )
        super().act_by_weight(path)
