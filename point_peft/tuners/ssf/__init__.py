"""SSF: the features of the frozen backbone are scaled and shifted, channel by channel.

D. Lian, D. Zhou, J. Feng, X. Wang: "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
NeurIPS 2022, https://arxiv.org/abs/2210.08823

After the patch embedding, every norm and every linear layer of the blocks, and the final norm, with trained gamma and
beta, one value a channel each:

    y <- gamma * y + beta
    W <- gamma W by rows,   b <- gamma * b + beta       the same, folded into a layer (W, b); a norm's weight is a row

gamma starts at one and beta at zero, so a fresh adapter changes nothing. Where the layer is a linear one, both can be
folded into it and cost nothing at inference.

When to use it: a strong default when only channel statistics have to move, as between data sets of one kind of object;
it trains every layer's features for the price of two vectors. Where it is to be merged, set `only_mergeable=True`.

Deviations from the published code, each with its reason:

- gamma and beta start at exactly one and zero instead of near them (normal, 0.02): a fresh adapter then is the
  backbone.
- The tokens of a point patch are the largest of its points' features. A negative gamma does not commute with a maximum,
  so what is at such an embedding acts on the tokens and cannot be merged. Nor can beta where a layer has no bias, as
  the qkv of Point-MAE. Merging then is refused, and `only_mergeable=True` leaves both out.
- A layer that makes keys alone gets no beta: a softmax takes a shift of all keys away, so it would get no gradient.
- Where an attention holds the bias of its fused projection itself and only its weight is read (EVA), gamma scales the
  weight alone, and there is no beta.
"""

from dataclasses import dataclass
from typing import ClassVar

from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.scale_shift import LayerScaleShift, PatchScaleShift, block_sites, patch_taps, scale_shift_parts


@dataclass(frozen=True, kw_only=True)
class SSFConfig(TunerConfig):
    """SSF; `target_modules` and `exclude_modules` name norms, linear layers, and modules that make patch tokens.

    `target_modules=None` means the patch embedding where it is known, the norms and all linear layers of every block,
    and the final norm; with `layers_to_transform`, what lies in these blocks alone. The fused projection of an
    `nn.MultiheadAttention` is meant by the name of the attention itself.
    """

    method: ClassVar[str] = "SSF"

    only_mergeable: bool = False
    """Leave out what cannot be folded into the backbone's weights: the shift of a layer without bias, and the patch
    embedding where the module that ends it is not a linear layer."""

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        paths = self.chosen_modules(backbone, block_sites, ahead=patch_taps(anatomy), behind=anatomy.final_norms)
        parts = scale_shift_parts(backbone, self.method, paths, ScaleShiftPart, PatchPart, self.only_mergeable)
        if not parts:
            raise AnatomyError(f"{self.method} with only_mergeable=True leaves nothing to scale")
        return Blueprint(parts=parts)


class ScaleShiftPart(LayerScaleShift):
    """y <- gamma * y + beta on what a linear layer or a norm gives."""

    prefix = "ssf"


class PatchPart(PatchScaleShift):
    """t <- gamma * t + beta on patch tokens."""

    prefix = "ssf"
