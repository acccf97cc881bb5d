"""Modules of which the backward pass keeps nothing but what they get, and which it runs once more."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, *args: Any, random: bool = False) -> Any:
    """`module(*args)`, of which the arguments are kept to run it again in the backward pass.

    It runs on the tensors that it has now, although it may have others by then: those that `torch.func.functional_call`
    puts in are out again when the forward ends. `random`: it draws numbers, which are to be the same.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # compilers decide themselves what to keep
        return module(*args)
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    count = len(parameters)

    def run(*given: Any) -> Any:
        return functional_call(module, {**buffers, **dict(zip(parameters, given, strict=False))}, given[count:])

    return checkpoint(
        run, *parameters.values(), *args, use_reentrant=False, preserve_rng_state=random, determinism_check="none"
    )
