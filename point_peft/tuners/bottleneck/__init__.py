"""Bottleneck adapters: two small linear layers with an activation between, added to what a block's layers give.

houlsby: N. Houlsby, A. Giurgiu, S. Jastrzebski, B. Morrone, Q. de Laroussilhe, A. Gesmundo, M. Attariyan, S. Gelly:
"Parameter-Efficient Transfer Learning for NLP", ICML 2019, https://arxiv.org/abs/1902.00751

pfeiffer: J. Pfeiffer, A. Kamath, A. Rücklé, K. Cho, I. Gurevych: "AdapterFusion: Non-Destructive Task Composition for
Transfer Learning", EACL 2021, https://arxiv.org/abs/2005.00247

adaptformer: S. Chen, C. Ge, Z. Tong, J. Wang, Y. Song, J. Wang, P. Luo: "AdaptFormer: Adapting Vision Transformers for
Scalable Visual Recognition", NeurIPS 2022, https://arxiv.org/abs/2205.13535

In every block, with h the output of the attention's projection or of the MLP, and u what the MLP gets:

    A(x) = W_up dropout(activation(W_down x + b_down)) + b_up       c -> r -> c
    h <- h + s A(h)             "houlsby": after the attention and after the MLP; "pfeiffer": after the MLP
    h <- h + s A(u)             "adaptformer": beside the MLP

The up-projection starts at zero, so a fresh adapter changes nothing. It cannot be merged, the activation is in between.

When to use it: "pfeiffer" or "adaptformer" where there is data enough for something that is more than a change of
weights, and a little more time at inference does not matter; "houlsby" has twice the parameters of "pfeiffer". LoRA
costs nothing once it is merged.

Deviations from the published code, each with its reason:

- No norm of its own in an adapter, and none of the backbone is moved or trained: the papers on language adapt post-norm
  blocks, the backbones here are pre-norm. `NORM_TUNING` in the same adapter trains the norms.
- All down-projections start as AdaptFormer's (Kaiming uniform), and all up-projections at exactly zero instead of near
  it: a fresh adapter then is the backbone.
- The adapter after the MLP acts inside the backbone's stochastic depth: what a hook on the MLP sees.
- Where an attention's projection is not called (`nn.MultiheadAttention`), "houlsby" acts on what the attention gives.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import nn

from point_peft.anatomy.description import Anatomy, Block
from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call, Narrow, Part
from point_peft.parts.bottleneck import Bottleneck
from point_peft.parts.sequence import EntrancePart, at_mlp, mlp_of
from point_peft.running.nested import Args, Kwargs, fetch, put
from point_peft.schema import Dropout, Limit

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(TunerConfig):
    """Bottleneck adapters; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "BOTTLENECK"

    placement: Literal["houlsby", "pfeiffer", "adaptformer"] = "pfeiffer"
    """After attention and MLP, after the MLP, or beside the MLP."""
    width: Annotated[int | None, Limit("1 or more, or None", lambda width: width >= 1)] = None
    """The channels r in the middle; None: 64 for "adaptformer", else 16."""
    scale: Annotated[float | None, Limit("more than 0, or None", lambda scale: scale > 0)] = None
    """The factor s of what is added; None: 0.1 for "adaptformer", else 1."""
    dropout: Dropout = 0.0
    """Dropout in the middle."""
    activation: Literal["gelu", "relu"] | None = None
    """None: as published, GELU for "houlsby", else ReLU."""

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        plan = Blueprint()
        for _, block in self.chosen_blocks(backbone):
            channels = anatomy.stages[anatomy.stage_of(block)].width
            scale = (0.1 if self.placement == "adaptformer" else 1.0) if self.scale is None else self.scale
            mlp = mlp_of(block, self.method)
            if self.placement == "houlsby":
                site = _attention_output(backbone, anatomy, block)
                plan.parts.append((site, SerialPart(self._adapter(channels), scale)))
            if self.placement != "adaptformer":
                plan.parts.append((mlp, SerialPart(self._adapter(channels), scale)))
            else:
                plan.parts += at_mlp(block, ParallelPart(self._adapter(channels), scale, block))
        return plan

    def _adapter(self, channels: int) -> Bottleneck:
        large, activation = self.placement == "adaptformer", self.activation
        if activation is None:
            activation = "gelu" if self.placement == "houlsby" else "relu"
        width = (64 if large else 16) if self.width is None else self.width
        adapter = Bottleneck(channels, width, self.dropout, _ACTIVATIONS[activation]())
        nn.init.kaiming_uniform_(adapter.down.weight, a=math.sqrt(5))
        nn.init.zeros_(adapter.down.bias)
        adapter.zero_up()
        return adapter


def _attention_output(backbone: Backbone, anatomy: Anatomy, block: Block) -> str:
    """The module that gives what the attention adds to the tokens: its projection, itself where that is not called."""
    read = {read.module for read in anatomy.reads}
    attention = block.path if block.attention is None else block.attention
    inside = isinstance(backbone.modules[attention], nn.MultiheadAttention)
    if block.projection is not None and not inside and block.projection not in read:
        return block.projection
    if attention == block.path:
        raise AnatomyError(
            f"'{block.path}' has no attention of its own to put an adapter after: use placement=\"pfeiffer\", or name "
            "its projection in config.anatomy"
        )
    return attention


class SerialPart(Part):
    """h <- h + scale * A(h), on the output h of a module, or the first of its outputs."""

    prefix = "bottleneck"

    def __init__(self, adapter: Bottleneck, scale: float) -> None:
        super().__init__()
        self.adapter = adapter
        self.scale = scale

    @property
    def narrow(self) -> Narrow:
        return Narrow(self.adapter.down, self.adapter.up)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        steps = (0,) if isinstance(output, tuple) else ()
        h = fetch(output, steps)
        return put(output, steps, h + self.scale * self.adapter(h).to(h.dtype))


class ParallelPart(EntrancePart):
    """h <- h + scale * A(u), with u what the MLP gets."""

    prefix = "bottleneck"

    def __init__(self, adapter: Bottleneck, scale: float, block: Block) -> None:
        super().__init__(block)
        self.adapter = adapter
        self.scale = scale

    @property
    def narrow(self) -> Narrow:
        return Narrow(self.adapter.down, self.adapter.up)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return output + self.scale * self.adapter(self.entrance(call, args, kwargs)).to(output.dtype)
