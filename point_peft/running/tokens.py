"""Pure functions on the tokens that a block receives: finding them, inserting prompts, taking them out, growing masks.

Tokens are (b, l, c) in layout "bgc" and (l, b, c) in layout "gbc"; l counts prefix, prompt and patch tokens. Packed
tokens (n, c) are those of all samples one after another; they take no prompts.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from point_peft.anatomy.description import Layout, Stage, Steps, spell_steps
from point_peft.errors import AnatomyError
from point_peft.running.nested import Args, Kwargs, all_arguments, fetch, fetch_argument, leaves, put, put_argument


def block_tokens(stage: Stage, path: str, args: Args, kwargs: Kwargs) -> Tensor:
    """The tokens that a block of a stage is called with; `AnatomyError` if they are not laid out as the stage says."""
    tokens = fetch_argument(args, kwargs, stage.tokens)
    return _checked(stage, path, tokens, f"input{spell_steps(stage.tokens)}", "get")


def output_tokens(stage: Stage, path: str, output: Any) -> Tensor:
    """The tokens that a block of a stage returns."""
    tokens = fetch(output, stage.outputs[0])
    return _checked(stage, path, tokens, f"output{spell_steps(stage.outputs[0])}", "return")


def put_output_tokens(stage: Stage, output: Any, tokens: Tensor, *, inserted: int = 0, at: int = 0) -> Any:
    """A block's output with other tokens, without the `inserted` prompts at row `at`.

    Copies of the tokens change by as much as these do; what else is shaped like the tokens loses the prompts too.
    """
    first, *copies = stage.outputs
    before = fetch(output, first)
    change = tokens - before if copies else None
    for steps in copies:
        if fetch(output, steps) is None:
            continue  # a model that is built without sparse convolutions
        output = put(output, steps, fetch(output, steps) + change)
    for steps, value in list(leaves(output)) if inserted and first else ():
        if steps not in stage.outputs:
            output = put(output, steps, _without(value, before, inserted, at, stage.layout))
    return put(output, first, tokens)


def _without(value: Tensor, tokens: Tensor, count: int, at: int, layout: Layout) -> Tensor:
    """A tensor that a block returns beside its tokens, such as an attention map, without what prompts added to it."""
    length, batch = tokens.shape[token_dim(layout)], tokens.shape[1 - token_dim(layout)]
    if value.shape == tokens.shape:
        return remove(value, count, at, layout)
    scores = value.shape == (batch, length)
    square = value.ndim >= 2 and value.shape[-2:] == (length, length) and not scores
    for dim in (-1, -2) if square else (-1,) if scores else ():
        head, _, tail = torch.split(value, [at, count, length - at - count], dim=dim)
        value = torch.cat([head, tail], dim=dim)
    return value


def _checked(stage: Stage, path: str, tokens: Any, where: str, verb: str) -> Tensor:
    dims = 2 if stage.layout == "packed" else 3
    if not isinstance(tokens, Tensor) or tokens.is_nested or tokens.ndim != dims or tokens.shape[-1] != stage.width:
        shape = "n, c" if stage.layout == "packed" else ", ".join(stage.layout)
        got = type(tokens).__name__ if not isinstance(tokens, Tensor) else tuple(tokens.shape)
        if isinstance(tokens, Tensor) and tokens.is_nested:
            got = "a nested tensor: make nn.TransformerEncoder with enable_nested_tensor=False"
        raise AnatomyError(
            f"block '{path}' should {verb} tokens ({shape}), c = {stage.width}, at its {where}; got {got}"
        )
    return tokens


def token_dim(layout: Layout) -> int:
    """The dimension along which tokens are counted."""
    return 1 if layout == "bgc" else 0


def batch_first(tokens: Tensor, layout: Layout) -> Tensor:
    """Dense tokens of either layout as (b, l, c), packed ones as (1, n, c); `as_layout` turns them back."""
    if layout == "packed":
        return rearrange(tokens, "n c -> 1 n c")
    return tokens if layout == "bgc" else rearrange(tokens, "l b c -> b l c")


def as_layout(tokens: Tensor, layout: Layout) -> Tensor:
    """Tokens that `batch_first` gave, laid out as before."""
    if layout == "packed":
        return rearrange(tokens, "1 n c -> n c")
    return tokens if layout == "bgc" else rearrange(tokens, "b l c -> l b c")


def insert(tokens: Tensor, prompts: Tensor, at: int, layout: Layout) -> Tensor:
    """Tokens with prompts (b, p, c) put in before row `at`."""
    dim = token_dim(layout)
    head, tail = torch.split(tokens, [at, tokens.shape[dim] - at], dim=dim)
    return torch.cat([head, as_layout(prompts, layout).to(tokens.dtype), tail], dim=dim)


def remove(tokens: Tensor, count: int, at: int, layout: Layout) -> Tensor:
    """Tokens without the `count` rows from row `at` on."""
    dim = token_dim(layout)
    head, _, tail = torch.split(tokens, [at, count, tokens.shape[dim] - at - count], dim=dim)
    return torch.cat([head, tail], dim=dim)


def insert_prompts(
    stage: Stage, path: str, args: Args, kwargs: Kwargs, prompts: Tensor, at: int
) -> tuple[Args, Kwargs]:
    """The arguments of a block with prompts (b, p, c) put in before token `at`, and all that goes by tokens grown.

    Positions that are given beside the tokens are zero for prompts, as is the rest of what is shaped like tokens.
    """
    tokens = block_tokens(stage, path, args, kwargs)
    dim, count = token_dim(stage.layout), prompts.shape[1]
    length, batch = tokens.shape[dim], tokens.shape[1 - dim]

    def grown(value: Any, steps: Steps) -> Any:
        if steps == stage.tokens:
            return insert(value, prompts, at, stage.layout)
        if not isinstance(value, Tensor):
            return value
        if value.shape == tokens.shape:
            return insert(value, value.new_zeros(batch, count, value.shape[2]), at, stage.layout)
        # A mask (l, l) for a batch of l clouds: only where a padding mask was seen before, it is one.
        alike = batch == length and value.ndim == 2
        padding = is_padding(value, batch, length) and (not alike or steps in stage.padding_masks)
        return grow_masks(value, length, count, at, padding=padding, visible=stage.mask_visible)

    if len(stage.tokens) == 1:
        args = tuple(grown(value, (number,)) for number, value in enumerate(args))
        return args, {name: grown(value, (name,)) for name, value in kwargs.items()}
    for steps, value in list(all_arguments(args, kwargs)):
        args, kwargs = put_argument(args, kwargs, steps, grown(value, steps))
    return args, kwargs


def is_padding(value: Tensor, batch: int, length: int) -> bool:
    """Tell whether a tensor is shaped like a padding mask (b, l), which may be spread out as (b, 1, 1, l)."""
    return value.ndim >= 2 and (value.shape[0], value.shape[-1]) == (batch, length) and value.numel() == batch * length


def grow_masks(value: Tensor, length: int, count: int, at: int, *, padding: bool, visible: bool) -> Tensor:
    """A tensor that a block gets beside its tokens; if it is a mask, with `count` entries put in at `at`.

    Attention masks (..., l, l) grow by rows and columns, `padding` masks (b, l) by columns. In the new entries the
    prompts see all and are seen by all: they hold `visible`, which is zero in a mask that is added.
    """
    square = value.ndim >= 2 and value.shape[-2:] == (length, length)
    dims = (-1,) if padding else (-1, -2) if square else ()
    for dim in dims:
        shape = list(value.shape)
        shape[dim] = count
        head, tail = torch.split(value, [at, length - at], dim=dim)
        value = torch.cat([head, value.new_full(shape, float(visible)), tail], dim=dim)
    return value


def shift_rows(tokens: Tensor, shift: Tensor, at: int, layout: Layout) -> Tensor:
    """Tokens with `shift` (rows, c) added to the rows from row `at` on."""
    dim = token_dim(layout)
    # In one step: the gradient of the others then need not be put together from pieces.
    rows = torch.arange(at, at + shift.shape[0], device=tokens.device)
    every = shift.to(tokens.dtype).expand(tokens.shape[1 - dim], -1, -1)
    return tokens.index_add(dim, rows, as_layout(every, layout))
