"""GAPrompt: prompts among the points of the cloud and among its tokens, led by a small network that sees its shape.

Z. Ai, Z. Liu, Y. Lei, Z. Cui, X. Zou, J. Zhou: "GAPrompt: Geometry-Aware Point Cloud Prompt for 3D Vision Model",
ICML 2025, https://arxiv.org/abs/2505.04119

A small PointNet++, the shift net, sees the cloud X before it is grouped. It moves every point, and its code of the
whole cloud becomes the shape z, one vector. Five learned points P join the cloud. So the tokens t, at coordinates c,
are those of another cloud:

    f, code = shift net(X)                      sin and cos of the coordinates, two levels of pooling, and back
    X <- [X + 0.8 f X; 5 P]                     products of coordinates
    z = MLP(code)

At every block, the first six with prompts p of learned embeddings E and coordinates Q:

    p = E + 0.5 z + pos(Q)                      pos: the backbone's own positional embedding
    [x; p; t] <- Block([x; p; t])
    U = [p; t] at [Q; c], or t at c             without prompts
    v_j = GELU(BN(2 max N_j)) + 0.3 U_j         N_j: the 16 nearest of a centre j, farthest point sampling
    t_i <- t_i + 0.3 sum_j w_ij v_j             w_ij = (1 / d_ij^2) / sum over all centres
    t <- t + 0.7 A_16(LN(t + 0.5 z))            without prompts: LN(t); then the prompts are taken out

The prefix tokens and their positions are trained too. The backbone's own head is the default. The published head pools
the shape beside the tokens: `heads={"cls_head_finetune": "cls+max+feature"}`.

When to use it: for classification where the cloud itself may be changed, as of scans that differ from those of the
pre-training. A training step costs as much as full fine-tuning's, because the gradient goes back through the tokenizer
to the cloud. `shift=False, point_prompts=0` leaves the cloud alone.

Deviations from the published code, each with its reason:

- `geometry="consistent"` (the default): prompts have the coordinates Q, and neighbours are gathered per sample. All
  published configurations gather across samples, so that a sample's output depended on its batch mates.
  `geometry="replacement"` is the published variant without that: prompts in the place of the last tokens.
- `init="identity"` (the default) starts the shift and the up-projections at zero and multiplies what is propagated by
  a learned gate that starts at zero, one scalar a block (12 parameters in Point-MAE). A fresh adapter is then the
  backbone with its prompts. `init="published"` has no gate.
- No parameters exist that the forward cannot reach: 27,660 of the 262,308 published in Point-MAE (the prompts of blocks
  that get none, and an unused scale in every adapter).
- The shift net's layers act on every point once, ahead of the pooling, not on every copy of it in a neighbourhood. That
  is the same function; in training, BatchNorm sees each point once. There is no dropout in its MLPs.
- Of fewer points than centres or neighbours, the shift net takes all; its code ends in zeros.
- Colours and the like that are grouped with the points have their mean at the learned points.
- Prompts have no positions where the backbone's positions are not made of coordinates alone. A backbone of several
  stages has coordinates and a shape for the prompts of each.
- Where the prediction is made from the prefix tokens alone, nothing acts on the last block's patches.
"""

from __future__ import annotations

from point_peft.tuners.ga_prompt.config import GAPromptConfig

__all__ = ["GAPromptConfig"]
