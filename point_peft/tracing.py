"""The anatomy of a backbone that no preset describes, from one traced forward; what is not verified is refused.

Names play no part. Coordinates of dense tokens are a tensor (b, g, 3) whose points are all points of the input cloud.
That they are in the order of the tokens is verified: they are what the positional embedding is made from, whose sum
with the patch embedding is what the first block gets, or else the gradient of each token to the coordinates lies on its
own. What is added to prefix tokens is told by its gradient too. Then prompts are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft import tokens as token_ops
from point_peft.anatomy import (
    Anatomy,
    Block,
    Layout,
    PrefixParameter,
    Read,
    Stage,
    Steps,
    Tap,
    block_width,
    find_blocks,
    is_norm,
    mlp_entrance,
    prefix_rows,
    spell_steps,
    stage_groups,
)
from point_peft.context import eval_mode
from point_peft.errors import AnatomyError
from point_peft.observing import Trace, channel_weights, connected, gradients, gradients_of, observe, reaching, returned
from point_peft.ragged import as_offset
from point_peft.trial import Probe, probed, with_prompts

MAX_PREFIX = 16
"""More tokens than this before the patches are not taken for prefix tokens."""


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
    with gradients(model), eval_mode(model.modules()), torch.random.fork_rng(devices):
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
                probed(model, args, kwargs, probe)

        stages = [with_prompts(stage, again) for stage in stages]
        return _anatomy(model, stages, seen, dead=[path for path in called if path not in live])


def verified(known: Anatomy, traced: Anatomy) -> Anatomy:
    """What a preset says of a model, as far as a traced forward bears it out; where it does not, what was traced."""
    packed = all(stage.layout == "packed" for stage in known.stages)
    if [_skeleton(stage) for stage in known.stages] != [_skeleton(stage) for stage in traced.stages]:
        # Of packed tokens an example of one cloud does not tell enough.
        return known if packed and any(stage.unknown for stage in traced.stages) else traced
    names = {parameter.name for parameter in traced.prefix_parameters}
    return replace(
        known,
        stages=tuple(
            replace(
                stage,
                blocks=tuple(
                    replace(block, mlp_norm=seen.mlp_norm)
                    for block, seen in zip(stage.blocks, found.blocks, strict=True)
                ),
            )
            for stage, found in zip(known.stages, traced.stages, strict=True)
        ),
        prefix_parameters=tuple(parameter for parameter in known.prefix_parameters if parameter.name in names),
        heads=known.heads if set(known.heads) == set(traced.heads) else traced.heads,
        patches_read=traced.patches_read,
        last_block_calls=traced.last_block_calls,
    )


def _skeleton(stage: Stage) -> tuple[Any, ...]:
    """What must be right of a stage for anything to be put into it."""
    blocks = tuple(block.path for block in stage.blocks)
    position = stage.position if stage.prefix_tokens and len(blocks) > 1 else None
    return blocks, stage.layout, stage.width, stage.prefix_tokens, stage.tokens, stage.outputs, position


# ---- stages ----------------------------------------------------------------------------------------------------------


def _stage(model: nn.Module, blocks: tuple[Block, ...], seen: Trace) -> Stage:
    path, width = blocks[0].path, block_width(model, blocks[0])
    call = seen.first(path)
    candidates = [
        (steps, value)
        for steps, value in call.inputs.items()
        if value.is_floating_point() and value.ndim in (2, 3) and value.shape[-1] == width
    ]
    if not candidates:
        raise AnatomyError(
            f"block '{path}' gets no tokens of its width {width}, neither (b, g, {width}) nor packed (n, {width})"
        )
    steps, tokens = candidates[0]
    outputs = tuple(
        found for found, value in call.outputs.items() if value.is_floating_point() and value.shape == tokens.shape
    )
    if not outputs:
        raise AnatomyError(f"block '{path}' returns no tokens of the shape {tuple(tokens.shape)} of those that it got")
    # Beside the tokens, a block may return them in a sparse tensor; anything else of their shape is something else.
    outputs = (outputs[0], *(found for found in outputs[1:] if found[-1:] == ("features",)))
    stage = Stage(
        blocks=tuple(_with_mlp_norm(block, seen) for block in blocks), width=width, tokens=steps, outputs=outputs
    )
    return _packed(stage, seen, tokens) if tokens.ndim == 2 else _dense(stage, seen, tokens)


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


def _packed(stage: Stage, seen: Trace, tokens: Tensor) -> Stage:
    """A stage with packed tokens (n, c): coordinates and sample numbers are seen by the block, or just before it."""
    path, n = stage.blocks[0].path, len(tokens)
    packed = replace(stage, layout="packed", prefix_tokens=0, prompts=False)

    def may_be_coordinates(value: Tensor) -> bool:
        return value.shape == (n, 3) and _inside(value, seen)

    coordinates = _latest(seen, path, may_be_coordinates)
    if coordinates is None:
        return replace(
            packed,
            unknown=(
                f"the coordinates ({n}, 3) of the packed tokens {tuple(tokens.shape)} of '{path}' were not found, no "
                "such tensor within the bounds of the input cloud was seen before or by it; state them in "
                "config.anatomy"
            ),
        )
    alike = {
        steps: value
        for steps, value in seen.first(path).inputs.items()
        if value.is_floating_point() and may_be_coordinates(value)
    }
    if any(not torch.equal(one, two) for one, two in combinations(alike.values(), 2)):
        found = ", ".join(f"input{spell_steps(steps)}" for steps in alike)
        return replace(
            packed,
            unknown=(
                f"'{path}' gets more than one tensor ({n}, 3) that may be the coordinates of its tokens ({found}); "
                "state which in config.anatomy"
            ),
        )
    samples = _latest(seen, path, lambda value: seen.samples > 1 and _tells_samples(value, n, seen.samples))
    if samples is None:
        return replace(
            packed,
            unknown=(
                f"which sample each of the packed tokens {tuple(tokens.shape)} of '{path}' belongs to was not found; "
                "pass an example of two or more clouds, or state it in config.anatomy"
            ),
        )
    return replace(packed, coordinates=coordinates, samples=samples)


def _latest(seen: Trace, block: str, fits: Callable[[Tensor], bool]) -> Tap | None:
    """Where a tensor that fits is seen: by the block itself, else where it was last seen before the block."""
    call = seen.first(block)
    fitting = sorted(
        (not value.is_floating_point(), number) for number, value in enumerate(call.inputs.values()) if fits(value)
    )
    if fitting:
        steps = list(call.inputs)[fitting[0][1]]
        return Tap(module=block, side="input", steps=steps)
    found: Tap | None = None
    latest = -1
    for path, other in seen.before(call.when):
        # What holds the block is still running when that begins, and has not returned yet.
        sides: list[tuple[Literal["input", "output"], dict[Steps, Tensor]]] = [("input", other.inputs)]
        if path and not block.startswith(path + "."):
            sides.append(("output", other.outputs))
        for side, values in sides:
            for steps, value in values.items():
                if other.when >= latest and fits(value):
                    found, latest = Tap(module=path, side=side, steps=steps), other.when
    return found


def _inside(value: Tensor, seen: Trace) -> bool:
    """Whether points lie within the bounds of an input cloud, as means of its points do; or whole numbers do."""
    clouds = seen.clouds if value.is_floating_point() else seen.grid
    return (
        any(bool((value >= cloud.amin(0) - 1e-4).all() and (value <= cloud.amax(0) + 1e-4).all()) for cloud in clouds)
        and len(torch.unique(value, dim=0)) > 1
    )


def _tells_samples(value: Tensor, n: int, samples: int) -> bool:
    if value.ndim != 1 or value.is_floating_point() or value.dtype == torch.bool or len(value) not in (n, samples):
        return False
    try:
        return len(as_offset(value, n)) == samples
    except ValueError:
        return False


def _dense(stage: Stage, seen: Trace, tokens: Tensor) -> Stage:
    path = stage.blocks[0].path
    found = _coordinates(stage, seen, tokens)
    if found is None:
        return replace(
            stage,
            prompts=False,
            unknown=(
                f"the coordinates of the tokens of '{path}' {tuple(tokens.shape)} were not found, no tensor (b, g, 3) "
                "seen before or by it consists of points of the input cloud in the order of the tokens; state them in "
                "config.anatomy"
            ),
        )
    tap, coordinates, patches, embedding = found
    layout: Layout = "bgc" if tokens.shape[0] == coordinates.shape[0] else "gbc"
    rows = token_ops.batch_first(tokens, layout)
    g = coordinates.shape[1]
    prefix = rows.shape[1] - g
    if prefix and patches is None and bool((rows[:, :prefix] != rows[:1, :prefix]).any()):
        return replace(
            stage,
            layout=layout,
            prompts=False,
            unknown=(
                f"block '{path}' gets {prefix} tokens more than there are coordinates, and they are not at the front, "
                "where they would be the same for every cloud"
            ),
        )
    call = seen.first(path)
    b, length = rows.shape[:2]
    return replace(
        stage,
        layout=layout,
        prefix_tokens=prefix,
        coordinates=tap,
        points=_points(seen, coordinates, call.when),
        tokenizer=() if patches is None else _tokenizer(seen, path, patches, coordinates),
        patch_tokens=patches,
        position_embedding=embedding,
        position="once" if _position_once(stage, seen) else "every_block",
        masks=tuple(steps for steps, value in call.inputs.items() if value.shape[-2:] == (length, length)),
        padding_masks=tuple(
            steps for steps, value in call.inputs.items() if token_ops.is_padding(value, b, length) and b != length
        ),
    )


def _position_once(stage: Stage, seen: Trace) -> bool:
    """Whether every block gets what the one before returned, and nothing is added in between."""
    if len(stage.blocks) < 2:
        return False
    return not any(_added(one, two, stage, seen) for one, two in pairwise(stage.blocks))


def _added(one: Block, two: Block, stage: Stage, seen: Trace) -> bool:
    """Whether the second of two blocks gets something else than what the first returned."""
    made = seen.first(one.path).outputs[stage.outputs[0]]
    given = seen.first(two.path).inputs.get(stage.tokens)
    return given is None or not torch.equal(made, given)


def _points(seen: Trace, coordinates: Tensor, when: int) -> Tap | None:
    """Where the clouds (b, n, 3) are seen that the coordinates (b, g, 3) are chosen from: in what a module is called
    with that returns these, else in what the model is called with."""
    b, g, _ = coordinates.shape
    found: Tap | None = None
    for path, call in seen.before(when):
        if path and not any(
            value.shape == coordinates.shape and torch.equal(value, coordinates) for value in call.outputs.values()
        ):
            continue
        clouds = [
            steps
            for steps, value in call.inputs.items()
            if value.ndim == 3 and (value.shape[0], value.shape[2]) == (b, 3) and value.shape[1] > g
            if _consists_of(coordinates, rearrange(value, "b n xyz -> (b n) xyz"))
        ]
        if clouds:
            found = Tap(module=path, side="input", steps=clouds[0])
    return found


def _tokenizer(seen: Trace, block: str, patches: Tap, coordinates: Tensor) -> tuple[str, ...]:
    """The modules that turn neighbourhoods (b, g, k, 3) into the patch embedding: one, or two after another."""
    last = seen.first(patches.module)
    alone = {
        path: call
        for path, call in seen.before(seen.first(block).when)
        if path and len(call.inputs) == 1 and list(call.outputs) == [()]
    }

    def makes(wanted: Tensor) -> list[str]:
        return [
            p for p, c in alone.items() if c.outputs[()].shape == wanted.shape and torch.equal(c.outputs[()], wanted)
        ]

    for path in makes(last.outputs[patches.steps]):
        (given,) = alone[path].inputs.values()
        for chain in ((path,), *((first, path) for first in makes(given))):
            (first,) = alone[chain[0]].inputs.values()
            if _neighbourhoods(first, coordinates):
                return chain
    return ()


def _neighbourhoods(value: Tensor, centres: Tensor) -> bool:
    """Whether a tensor (b, g, k, 3) holds neighbourhoods relative to their centres, which are among them."""
    if value.ndim != 4 or value.shape[:2] != centres.shape[:2] or value.shape[3] != 3:
        return False
    return bool((value == 0).all(dim=3).any(dim=2).all())


def _coordinates(stage: Stage, seen: Trace, tokens: Tensor) -> tuple[Tap, Tensor, Tap | None, str | None] | None:
    """Where the coordinates are seen, what they are, where the patch embedding is seen, what makes the positions.

    They are points of the input cloud, as many as there are tokens less a prefix, in the order of the tokens.
    """
    path = stage.blocks[0].path
    call = seen.first(path)
    candidates: list[tuple[Tap, Tensor, Tensor]] = []
    for side in ("output", "input"):
        for module, other in [*seen.before(call.when), (path, call)]:
            if not module or (side == "output" and (module == path or path.startswith(module + "."))):
                continue
            values, live = (
                (other.outputs, other.live_outputs) if side == "output" else (other.inputs, other.live_inputs)
            )
            for steps, value in values.items():
                if value.ndim == 3 and value.shape[2] == 3 and _as_many(value, tokens):
                    tap = Tap(module=module, side="output" if side == "output" else "input", steps=steps)
                    candidates.append((tap, value, live[steps]))
    larger = [points for when, points in seen.given if when < call.when]
    candidates = [
        entry
        for entry in candidates
        if any(_consists_of(entry[1], cloud) for cloud in seen.clouds)
        or any(len(cloud) > entry[1].shape[0] * entry[1].shape[1] and _consists_of(entry[1], cloud) for cloud in larger)
    ]
    summed = {}
    for tap, value, tensor in candidates:
        layout: Layout = "bgc" if tokens.shape[0] == value.shape[0] else "gbc"
        rows = token_ops.batch_first(tokens, layout)
        prefix = rows.shape[1] - value.shape[1]
        key = (layout, prefix)
        if key not in summed:
            summed[key] = _embeddings(seen, path, rows[:, prefix:])
        patches, made_from = summed[key]
        same = [(source, other) for source, other in made_from if torch.equal(value, other)]
        if same:
            source, points = same[0]
            made = seen.first(source.module)
            return source, points, patches, source.module if len(made.inputs) == 1 and () in made.outputs else None
        if not made_from and _diagonal(call.live_inputs[stage.tokens], tensor, layout, prefix):
            return tap, value, patches, None
    return None


def _as_many(coordinates: Tensor, tokens: Tensor) -> bool:
    b, g, _ = coordinates.shape
    return any(tokens.shape[i] == b and 0 <= tokens.shape[1 - i] - g <= MAX_PREFIX for i in (0, 1))


def _consists_of(chosen: Tensor, cloud: Tensor) -> bool:
    """Whether every row of `chosen` (b, g, 3) is bit for bit a row of `cloud` (n, 3)."""
    rows = rearrange(chosen, "b g xyz -> (b g) xyz")
    if rows.dtype != cloud.dtype:
        return False
    unique = torch.unique(cloud, dim=0)
    return len(torch.unique(torch.cat([unique, rows]), dim=0)) == len(unique)


def _embeddings(seen: Trace, block: str, patches: Tensor) -> tuple[Tap | None, list[tuple[Tap, Tensor]]]:
    """Where the patch embedding is seen, and the coordinates (b, g, 3) that the positional embedding is made from.

    They are two outputs whose sum is the patch tokens (b, g, c) of the first block, or one that is these itself.
    """
    when = seen.first(block).when
    outputs = [
        (path, steps, value)
        for path, call in seen.before(when)
        for steps, value in call.outputs.items()
        if path and value.shape == patches.shape and not block.startswith(path + ".")
    ]
    for (one, steps_one, first), (two, steps_two, second) in combinations(outputs, 2):
        if torch.allclose(first + second, patches, atol=1e-5):
            # The positional embedding is the one that is fed with coordinates, or with less.
            swap = _rank(seen, one) < _rank(seen, two)
            path, steps, position = (two, steps_two, one) if swap else (one, steps_one, two)
            coordinates = [
                (Tap(module=position, side="input", steps=given), value)
                for given, value in seen.first(position).inputs.items()
                if value.ndim == 3 and value.shape[-1] == 3
            ]
            return Tap(module=path, side="output", steps=steps), coordinates
    equal = [
        Tap(module=path, side="output", steps=steps) for path, steps, value in outputs if torch.equal(value, patches)
    ]
    return (equal[0] if equal else None), []


def _rank(seen: Trace, path: str) -> tuple[int, int]:
    """What tells a positional from a patch embedding: coordinates as input, else the smaller input."""
    inputs = list(seen.first(path).inputs.values())
    if not inputs:
        return 9, 0
    return inputs[0].ndim + (inputs[0].shape[-1:] != (3,)), inputs[0].numel()


def _diagonal(tokens: Tensor, coordinates: Tensor, layout: Layout, prefix: int) -> bool:
    """Whether each of a few patch tokens depends on its own row of the coordinates, and on no other."""
    if tokens.grad_fn is None or coordinates.grad_fn is None:
        return False
    g = coordinates.shape[1]
    for row in sorted({0, 1, g // 2, g - 1}):
        token = token_ops.batch_first(tokens, layout)[:, prefix + row]
        (gradient,) = gradients_of((token * channel_weights(token)).sum(), [coordinates])
        if gradient is None:
            return False
        weight = gradient.abs().sum(dim=2)
        own = weight[:, row].clone()
        weight[:, row] = 0.0
        if not bool((own > 0).all()) or bool((weight > 0).any()):
            return False
    return True


# ---- all of it -------------------------------------------------------------------------------------------------------


def _anatomy(model: nn.Module, stages: list[Stage], seen: Trace, dead: list[str]) -> Anatomy:
    modules = dict(model.named_modules())
    blocks = [block.path for stage in stages for block in stage.blocks]
    inside = tuple(path + "." for path in (*blocks, *dead))
    begin = min(seen.first(path).when for path in blocks)
    before = [path for path, _ in seen.before(begin) if path and not path.startswith(inside)]
    after = _after(seen, blocks, dead, [path for path in seen.calls if path and not path.startswith(inside)], begin)
    tops = _outermost([path for path in after if _has_parameters(modules[path])], blocks)
    final_norms = [path for path in tops if _is_final_norm(modules[path], stages[-1].width)][:1]
    own = [path for path, module in modules.items() if path and _has_parameters(module, recurse=False)]
    anatomy = Anatomy(
        source="traced",
        stages=tuple(stages),
        stem=_outermost(before, blocks),
        prefix_parameters=tuple(_prefix_parameters(model, stages[0], seen)),
        final_norms=tuple(final_norms),
        heads=tuple(path for path in tops if path not in final_norms),
        patches_read=_patches_read(stages[-1], seen),
        reads=tuple(Read(module=owner, reader=reader) for owner, reader in seen.reads.items()),
        uncalled=tuple(path for path in own if path not in seen.calls and path not in seen.reads),
    )
    last = anatomy.stages[anatomy.queried].blocks[-1]
    return replace(anatomy, last_block_calls=len(seen.calls[last.path]))


def _after(seen: Trace, blocks: list[str], dead: list[str], paths: list[str], begin: int) -> list[str]:
    """The modules that are called once the blocks have begun, on the way to what is returned and not to a block."""
    made = [
        (path, value)
        for path in paths
        if seen.calls[path][-1].when > begin and path not in blocks and path not in dead
        for value in seen.calls[path][-1].live_outputs.values()
        # What a module only hands on it has not made.
        if value.grad_fn is not None and all(value is not given for given in seen.calls[path][-1].live_inputs.values())
    ]
    values = [value for _, value in made]
    reaching = {made[number][0] for number in connected(returned(seen), values)}
    entering = [value for path in blocks for call in seen.calls[path] for value in call.live_inputs.values()]
    feeding = {made[number][0] for number in connected([v for v in entering if v.grad_fn is not None], values)}
    spare = [value for path in dead for value in seen.calls[path][-1].live_outputs.values()]
    spare = [value for value in spare if value.grad_fn is not None]
    # What goes by a block that has no part in the prediction has none itself.
    return [
        path
        for path in dict.fromkeys(path for path, _ in made)
        if path in reaching - feeding and not connected([value for own, value in made if own == path], spare)
    ]


def _has_parameters(module: nn.Module, *, recurse: bool = True) -> bool:
    return next(module.parameters(recurse), None) is not None


def _patches_read(stage: Stage, seen: Trace) -> bool:
    """Whether what the last block makes of the patch tokens has an influence on what the model returns."""
    results = returned(seen)
    tokens = seen.calls[stage.blocks[-1].path][-1].live_outputs[stage.outputs[0]]
    if stage.unknown or stage.layout == "packed" or not results:
        return True
    total = torch.stack([(value * torch.randn_like(value)).sum() for value in results]).sum()
    (gradient,) = gradients_of(total, [tokens])
    return gradient is None or bool(token_ops.batch_first(gradient, stage.layout)[:, stage.prefix_tokens or 0 :].any())


def _outermost(paths: Sequence[str], blocks: Sequence[str]) -> tuple[str, ...]:
    """Those of the modules that hold no block and lie in no other of them."""
    free = [path for path in paths if not any(block.startswith(path + ".") for block in blocks)]
    return tuple(path for path in free if not any(path.startswith(other + ".") for other in free))


def _is_final_norm(module: nn.Module, width: int) -> bool:
    return is_norm(module) and isinstance(module, nn.LayerNorm) and module.normalized_shape == (width,)


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
    found: dict[str, PrefixParameter] = {}
    for row in range(stage.prefix_tokens):
        again = [{name for name, _ in _additive(change, row, stage.layout, small)} for change in added]
        for name, own in _additive(tokens, row, stage.layout, small):
            times = sum(name in names for names in again)
            if name not in found and times in (0, len(again)):  # and not before some of the blocks only
                role: Literal["token", "position"] = "position" if times else "token"
                found[name] = PrefixParameter(name=name, role=role, row=row - own)
    return sorted(found.values(), key=lambda parameter: (parameter.role == "position", parameter.row))


def _additive(
    tokens: Tensor, row: int, layout: Layout, parameters: Sequence[tuple[str, nn.Parameter]]
) -> Iterator[tuple[str, int]]:
    """The parameters that are added as they are to a row of the tokens, each with the row of it that is."""
    rows = token_ops.batch_first(tokens, layout)[:, row]
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
