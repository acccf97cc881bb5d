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

from __future__ import annotations

from point_peft.tuners.ssf.config import SSFConfig

__all__ = ["SSFConfig"]
