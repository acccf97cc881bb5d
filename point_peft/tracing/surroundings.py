"""The surroundings of the blocks, as a trace shows them: stem, heads, norms, prefix tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Anatomy, Layout, PrefixParameter, Read, Stage
from point_peft.anatomy.structure import has_parameters, prefix_rows
from point_peft.running.tokens import batch_first
from point_peft.tracing.observing import Trace, channel_weights, connected, gradients_of, returned


def whole_anatomy(model: nn.Module, stages: list[Stage], seen: Trace, dead: list[str]) -> Anatomy:
    modules = dict(model.named_modules())
    blocks = [block.path for stage in stages for block in stage.blocks]
    inside = tuple(path + "." for path in (*blocks, *dead))
    begin = min(seen.first(path).when for path in blocks)
    before = [path for path, _ in seen.before(begin) if path and not path.startswith(inside)]
    beside = _beside(seen, blocks, dead, [path for path in seen.calls if path and not path.startswith(inside)])
    tops = _outermost([path for path in beside if has_parameters(modules[path])], blocks)
    norms = [path for path in tops if isinstance(modules[path], nn.LayerNorm)]
    of_stages = [path for stage in stages[:-1] for path in norms if _is_norm_of(stage, path, seen)]
    final_norms = [
        path for path in norms if path not in of_stages and modules[path].normalized_shape == (stages[-1].width,)
    ][:1]
    own = [path for path, module in modules.items() if path and has_parameters(module, recurse=False)]
    anatomy = Anatomy(
        source="traced",
        stages=tuple(stages),
        stem=tuple(path for path in _outermost(before, blocks) if path not in tops),
        prefix_parameters=tuple(_prefix_parameters(model, stages[0], seen)),
        final_norms=tuple(final_norms),
        heads=tuple(path for path in tops if path not in final_norms and path not in of_stages),
        patches_read=_patches_read(stages[-1], seen),
        reads=tuple(Read(module=owner, reader=reader) for owner, reader in seen.reads.items()),
        uncalled=tuple(path for path in own if path not in seen.calls and path not in seen.reads),
    )
    last = anatomy.stages[anatomy.queried].blocks[-1]
    return replace(anatomy, last_block_calls=len(seen.calls[last.path]))


def _is_norm_of(stage: Stage, norm: str, seen: Trace) -> bool:
    """Tell whether a norm gets what the last block of a stage returns, in either order of the first two axes."""
    made = seen.calls[stage.blocks[-1].path][-1].outputs[stage.outputs[0]]
    given = [value for call in seen.calls[norm] for value in call.inputs.values()]
    return any(
        value.shape == tokens.shape and torch.equal(value, tokens)
        for tokens in (made, made.transpose(0, 1))
        for value in given
    )


def _beside(seen: Trace, blocks: list[str], dead: list[str], paths: list[str]) -> list[str]:
    """The modules on the way to what is returned and not to a block, be they called after the blocks or before."""
    made = [
        (path, value)
        for path in paths
        if path not in blocks and path not in dead
        for call in seen.calls[path]
        for value in call.live_outputs.values()
        # What a module only hands on it has not made.
        if value.grad_fn is not None and all(value is not given for given in call.live_inputs.values())
    ]
    values = [value for _, value in made]
    reaching = {made[number][0] for number in connected(returned(seen), values)}
    entering = [value for path in blocks for call in seen.calls[path] for value in call.live_inputs.values()]
    feeding = {made[number][0] for number in connected([v for v in entering if v.grad_fn is not None], values)}
    spare = [value for path in dead for value in seen.calls[path][-1].live_outputs.values()]
    spare = [value for value in spare if value.grad_fn is not None]
    # What goes by a block that has no part in the prediction has none itself.
    own = {path: [value for name, value in made if name == path] for path, _ in made if path in reaching - feeding}
    return [path for path, outputs in own.items() if not connected(outputs, spare)]


def _patches_read(stage: Stage, seen: Trace) -> bool:
    """Tell whether what the last block makes of the patch tokens has an influence on what the model returns."""
    results = returned(seen)
    tokens = seen.calls[stage.blocks[-1].path][-1].live_outputs[stage.outputs[0]]
    if stage.unknown or stage.layout == "packed" or not results:
        return True
    total = torch.stack([(value * torch.randn_like(value)).sum() for value in results]).sum()
    (gradient,) = gradients_of(total, [tokens])
    return gradient is None or bool(batch_first(gradient, stage.layout)[:, stage.prefix_tokens or 0 :].any())


def _outermost(paths: Sequence[str], blocks: Sequence[str]) -> tuple[str, ...]:
    """Those of the modules that hold no block and lie in no other of them."""
    free = [path for path in paths if not any(block.startswith(path + ".") for block in blocks)]
    return tuple(path for path in free if not any(path.startswith(other + ".") for other in free))


def _prefix_parameters(model: nn.Module, stage: Stage, seen: Trace) -> list[PrefixParameter]:
    """Parameters that are added as they are to the prefix tokens of the first block, and where.

    Such a parameter, and no other, gets the gradient of a token unchanged, summed over the batch. A position is added
    ahead of the second block too.
    """
    tokens = seen.first(stage.blocks[0].path).live_inputs[stage.tokens]
    if not stage.prefix_tokens or tokens.grad_fn is None:
        return []
    small = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.shape[-1:] == (stage.width,) and prefix_rows(parameter) <= stage.prefix_tokens
    ]
    # What is used a second time, as by the head, is not tuned by a change of the tokens.
    small = [(name, parameter) for name, parameter in small if seen.uses[id(parameter)] == 1]
    added = []
    if stage.position == "every_block":
        for one, two in pairwise(stage.blocks):
            given = seen.first(two.path).live_inputs[stage.tokens]
            added.append(given - seen.first(one.path).live_outputs[stage.outputs[0]])
    prefix: dict[str, PrefixParameter] = {}
    for row in range(stage.prefix_tokens):
        again = [{name for name, _ in _additive(change, row, stage.layout, small)} for change in added]
        for name, own in _additive(tokens, row, stage.layout, small):
            times = sum(name in names for names in again)
            if name not in prefix and times in (0, len(again)):  # and not before some of the blocks only
                role: Literal["token", "position"] = "position" if times else "token"
                prefix[name] = PrefixParameter(name=name, role=role, row=row - own)
    return sorted(prefix.values(), key=lambda parameter: (parameter.role == "position", parameter.row))


def _additive(
    tokens: Tensor, row: int, layout: Layout, parameters: Sequence[tuple[str, nn.Parameter]]
) -> Iterator[tuple[str, int]]:
    """The parameters that are added as they are to a row of the tokens, each with the row of it that is."""
    rows = batch_first(tokens, layout)[:, row]
    if rows.grad_fn is None or not parameters:
        return
    direction = channel_weights(rows)
    gradients = gradients_of((rows * direction).sum(), [parameter for _, parameter in parameters])
    for (name, _), gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        for own, values in enumerate(gradient.reshape(-1, gradient.shape[-1])):
            if torch.allclose(values, direction * len(rows), rtol=1e-4, atol=1e-5):
                yield name, own
