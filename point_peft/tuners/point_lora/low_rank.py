"""The low-rank updates of PointLoRA, with the MLPs beside them that layers of one name share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.errors import AnatomyError
from point_peft.parts.base import Call, Part, SharedState
from point_peft.running.nested import Args, Kwargs


class SharedMlps(SharedState):
    """m for each of the adapted layers of a block, the same for all blocks."""

    prefix = "point_lora"

    def __init__(self, mlps: Mapping[str, nn.Sequential]) -> None:
        super().__init__()
        self.shared_mlps = nn.ModuleDict(mlps)


class LowRankPart(Part):
    """y <- y + scale * B A x + s * m(x), where m is the shared MLP of that name; without a name, W <- W + scale * B A.

    Only without m is it a change of the weight.
    """

    prefix = "point_lora"

    def __init__(
        self, weight: str, shape: tuple[int, int], r: int, scale: float, shared: str | None, shared_scale: float
    ) -> None:
        super().__init__()
        outputs, inputs = shape
        self.weight = weight
        self.scale = scale
        self.shared = shared
        self.shared_scale = shared_scale
        self.mergeable = shared is None
        self.lora_A = nn.Linear(inputs, r, bias=False)
        self.lora_B = nn.Linear(r, outputs, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        update = self.scale * self.lora_B(self.lora_A(x))
        if self.shared is not None:
            mlp = call.state("shared_mlps", SharedMlps).shared_mlps[self.shared]
            update = update + self.shared_scale * mlp(x)
        return output + update.to(output.dtype)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        weight: Tensor = getattr(module, self.weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = self.scale * self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide)
        return {self.weight: (weight.to(wide) + update).to(weight.dtype)}

    def act_by_weight(self, path: str) -> None:
        if not self.mergeable:
            raise AnatomyError(
                f"'{path}' is not called as a layer, its weights are read, so the shared MLP beside it has no input: "
                "set shared_mlp_width=0 to do without, or use LORA"
            )
        super().act_by_weight(path)
