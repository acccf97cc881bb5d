"""IA3: keys, values and the hidden activation of the MLP are scaled, channel by channel.

H. Liu, D. Tam, M. Muqeeth, J. Mohta, T. Huang, M. Bansal, C. Raffel: "Few-Shot Parameter-Efficient Fine-Tuning is
Better and Cheaper than In-Context Learning", NeurIPS 2022, https://arxiv.org/abs/2205.05638

In every block, with trained vectors l_k, l_v and l_ff that start at one:

    softmax(q (l_k * k)^T / sqrt(d)) (l_v * v)
    W_2 (l_ff * activation(W_1 x + b_1)) + b_2

l_ff acts on what the last linear layer of the MLP gets, after the activation and not on the output of the first layer.
All three are changes of weights: l_k and l_v of the rows that make keys and values, l_ff of the columns of W_2.

When to use it: where an adapter must be as small as it can be, or is trained on a few clouds a class; with more data it
has less to give than LoRA or SSF. Merged, it costs nothing.

Deviations from the published code, each with its reason:

- The rows of one fused layer are taken to be queries, keys and values in this order, a third each, as in every
  point-cloud transformer known to us; where the layers are apart, their names must tell which is which.
- Where an attention holds the bias of its fused projection itself and only its weight is read (EVA), that bias is not
  scaled.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Block
from point_peft.anatomy.structure import linear_shape, mlp_linears, projects
from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call, Part
from point_peft.running.nested import Args, Kwargs, fetch_argument, put_argument


@dataclass(frozen=True, kw_only=True)
class IA3Config(TunerConfig):
    """IA3; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "IA3"

    scale_mlp: bool = True
    """Scale the hidden activation of the MLP too; blocks without an MLP need False."""

    def build(self, backbone: Backbone) -> Blueprint:
        plan = Blueprint()
        for _, block in self.chosen_blocks(backbone):
            plan.parts += self._keys_and_values(backbone, block)
            if self.scale_mlp:
                plan.parts.append(self._hidden(backbone, block))
        return plan

    def _keys_and_values(self, backbone: Backbone, block: Block) -> list[tuple[str, Part]]:
        if block.attention is None:
            raise AnatomyError(
                f"{self.method} scales the keys and values of attentions, and '{block.path}' has none: use LORA or SSF"
            )
        if not block.qkv:
            attention = backbone.modules[block.attention]
            fused = attention._parameters.get("in_proj_weight")
            if not isinstance(attention, nn.MultiheadAttention) or fused is None:
                raise AnatomyError(f"{self.method}: '{block.attention}' has no one projection of keys and values")
            part = KeyValuePart("qkv", fused.shape[0], "in_proj_")
            part.act_by_weight(block.attention)
            return [(block.attention, part)]
        made = {path: projects(block, path) for path in block.qkv}
        if {"k", "v"} - set("".join(made.values())):
            raise AnatomyError(
                f"{self.method} scales keys and values, and the names of {', '.join(map(repr, block.qkv))} do not tell "
                "which of them makes these"
            )
        shapes = {path: linear_shape(backbone.modules[path]) or (0, 0) for path in block.qkv}
        return [(path, KeyValuePart(roles, shapes[path][0])) for path, roles in made.items() if {"k", "v"} & set(roles)]

    def _hidden(self, backbone: Backbone, block: Block) -> tuple[str, Part]:
        ends = mlp_linears(block)
        if ends is None:
            raise AnatomyError(
                f"{self.method} scales the hidden activation of every MLP, and '{block.path}' has none that was found: "
                "set scale_mlp=False to do without, or name it in config.anatomy"
            )
        width = (linear_shape(backbone.modules[ends[1]]) or (0, 0))[1]
        return ends[1], HiddenPart(width)


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
