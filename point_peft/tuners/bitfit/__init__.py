"""BitFit: only biases are trained.

E. Ben Zaken, S. Ravfogel, Y. Goldberg: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022, https://arxiv.org/abs/2106.10199

The tuned biases are the adapter's own copies; they act as differences to those of the backbone.
"""

from __future__ import annotations

from point_peft.tuners.bitfit.config import BitFitConfig

__all__ = ["BitFitConfig"]
