"""PPT: the groups of a second grouping of the cloud are prompts, and three small MLPs, one for all blocks, tune tokens.

S. Zhang, Z. Qi, R. Dong, X. Bai, X. Wei: "Positional Prompt Tuning for Efficient 3D Representation Learning", 2024,
https://arxiv.org/abs/2408.11567.

The cloud is grouped a second time, and the groups pass through the backbone's own tokenizer and positional embedding,
which are trained in part. The prompts p that they become attend with the patch tokens t in every block and stay to the
end. M1, M2 and M3 are MLPs of two layers with a GELU, each the same for all blocks:

    p = tokenizer(groups),   q = pos(centres of the groups)
    t <- t + pos;   p <- p + q          (where the backbone adds positions before every block, else once)
    t <- t + M1(t);   p <- p + M2(p)
    x = [prefix; p; t];   x <- x + Attn(LN1 x);   x <- x + MLP(LN2 x) + M3(x)

Also trained are the positional embedding, the first layers of the tokenizer, and the prefix tokens with their
positions. The last layers of the M begin at zero; the prompts change the output of a fresh adapter all the same. The
backbone's own head reads its own tokens only. The published head reads the prompts too:
`heads.mlp_head(channels, classes, "cls+mean+prompt", activation=nn.GELU)`.

When to use it: for classification with a plain point transformer, where accuracy counts more than time: with as many
prompts as patches, a forward costs more than twice that of the backbone. A smaller `num_groups` makes it cheaper.

Deviations from the published code, each with its reason:
- the prompts lie between the prefix and the patch tokens, not after them: attention does not see the order, and heads
  that count patches from the end find them there.
- M1, M2 and M3 begin with nothing, so that training starts from the backbone and its prompts; `init="published"`
  begins their last layers as torch does.
- what M1 and M2 add is not written into slices of the tokens: that breaks autograd and compilation in places.
"""

from __future__ import annotations

from point_peft.tuners.ppt.config import PPTConfig

__all__ = ["PPTConfig"]
