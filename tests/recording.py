"""Recording a forward whose sequence holds further tokens, in the order of the golden files: these last."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from point_peft import PointPeftModel
from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.heads import PooledHead
from point_peft.backbones import PointTransformer
from point_peft.running.forward import current_forward


class Sequences:
    """Keeps what modules get and return. Made before the model is adapted, so that the norm's output is whole."""

    def __init__(self, model: PointTransformer) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.apart: Counter[str] = Counter()
        self.model = model
        model.norm.register_forward_hook(lambda module, args, output: self._keep("final_norm", output))

    def _keep(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value

    def _count(self, name: str, value: Tensor, peft: PointPeftModel) -> None:
        """The model's own call is the first in the official code; the adapter's may here come before it."""
        number = 0
        if current_forward(peft).apart:
            self.apart[name] += 1
            number = self.apart[name]
        self._keep(f"{name}.call{number}", value)

    def adapted(self, peft: PointPeftModel, adapter: str) -> None:
        """Record what the parts of an adapter have changed too."""
        model, head = self.model, dict(get_adapter(peft, adapter).own_modules())["cls_head_finetune"]
        assert isinstance(head, PooledHead)
        head.register_forward_pre_hook(lambda module, args: self._keep("head_in", args[0]))
        model.group_divider.register_forward_hook(lambda module, args, output: self._keep("centres", output[1]))
        model.encoder.register_forward_hook(lambda module, args, output: self._count("patch_tokens", output, peft))
        model.pos_embed.register_forward_hook(lambda module, args, output: self._count("pos", output, peft))
        for number, block in enumerate(model.blocks.blocks):
            self._block(peft, adapter, number, block)

    def _block(self, peft: PointPeftModel, adapter: str, number: int, block: torch.nn.Module) -> None:
        patches = self.model.group_divider.num_group

        def enters(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            prefix, further, own = torch.split(args[0], [1, args[0].shape[1] - 1 - patches, patches], dim=1)
            self._keep(f"block_in.{number}", torch.cat([prefix, own, further], dim=1))

        def leaves(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            (further,) = current_forward(peft).handover.left(adapter, "prompts")
            self._keep(f"block_out.{number}", torch.cat([output, further], dim=1))

        block.register_forward_pre_hook(enters)
        block.register_forward_hook(leaves)
