"""The parts of SSF: one at a norm or a linear layer, one at a module that makes patch tokens."""

from __future__ import annotations

from point_peft.parts.scale_shift import LayerScaleShift, PatchScaleShift


class ScaleShiftPart(LayerScaleShift):
    """y <- gamma * y + beta on what a linear layer or a norm gives."""

    prefix = "ssf"


class PatchPart(PatchScaleShift):
    """t <- gamma * t + beta on patch tokens."""

    prefix = "ssf"
