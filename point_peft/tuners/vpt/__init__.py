"""VPT: learnable prompt tokens beside the patch tokens of a frozen transformer.

M. Jia, L. Tang, B.-C. Chen, C. Cardie, S. Belongie, B. Hariharan, S.-N. Lim: "Visual Prompt Tuning", ECCV 2022,
https://arxiv.org/abs/2203.12119

Prompts are tokens that attend and are attended like all others, but are parameters. With prefix tokens x, prompts p and
patch tokens t at block l:

    [x; _; t] <- block_l([x; E_l; t])       deep: each block has prompts of its own, what becomes of them is dropped
    [x; p; t] <- block_l([x; p; t])         shallow: p = E at the first block, and stays to the last

They lie between prefix and patch tokens, where a causal mask lets the patches attend to them. The backbone never sees
them between its blocks, so that positions and pooling are what they were. A backbone of several stages has prompts for
each.

When to use it: as the baseline for every other prompt method, and where the weights must not be touched and a few
thousand parameters must do. Deep prompts are the stronger ones; shallow ones cost 1/12 of the parameters.

Deviations from the code that is used for point clouds (the baseline in IDPT's repository), each with its reason:

- No second parameter for the position of a prompt: the prompt is only ever used in their sum.
- The prompts lie ahead of the patches and not behind them. Without a mask that is the same function; behind, a causal
  mask would keep every token from attending to them.
"""

from __future__ import annotations

from point_peft.tuners.vpt.config import VPTConfig

__all__ = ["VPTConfig"]
