"""The one door to the anatomy of a backbone: what a preset says of it, and what a traced forward shows.

In a trace names play no part, and what is not verified is refused. Coordinates of dense tokens are a tensor (b, g, 3)
whose points are all points of the input cloud, or of one that the model has moved, scaled or turned as a whole. That
they are in the order of the tokens is verified: they are what the positional embedding is made from, whose sum with the
patch embedding is what the first block gets, or else the gradient of each token to the coordinates lies on its own.
What is added to prefix tokens is told by its gradient too. Then prompts are tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Anatomy, Block, Stage
from point_peft.anatomy.presets import known_anatomy
from point_peft.anatomy.structure import block_width, find_blocks, mlp_entrance, stage_groups
from point_peft.errors import AnatomyError
from point_peft.running.nested import call_arguments, put
from point_peft.running.second import eval_mode
from point_peft.running.tokens import block_tokens, insert_prompts, output_tokens, remove, token_dim
from point_peft.tracing.observing import Trace, attached, hooked, observe, reaching, with_gradients
from point_peft.tracing.stages import dense_stage, packed_stage
from point_peft.tracing.surroundings import whole_anatomy

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


def understand(model: nn.Module, example_inputs: Any = None) -> Anatomy:
    """The anatomy of a model: what a preset says of its family, which a forward on example inputs verifies or replaces.

    Example inputs are a tensor, a tuple of positional or a dict of named arguments, of two or more clouds; without them
    the model is not run. Raises `AnatomyError` if nothing is known, with what the forward lacks.
    """
    known = known_anatomy(model)
    if example_inputs is None:
        if known is None:
            raise AnatomyError(
                f"no preset describes {type(model).__name__}: pass example_inputs=(...), two or more clouds, to let "
                "one forward be traced"
            )
        return known
    args, kwargs = call_arguments(example_inputs)
    try:
        traced = trace(model, args, kwargs)
    except AnatomyError:
        if known is None:
            raise
        return known
    return traced if known is None else _verified(known, traced)


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Anatomy:
    """Run the model a few times in eval mode and say how it is built; the model is not changed.

    The example should hold two or more different clouds. What cannot be established raises `AnatomyError`.
    """
    name = type(model).__name__
    blocks = find_blocks(dict(model.named_modules()))
    if not blocks:
        raise AnatomyError(
            f"no transformer block was found in {name}: no module has an attention, a norm and a linear layer outside "
            "the attention"
        )
    devices = sorted({parameter.device for parameter in model.parameters() if parameter.is_cuda}, key=str)
    with with_gradients(model), eval_mode(model.modules()), torch.random.fork_rng(devices):
        state = torch.random.get_rng_state()
        seen = observe(model, args, kwargs, {block_width(model, block) for block in blocks.values()})
        called = [path for path in seen.calls if path in blocks]
        if not called:
            raise AnatomyError(
                f"the blocks of {name} ('{next(iter(blocks))}' …) were never called: their parts are called one by one"
            )
        live = reaching(seen, called)
        if not live:
            raise AnatomyError(f"no block of {name} ('{called[0]}' …) has an influence on what the model returns")
        groups = stage_groups(model, [blocks[path] for path in live])
        stages = [_stage(model, group, seen) for group in groups]
        order = [seen.first(stage.blocks[0].path).when for stage in stages]
        stages = [stage for _, stage in sorted(zip(order, stages, strict=True), key=lambda pair: pair[0])]

        def again(probe: Probe) -> None:
            torch.random.set_rng_state(state)
            with torch.no_grad():
                run_probe(model, args, kwargs, probe)

        stages = [with_prompts(stage, again) for stage in stages]
        return whole_anatomy(model, stages, seen, dead=[path for path in called if path not in live])


def _verified(known: Anatomy, traced: Anatomy) -> Anatomy:
    """A preset's anatomy as far as a traced forward bears it out; where it does not, what was traced."""
    packed = all(stage.layout == "packed" for stage in known.stages)
    if [_skeleton(stage) for stage in known.stages] != [_skeleton(stage) for stage in traced.stages]:
        # Of packed tokens an example of one cloud does not tell enough.
        return known if packed and any(stage.unknown for stage in traced.stages) else traced
    names = {parameter.name for parameter in traced.prefix_parameters}
    behind = (*traced.final_norms, *traced.heads)
    heads = tuple(path for path in traced.heads if _touches(path, known.heads))
    stages = []
    for stage, shown in zip(known.stages, traced.stages, strict=True):
        pairs = zip(stage.blocks, shown.blocks, strict=True)
        stages.append(replace(stage, blocks=tuple(replace(block, mlp_norm=seen.mlp_norm) for block, seen in pairs)))
    return replace(
        known,
        stages=tuple(stages),
        prefix_parameters=tuple(parameter for parameter in known.prefix_parameters if parameter.name in names),
        final_norms=tuple(path for path in known.final_norms if path in behind) or traced.final_norms,
        heads=known.heads if set(known.heads) == set(heads) else heads,
        patches_read=traced.patches_read,
        last_block_calls=traced.last_block_calls,
    )


def _touches(path: str, others: Sequence[str]) -> bool:
    """Tell whether a module is, holds or lies in one of the others: for a preset what is not is the encoder's."""
    return any(f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}.") for other in others)


def _skeleton(stage: Stage) -> tuple[Any, ...]:
    """Facts about a stage that must be right for anything to be put into it."""
    blocks = tuple(block.path for block in stage.blocks)
    position = stage.position if stage.prefix_tokens and len(blocks) > 1 else None
    return blocks, stage.layout, stage.width, stage.prefix_tokens, stage.dropped, stage.tokens, stage.outputs, position


def _stage(model: nn.Module, blocks: tuple[Block, ...], seen: Trace) -> Stage:
    path, width = blocks[0].path, block_width(model, blocks[0])
    call = seen.first(path)
    floats = [(steps, value) for steps, value in call.inputs.items() if value.is_floating_point()]
    candidates = [(steps, value) for steps, value in floats if value.ndim in (2, 3) and value.shape[-1] == width]
    if not candidates:
        raise AnatomyError(
            f"block '{path}' gets no tokens of its width {width}, neither (b, g, {width}) nor packed (n, {width})"
        )
    steps, tokens = candidates[0]
    outputs = tuple(
        place for place, value in call.outputs.items() if value.is_floating_point() and value.shape == tokens.shape
    )
    if not outputs:
        raise AnatomyError(f"block '{path}' returns no tokens of the shape {tuple(tokens.shape)} of those that it got")
    # Beside the tokens, a block may return them in a sparse tensor; anything else of their shape is something else.
    outputs = (outputs[0], *(place for place in outputs[1:] if place[-1:] == ("features",)))
    blocks = tuple(_with_mlp_norm(_without_idle_norms(block, seen), seen) for block in blocks)
    stage = Stage(blocks=blocks, width=width, tokens=steps, outputs=outputs)
    if blocks[0].attention is None:
        why = f"'{path}' has no attention, and of such blocks no more is told than their linear layers"
        return replace(stage, layout="packed" if tokens.ndim == 2 else "bgc", prompts=False, unknown=why)
    return packed_stage(stage, seen, tokens) if tokens.ndim == 2 else dense_stage(stage, seen, tokens)


def _without_idle_norms(block: Block, seen: Trace) -> Block:
    """A block without the norms that get nothing but zeros, as queries are at first: their scale has no effect."""
    calls = {path: seen.calls.get(path, []) for path in block.norms}
    given = {path: [value for call in calls[path] for value in call.inputs.values()] for path in block.norms}
    idle = [path for path in block.norms if given[path] and not any(bool(value.any()) for value in given[path])]
    return replace(block, norms=tuple(path for path in block.norms if path not in idle))


def _with_mlp_norm(block: Block, seen: Trace) -> Block:
    """A block with the norm whose output its MLP gets, if there is one."""
    fed = mlp_entrance(block)
    if fed is None or fed not in seen.calls:
        return replace(block, mlp_norm=None)
    given = list(seen.first(fed).inputs.values())
    feeding = [
        path
        for path in block.norms
        if path in seen.calls and not path.startswith(fed + ".")
        for made in seen.first(path).outputs.values()
        if given and made.shape == given[0].shape and torch.equal(made, given[0])
    ]
    return replace(block, mlp_norm=feeding[-1] if feeding else None)
