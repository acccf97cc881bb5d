"""IA3: keys, values and the hidden activation of the MLP are scaled, channel by channel.

H. Liu, D. Tam, M. Muqeeth, J. Mohta, T. Huang, M. Bansal, C. Raffel: "Few-Shot Parameter-Efficient Fine-Tuning is
Better and Cheaper than In-Context Learning", NeurIPS 2022, https://arxiv.org/abs/2205.05638

In every block, with trained vectors l_k, l_v and l_ff that start at one:

    softmax(q (l_k * k)^T / sqrt(d)) (l_v * v)
    W_2 (l_ff * activation(W_1 x + b_1)) + b_2

l_ff acts on what the last linear layer of the MLP gets, after the activation and not on the output of the first layer.
All three are changes of weights: l_k and l_v of the rows that make keys and values, l_ff of the columns of W_2.

When to use it: where an adapter must be as small as it can be, or is trained on a few clouds a class; with more data it
has less to give than LoRA or SSF. Merged, it costs nothing.

Deviations from the published code, each with its reason:

- The rows of one fused layer are taken to be queries, keys and values in this order, a third each, as in every
  point-cloud transformer known to us; where the layers are apart, their names must tell which is which.
- Where an attention holds the bias of its fused projection itself and only its weight is read (EVA), that bias is not
  scaled.
"""

from __future__ import annotations

from point_peft.tuners.ia3.config import IA3Config

__all__ = ["IA3Config"]
