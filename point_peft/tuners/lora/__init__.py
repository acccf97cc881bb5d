"""LoRA: low-rank updates of linear layers.

E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen: "LoRA: Low-Rank Adaptation of Large
Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685

    y = W x + s B A dropout(x),   s = alpha / r, or alpha / sqrt(r) with `use_rslora` (https://arxiv.org/abs/2312.03732)

B starts at zero, so a fresh adapter changes nothing. Merged, W becomes W + s B A.
"""

from __future__ import annotations

from point_peft.tuners.lora.config import LoraConfig

__all__ = ["LoraConfig"]
