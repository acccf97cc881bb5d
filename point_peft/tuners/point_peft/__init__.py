"""Point-PEFT: a point-prior prompt and a geometry-aware adapter.

Y. Tang, R. Zhang, Z. Guo, X. Ma, B. Zhao, Z. Wang, D. Wang, X. Li: "Point-PEFT: Parameter-Efficient Fine-Tuning for
3D Pre-trained Models", AAAI 2024, https://arxiv.org/abs/2310.03059

At every adapted block l, with prefix tokens x, prompts p and patch tokens t at coordinates c:

    x   <- x + e                            at the first one, unless that is the backbone's first
    t_i <- t_i + z_i                        at the first one: the points around the token (`neighbourhood`)
    p_l = dropout(E_l)                      learned prompts (first layers only; `prompt`)
    p_l = dropout(E_l) + CPA_l(P)           the same with a memory bank: and the prior of this cloud
    h   <- h + 0.7 A_16(h)                  after the MLP, before the residual sum (`bottleneck`)
    U   = [p; t] at [Q; c], or t at c       tokens and where they are
    N_j = U gathered around centre j        farthest point sampling, k nearest neighbours
    N_j <- N_j + LA(LN(N_j))                local attention, one module for all layers (`geometry_aware`)
    v_j = GELU(BN(max N_j)) + 0.3 U_j
    t_i <- t_i + 0.3 sum_j w_ij v_j         w_ij = (1 / d_ij^2) / sum over all centres
    x   <- x + A_16(x)                      for all tokens, then the prompts are taken out

A small PointNet sees the points p_j around the centre c_i of each token, every eighth of the 128 nearest:

    z_i = W3 GELU(LN(max_j W2 GELU(LN(W1 [(p_j - c_i) / r_i; c_i; r_i]))))          r_i = max_j |p_j - c_i|

With `memory_bank=True`, to be filled by `model.build_memory_bank(batches)`, the prompts get the prior P = [q; f; V] of
a cloud: its own feature q, the top rows V of a memory bank of training features most like it, and their mean f, which
is attention without parameters (`prior`). With u = max_i t_i of the patches that enter the first adapted block, and
mean m and deviation s of u / |u| over the bank, channel by channel:

    q   = n((u / |u| - m) / s)              n(v) = v / |v|; the rows of the bank are training features made the same way
    f   = sum_k a_k V_k                     a = softmax(20 q V^T)

`PointPEFTConfig.published()` is the method of the paper: every block is adapted, there is a bank, and neither e nor z;
u is of the frozen backbone's last block, q = u and a = softmax(n(u) V^T), V of unit length. Files that do not state the
fields of the default were made so, and are read so.

When to use it: first. It is level with full fine-tuning or better on the sets of `docs/accuracy.md`, at 4 % of the
parameters; where the people or objects to come are unlike those of the training, PointLoRA and PPT can be better.

Deviations from the published code, each with its reason:

- By default the last half of the blocks is adapted (`adapted_share`), published: all; packed tokens: all, as the first
  blocks see a scene in detail. The blocks ahead of them are the frozen backbone then, and run without gradients.
- There is no memory bank by default (`memory_bank=False`), published: there is. In our runs it has not helped so far
  (`docs/accuracy.md`). What follows of the query and of likenesses is of adapters that have one.
- By default an encoder of neighbourhoods adds z to the tokens at the first adapted block (`neighbourhood_width`),
  published: nothing. The patch embedding is frozen and made for the points of the pre-training; what it has lost of
  others, no later block can find again. W3 starts at zero. Where it is not known where the model sees its clouds, or
  tokens are packed, there is none.
- The query is what enters the first adapted block (`prior="block"`), published: what the frozen backbone gives after
  its last block, for which it runs a second time (`prior="backbone"`). Only where something else has acted ahead of
  that block, such as another method, is there a second pass, and it ends there. While training, the blocks ahead are
  in the mode that they are in: where they have stochastic depth, the query has it too.
- Features are standardised and likenesses multiplied by a temperature; published: neither. As they are, features of
  any two clouds point nearly the same way, and a is nearly uniform.
- Where the backbone's first block is not adapted, its prefix tokens and their positions are not trained: that would
  need gradients through all blocks. What they are at the first adapted block is (e, `prefix_shift`), unless
  `tuned_tokens` says otherwise. The values that the base had for them are saved and take the place of another base's.
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
