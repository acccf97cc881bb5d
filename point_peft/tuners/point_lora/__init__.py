"""PointLoRA: low-rank updates of the attention with shared MLPs beside them, and selected tokens of further groupings.

S. Wang, X. Liu, L. Kong, J. Xu, C. Hu, G. Fang, W. Li, J. Zhu, X. Wang: "PointLoRA: Low-Rank Adaptation with Token
Selection for Point Cloud Learning", CVPR 2025, https://arxiv.org/abs/2504.16023.

The query, key and value projection and the output projection of every attention get a low-rank update, and beside it
an MLP m of two layers with a GELU, which all blocks share. The cloud is grouped twice more, finely and coarsely, and
passes through the backbone's own tokenizer. A small predictor scores the tokens u, and the best of each grouping stay
in the sequence through all blocks as further tokens f. M1 and M2 are MLPs like m, the same for all blocks:

    y = W x + (alpha / r) B A x + s m(x)
    p = sigmoid(W2 ReLU(W1 u));   f = the u of highest p, times p / p.detach()
    t <- t + pos;   f <- f + pos(centres of f)      (where the backbone adds positions before every block, else once)
    t <- t + M1(t);   f <- f + M2(f);   [prefix; f; t] pass through the block
    auxiliary loss: for each grouping, its weight times the mean of p log p + (1 - p) log(1 - p)

Also trained are the positional embedding, the first layers of the tokenizer, and the prefix tokens with their
positions. B and the last layers of m, M1 and M2 begin at zero; the selected tokens change the output of a fresh adapter
all the same. The backbone's own head reads its own tokens only; the published head reads the selected ones too:
`heads.mlp_head(channels, classes, "cls+all_max")`. Add `model.auxiliary_loss()` to the training loss. Because of m and
the tokens, nothing can be merged.

When to use it: for classification with a plain point transformer when LoRA alone is not enough and the two further
groupings, which about double the cost of a forward, can be paid. What remains without m and the tokens is LORA, which
merges.

Deviations from the published code, each with its reason:
- the selected tokens are multiplied by p / p.detach(), which is one: the published predictor gets no gradient from the
  task, and its entropy loss alone pushes every p to 1/2. Ours learns which tokens help.
- alpha / r is applied; as published it is never used, which is the same at the published r = alpha = 8.
- the selected tokens lie between the prefix and the patch tokens, not after them: attention does not see the order,
  and heads that count patches from the end find them there.
- m, M1 and M2 begin with nothing, so that training starts from the backbone and its tokens; `init="published"` begins
  their last layers as torch does.
- only the positions of selected tokens are computed: no other is used.
"""

from __future__ import annotations

from point_peft.tuners.point_lora.config import PointLoRAConfig

__all__ = ["PointLoRAConfig"]
