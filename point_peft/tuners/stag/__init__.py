"""STAG: a narrow graph network runs beside the frozen backbone and displaces the tokens of its later blocks.

T. Furuya: "Token Adaptation via Side Graph Convolution for Efficient Fine-tuning of 3D Point Cloud Transformers", 2025,
https://arxiv.org/abs/2502.14142

At every block l, with prefix tokens z and patch tokens t at coordinates c (positions are not in t), side tokens s start
at zero:

    s   <- s + D t                                          ahead of the block: c -> w, w = 192
    t   <- Block(z, t)
    s_i <- W (W_1 s_i + max_j W_2 s_j)                      after it, l >= L/2: j are the 8 nearest of c_i, itself too
    v   =  g relu(U s)                                      w -> c
    t   <- t + v,   z <- z + mean v

"std" has one D and one graph module (W_1, W_2, W, U) for all blocks. "sl", slightly large, has a D for every three
blocks and a graph module for every two.

When to use it: where memory and time of training are short. Nothing before the first displacement needs a gradient
through the backbone, so the first half of the blocks is run forward only. It needs coordinates, but no prompts.

Deviations from the published code, each with its reason:

- `init="identity"` (the default) multiplies each graph module's displacement by a learned gate g that starts at zero:
  a fresh adapter is the backbone, for one parameter a graph module more than published (1 in "std", 3 in "sl" on 12
  blocks). An up-projection of zero would not do: relu has no gradient there, and nothing would ever be trained.
  `init="published"` has no gate.
- The base's own head is the default. The published one, `heads={...: "raw_mean"}`, pools the mean over all tokens ahead
  of the final norm.
- Which blocks have a graph module is written down for 12 blocks; in others it is the second half. Where stages differ
  in their tokens, each has side tokens of its own, as far as a block of it is displaced.
- W_2 is taken once per token and then gathered, and the maximum is taken before W_1 s_i is added to it, which does not
  depend on j: the result is the same.
- Packed tokens (PTv3 and the like) find their neighbours within their sample.
"""

from __future__ import annotations

from point_peft.tuners.stag.config import STAGConfig

__all__ = ["STAGConfig"]
