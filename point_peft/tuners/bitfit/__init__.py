"""BitFit: only biases are trained.

E. Ben Zaken, S. Ravfogel, Y. Goldberg: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022, https://arxiv.org/abs/2106.10199

The norms and linear layers of every block, and the final norm, get trained copies b of the biases that they have:

    y = W x + b

They are the adapter's own. Plain layers run with them in the place of the backbone's; to what others give, the
difference is added. Merged, they take their place for good.

When to use it: as a baseline, or where an adapter has to be small and any method that adds to the network is too much.
It needs a backbone that has biases, and moves features less than LoRA or SSF can.

Deviations from the published code, each with its reason:

- Query, key and value layers are left out by default: in point-cloud transformers most have no bias, and of those
  that have one, a softmax takes that of the keys away. `target_modules` can name them.
"""

from __future__ import annotations

from point_peft.tuners.bitfit.config import BitFitConfig

__all__ = ["BitFitConfig"]
