"""LoRA: low-rank updates of linear layers and 1-D convolutions, with DoRA, rank stabilisation and a choice of q, k, v.

E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen: "LoRA: Low-Rank Adaptation of Large
Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685. With `use_dora`: S.-Y. Liu, C.-Y. Wang, H. Yin,
P. Molchanov, Y.-C. F. Wang, K.-T. Cheng, M.-H. Chen: "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024,
https://arxiv.org/abs/2402.09353. With `use_rslora`: D. Kalajdzievski: "A Rank Stabilization Scaling Factor for
Fine-Tuning with LoRA", https://arxiv.org/abs/2312.03732.

Every adapted weight gets two small factors A (r, in) and B (out, r), whose product is added to it. DoRA also learns the
length of every row of the sum, which begins as the length of the base's row:

    y = W x + s B A dropout(x),   s = alpha / r, or alpha / sqrt(r) with `use_rslora`
    DoRA:  y = W' x,   W'_i = m_i V_i / |V_i|,   V = W + s B A,   m_i = |W_i| at the start

|V_i| takes no part in the gradient (section 4.3 of DoRA). B starts at zero, so a fresh adapter changes nothing. Merged,
the weight becomes W + s B A, or W'. Of an nn.Conv1d with kernel k, A (r, in, k) is a convolution like the layer and
B (out, r, 1) one of kernel 1. Of a fused projection, whose rows are those of the query, the key and the value, `qkv`
may choose some: each of these has an A and a B of its own, and the other rows stay as they are.

When to use it: as the first thing to try where a model must be as fast as before once it is merged, or where PEFT must
read the file. It sees no geometry.

Deviations from the published code, each with its reason:
- DoRA's own term W x is computed anew and not taken from the layer's output, which other adapters may have changed:
  what is merged is then the same as what ran.
- a row of the base that is zero keeps a magnitude of zero, and is not divided by its length.
"""

from __future__ import annotations

from point_peft.tuners.lora.config import LoraConfig
from point_peft.tuners.lora.parts import LoraPart, QkvLoraPart

__all__ = ["LoraConfig", "LoraPart", "QkvLoraPart"]
