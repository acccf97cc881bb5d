"""The parts of IA3: one where keys and values are made, one on what the last layer of an MLP gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from point_peft.parts.base import Call, Part
from point_peft.running.nested import Args, Kwargs, fetch_argument, put_argument


class KeyValuePart(Part):
    """y <- l * y for the rows of y that are keys and values; `roles` says which are there, as "qkv", in their order."""

    prefix = "ia3"
    mergeable = True

    def __init__(self, roles: str, rows: int, inside: str = "") -> None:
        super().__init__()
        self.queries = roles.count("q") * rows // len(roles)
        """Rows ahead of the keys and values, which stay as they are."""
        self.names = f"{inside}weight", f"{inside}bias"
        self.scale = nn.Parameter(torch.ones(rows - self.queries))

    def _rows(self) -> Tensor:
        return nn.functional.pad(self.scale, (self.queries, 0), value=1.0)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return output * self._rows().to(output.dtype)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        rows, weight, bias = self._rows(), getattr(module, self.names[0]), getattr(module, self.names[1])
        scaled = {self.names[0]: weight * rows[:, None]}
        return scaled if bias is None else {**scaled, self.names[1]: bias * rows}


class HiddenPart(Part):
    """x <- l * x for what a linear layer gets; folded in, W <- W l by columns."""

    prefix = "ia3"
    mergeable = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        steps: tuple[int | str, ...] = (0,) if args else ("input",)
        x = fetch_argument(args, kwargs, steps)
        return put_argument(args, kwargs, steps, x * self.scale.to(x.dtype))

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        weight: Tensor = getattr(module, "weight")  # noqa: B009 - a replica's is a tensor
        return {"weight": weight * self.scale}
