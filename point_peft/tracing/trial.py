"""Prompts put among the tokens of a backbone on trial: whether its blocks take them, and whether they are attended."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Stage
from point_peft.running.nested import put
from point_peft.running.tokens import block_tokens, insert_prompts, output_tokens, remove, token_dim
from point_peft.tracing.observing import attached, hooked

PROBES = 4
"""Prompts that are put in on trial."""


@dataclass
class Probe:
    """Prompts that are put in before every block of a stage and taken out after it, and what came of it."""

    stage: Stage
    prompts: Tensor
    result: Tensor | None = None
    """The other tokens as the first block returns them."""


def with_prompts(stage: Stage, again: Callable[[Probe], None]) -> Stage:
    """The stage with what a trial of prompts tells: whether they are attended, and which mask entries let them be."""
    if stage.layout == "packed" or stage.unknown:
        return stage
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randn(1, PROBES, stage.width, generator=generator) for _ in range(2)]
    # Of a batch of l clouds, any of the masks (l, l) may as well say what is padding.
    readings = [chosen for count in range(len(stage.masks) + 1) for chosen in combinations(stage.masks, count)]
    for others, visible in product(readings, (False, True)):
        padding = (*stage.padding_masks, *others)
        trial = replace(stage, mask_visible=visible, padding_masks=padding)
        results = []
        for values in prompts:
            probe = Probe(trial, values)
            try:
                again(probe)
            except (RuntimeError, ValueError, IndexError, AssertionError):
                break  # what a block of somebody else's says to more tokens than it was made for
            if probe.result is not None:
                results.append(probe.result)
        if len(results) == 2 and not torch.allclose(results[0], results[1], rtol=1e-6, atol=1e-7):
            return replace(trial, masks=tuple(mask for mask in stage.masks if mask not in padding))
    return replace(stage, prompts=False)


def run_probe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], probe: Probe) -> None:
    """Run the model with the probe's prompts in its blocks, and note in the probe what came of it."""
    stage = probe.stage
    dim, at = token_dim(stage.layout), stage.prefix_tokens or 0
    paths = {model.get_submodule(block.path): block.path for block in stage.blocks}

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        tokens = block_tokens(stage, paths[module], inputs, named)
        prompts = probe.prompts.to(tokens).expand(tokens.shape[1 - dim], -1, -1)
        return insert_prompts(stage, paths[module], inputs, named, prompts, at)

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        tokens = output_tokens(stage, paths[module], output)
        kept = remove(tokens, PROBES, at, stage.layout)
        if probe.result is None:
            probe.result = kept.clone()
        return put(output, stage.outputs[0], kept)

    with hooked(paths, before, after):
        copied, named = attached(args, kwargs)
        model(*copied, **named)
