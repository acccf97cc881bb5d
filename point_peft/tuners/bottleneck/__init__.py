"""Bottleneck adapters: two small linear layers with an activation between, added to what a block's layers give.

houlsby: N. Houlsby, A. Giurgiu, S. Jastrzebski, B. Morrone, Q. de Laroussilhe, A. Gesmundo, M. Attariyan, S. Gelly:
"Parameter-Efficient Transfer Learning for NLP", ICML 2019, https://arxiv.org/abs/1902.00751

pfeiffer: J. Pfeiffer, A. Kamath, A. Rücklé, K. Cho, I. Gurevych: "AdapterFusion: Non-Destructive Task Composition for
Transfer Learning", EACL 2021, https://arxiv.org/abs/2005.00247

adaptformer: S. Chen, C. Ge, Z. Tong, J. Wang, Y. Song, J. Wang, P. Luo: "AdaptFormer: Adapting Vision Transformers for
Scalable Visual Recognition", NeurIPS 2022, https://arxiv.org/abs/2205.13535

In every block, with h the output of the attention's projection or of the MLP, and u what the MLP gets:

    A(x) = W_up dropout(activation(W_down x + b_down)) + b_up       c -> r -> c
    h <- h + s A(h)             "houlsby": after the attention and after the MLP; "pfeiffer": after the MLP
    h <- h + s A(u)             "adaptformer": beside the MLP

The up-projection starts at zero, so a fresh adapter changes nothing. It cannot be merged, the activation is in between.

When to use it: "pfeiffer" or "adaptformer" where there is data enough for something that is more than a change of
weights, and a little more time at inference does not matter; "houlsby" has twice the parameters of "pfeiffer". LoRA
costs nothing once it is merged.

Deviations from the published code, each with its reason:

- No norm of its own in an adapter, and none of the backbone is moved or trained: the papers on language adapt post-norm
  blocks, the backbones here are pre-norm. `NORM_TUNING` in the same adapter trains the norms.
- All down-projections start as AdaptFormer's (Kaiming uniform), and all up-projections at exactly zero instead of near
  it: a fresh adapter then is the backbone.
- The adapter after the MLP acts inside the backbone's stochastic depth: what a hook on the MLP sees.
- Where an attention's projection is not called (`nn.MultiheadAttention`), "houlsby" acts on what the attention gives.
"""

from __future__ import annotations

from point_peft.tuners.bottleneck.config import BottleneckConfig

__all__ = ["BottleneckConfig"]
