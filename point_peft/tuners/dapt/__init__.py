"""DAPT: an adapter with a scale for every token beside the MLP, whose outputs become prompts of the blocks after it.

X. Zhou, D. Liang, W. Xu, X. Zhu, Y. Xu, Z. Zou, X. Bai: "Dynamic Adapter Meets Prompt Tuning: Parameter-Efficient
Transfer Learning for Point Cloud Analysis", CVPR 2024, https://arxiv.org/abs/2403.01439

Every feature of the backbone is scaled and shifted channel by channel: the patch tokens, what norms and linear layers
of the blocks give, the prompts, and what the final norm gives. Prefix tokens are trained. In block l, with u what the
MLP gets and x all tokens of the sequence:

    TFTS(z) = gamma * z + beta                                          one value a channel each
    d(u)    = relu(w_s LN(u) + b_s) * (W_up dropout(GELU(W_down LN(u) + b_down)) + b_up)        c -> r -> c, r = 64
    x       <- x + MLP(u) + d(u)
    p_l     = TFTS(mean of GELU(d(u)) over all tokens)
    P_l     = [p_l; P_(l-1)]                                            goes in after the prefix, ahead of the patches

The sequence so has one token more after every block. The published head pools [cls; mean of P; max of patches]:
`heads={"cls_head_finetune": "cls+prompt+max"}`.

When to use it: where the points that matter differ from cloud to cloud, as in real scans with background, and a few
more parameters (0.7 M on Point-MAE) do not hurt. Its authors say that results depend on the dropout.

Deviations from the published code, each with its reason:

- Positions are added as the backbone was trained with them. The published code adds them ahead of the first block only,
  to a Point-MAE that was trained with them ahead of every block: `position="once"`.
- `init="identity"` (the default) starts gamma at one and beta at zero, not near them (normal, 0.02): a fresh adapter is
  the backbone plus its prompts. In both the up-projection starts at zero.
- The scale of every token starts at one, its weight at zero. From a random start it can be zero for all tokens, and
  then relu lets no gradient through to the adapter.
- The base's own head is the default. What the last block would make a prompt of, nothing reads then, so it makes none:
  768 parameters less on Point-MAE than the 721,932 that were published without the head.
- Between two blocks the base has its own tokens only; the prompts are handed on beside them and get no positions.
- Stages of different tokens have prompts of their own. Packed tokens have no place for prompts: the adapters and TFTS
  remain with `internal_prompts=False`.
- A layer that makes keys alone gets no beta, nor one without a bias of which another module reads the weight: it would
  have no effect.
"""

from __future__ import annotations

from point_peft.tuners.dapt.config import DAPTConfig

__all__ = ["DAPTConfig"]
