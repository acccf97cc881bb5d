"""Linear probing: the backbone stays as it is, only the heads of the adapter are trained.

G. Alain, Y. Bengio: "Understanding intermediate layers using linear classifier probes", ICLR 2017 workshop,
https://arxiv.org/abs/1610.01644

    logits = head(backbone(points))         the backbone frozen

The head is a trained copy of the backbone's, or another that `heads` gives: a single linear layer for probing proper,
or an MLP, as the research on point clouds mostly means by it.

When to use it: to see what a pre-trained backbone knows by itself, and as the baseline that every other method has to
beat; it needs no gradient through the backbone, so a step costs about as much as inference.
"""

from __future__ import annotations

from point_peft.tuners.linear_probe.config import LinearProbeConfig

__all__ = ["LinearProbeConfig"]
