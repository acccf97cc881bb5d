"""Pure functions on the tokens that a block receives: inserting prompts, taking them out, growing masks.

Tokens are (b, l, c) in layout "bgc" and (l, b, c) in layout "gbc"; l counts prefix, prompt and patch tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from point_peft.anatomy import Layout


def token_dim(layout: Layout) -> int:
    """The dimension along which tokens are counted."""
    return 1 if layout == "bgc" else 0


def batch_first(tokens: Tensor, layout: Layout) -> Tensor:
    """Tokens of either layout as (b, l, c); the same call turns (b, l, c) back."""
    return tokens if layout == "bgc" else rearrange(tokens, "l b c -> b l c")


def insert(tokens: Tensor, prompts: Tensor, at: int, layout: Layout) -> Tensor:
    """Tokens with prompts (b, p, c) put in before row `at`."""
    dim = token_dim(layout)
    head, tail = torch.split(tokens, [at, tokens.shape[dim] - at], dim=dim)
    return torch.cat([head, batch_first(prompts, layout).to(tokens.dtype), tail], dim=dim)


def remove(tokens: Tensor, count: int, at: int, layout: Layout) -> Tensor:
    """Tokens without the `count` rows from row `at` on."""
    dim = token_dim(layout)
    head, _, tail = torch.split(tokens, [at, count, tokens.shape[dim] - at - count], dim=dim)
    return torch.cat([head, tail], dim=dim)


def grow_masks(value: Any, length: int, count: int, at: int) -> Any:
    """An argument of a block; if it is an attention mask (..., l, l), with `count` rows and columns put in at `at`.

    The new rows and columns are zero or False: in an additive mask, and in a boolean one that marks what is blocked,
    the prompts see all and are seen by all.
    """
    if not isinstance(value, Tensor) or value.shape[-2:] != (length, length):
        return value
    for dim in (-1, -2):
        shape = list(value.shape)
        shape[dim] = count
        head, tail = torch.split(value, [at, length - at], dim=dim)
        value = torch.cat([head, value.new_zeros(shape), tail], dim=dim)
    return value


def shift_rows(tokens: Tensor, shift: Tensor, at: int, layout: Layout) -> Tensor:
    """Tokens with `shift` (rows, c) added to the rows from row `at` on."""
    dim = token_dim(layout)
    rows = batch_first(shift.to(tokens.dtype)[None], layout)
    head, body, tail = torch.split(tokens, [at, len(shift), tokens.shape[dim] - at - len(shift)], dim=dim)
    return torch.cat([head, body + rows, tail], dim=dim)
