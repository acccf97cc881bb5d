"""IDPT: one prompt for each cloud, generated from its own features.

Y. Zha, J. Wang, T. Dai, B. Chen, Z. Wang, S.-T. Xia: "Instance-aware Dynamic Prompt Tuning for Pre-trained Point Cloud
Models", ICCV 2023, https://arxiv.org/abs/2304.07221

A fixed prompt is the same for every cloud, whatever noise or missing parts this one has. Here a small graph network
reads the patch tokens y as they are ahead of block l (before positions are added) and makes the prompt of that cloud:

    E_i(y)_a = max over b in kNN(y_a) of LeakyReLU(BN(W_i [y_b - y_a ; y_a]))      neighbours in the space of features
    y1 = E_1(y), y2 = E_2(y1), y3 = E_3(y2)
    p  = max over tokens of LeakyReLU(BN(W_4 [y1 ; y2 ; y3]))
    [x; p + pos; t] goes into block l, and p stays in the sequence to the last block

By default l is the last block.

When to use it: where clouds differ much from each other, as in scans with background and occlusion, and 1.3 M
parameters are not too many: it is the largest of the prompt methods. The published head reads the prompt too:
`heads={"cls_head_finetune": "cls+prompt+max"}`.

Deviations from the published code, each with its reason:

- The position of the prompt is trained, as the paper means it. The published rule for what is trained misses it, so
  that it stays random. These are the c parameters that ours has more.
- What is not trained has no gradient. The published code leaves it on everywhere, which costs memory, and counts the
  frozen gradients in the gradient's norm.
- The generator's BatchNorm keeps its statistics in the adapter; the backbone's do not move.
- With the backbone's own head the prompt acts through attention alone.
"""

from __future__ import annotations

from point_peft.tuners.idpt.config import IDPTConfig

__all__ = ["IDPTConfig"]
