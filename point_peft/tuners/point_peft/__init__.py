"""Point-PEFT: a point-prior prompt and a geometry-aware adapter.

Y. Tang, R. Zhang, Z. Guo, X. Ma, B. Zhao, Z. Wang, D. Wang, X. Li: "Point-PEFT: Parameter-Efficient Fine-Tuning for
3D Pre-trained Models", AAAI 2024, https://arxiv.org/abs/2310.03059

At every block l of the backbone, with prefix tokens x, prompts p and patch tokens t at coordinates c:

    p_l = dropout(E_l) + CPA_l(P)           learned prompts and the prior of this cloud (first layers only; `prompt`)
    h   <- h + 0.7 A_16(h)                  after the MLP, before the residual sum (`bottleneck`)
    U   = [p; t] at [Q; c], or t at c       tokens and where they are
    N_j = U gathered around centre j        farthest point sampling, k nearest neighbours
    N_j <- N_j + LA(LN(N_j))                local attention, one module for all layers (`geometry_aware`)
    v_j = GELU(BN(max N_j)) + 0.3 U_j
    t_i <- t_i + 0.3 sum_j w_ij v_j         w_ij = (1 / d_ij^2) / sum over all centres
    x   <- x + A_16(x)                      for all tokens, then the prompts are taken out

The prior P = [q; f; V] of a cloud is its own feature q, the top rows V of a memory bank of training features most like
it, and their softmax mean f: attention without parameters (`prior`).

Deviations from the published code, each with its reason:

- Neighbourhoods are gathered per sample and prompts have the coordinates Q of their own. The published gather uses
  the wrong batch stride, so that a sample's output depended on its batch mates, and pairs tokens with coordinates of
  others.
- `init="identity"` (the default) starts the up-projections at zero and multiplies what is propagated by a learned gate
  that starts at zero, one scalar a layer (the 12 parameters that Point-MAE has more than published). A fresh adapter is
  then the backbone plus prompts. `init="published"` starts as published and has no gate.
- No parameters exist that the forward cannot reach (62,268 in the published Point-MAE variant).
- The adapter after the MLP acts inside the backbone's stochastic depth, not outside: what a hook on the MLP sees.
- The bank belongs to the adapter and is saved with it, in half precision.
- Packed tokens (PTv3 and the like) get no prompts, their attention has no place for them. Centres are chosen within
  blocks of at most 1024 points of a sample, and the k nearest of them reach a token, not all: a scene has too many.
- Where stages differ in width all blocks get prompts, and those as wide as the features the prior: as published for
  Point-M2AE.
- Where the prediction is made from the prefix tokens alone, the last block has no geometry-aware adapter: nothing
  would read it.
- The values that the base had for its prefix tokens are saved beside the trained ones, because a checkpoint may lack
  them: the second pass that queries the bank must be that of the base which was trained on.
"""

from point_peft.tuners.point_peft.config import PointPEFTConfig

__all__ = ["PointPEFTConfig"]
