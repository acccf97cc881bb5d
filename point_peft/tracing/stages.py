"""The stage of blocks on dense or on packed tokens, as a trace shows it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from point_peft.anatomy.description import Layout, Stage, Steps, Tap, spell_steps
from point_peft.geometry.offsets import as_offset
from point_peft.running.tokens import batch_first, is_padding
from point_peft.tracing.observing import Trace, channel_weights, gradients_of

MAX_PREFIX = 16
"""More tokens than this before the patches are not taken for prefix tokens."""


def dense_stage(stage: Stage, seen: Trace, tokens: Tensor) -> Stage:
    path = stage.blocks[0].path
    located = _coordinates(stage, seen, tokens)
    if located is None:
        why = (
            f"the coordinates of the tokens of '{path}' {tuple(tokens.shape)} were not found, no tensor (b, g, 3) seen "
            "before or by it consists of points of the input cloud in the order of the tokens; state them in "
            "config.anatomy"
        )
        return replace(stage, prompts=False, unknown=why)
    tap, coordinates, patches, embedding, dropped = located
    layout: Layout = "bgc" if tokens.shape[0] == coordinates.shape[0] else "gbc"
    rows = batch_first(tokens, layout)
    g = coordinates.shape[1]
    prefix = rows.shape[1] - g
    if prefix and patches is None and bool((rows[:, :prefix] != rows[:1, :prefix]).any()):
        why = (
            f"block '{path}' gets {prefix} tokens more than there are coordinates, and they are not at the front, "
            "where they would be the same for every cloud"
        )
        return replace(stage, layout=layout, prompts=False, unknown=why)
    call = seen.first(path)
    b, length = rows.shape[:2]
    return replace(
        stage,
        layout=layout,
        prefix_tokens=prefix,
        coordinates=tap,
        dropped=dropped,
        points=_points(seen, coordinates, call.when),
        tokenizer=() if patches is None else _tokenizer(seen, path, patches, coordinates),
        patch_tokens=patches,
        position_embedding=embedding,
        position="once" if _position_once(stage, seen) else "every_block",
        masks=tuple(steps for steps, value in call.inputs.items() if value.shape[-2:] == (length, length)),
        padding_masks=tuple(
            steps for steps, value in call.inputs.items() if is_padding(value, b, length) and b != length
        ),
    )


def _position_once(stage: Stage, seen: Trace) -> bool:
    """Tell whether every block gets what the one before returned, and nothing is added in between."""
    for one, two in pairwise(stage.blocks):
        made, given = seen.first(one.path).outputs[stage.outputs[0]], seen.first(two.path).inputs.get(stage.tokens)
        if given is None or not torch.equal(made, given):
            return False
    return len(stage.blocks) > 1


def _points(seen: Trace, coordinates: Tensor, when: int) -> Tap | None:
    """Where the clouds (b, n, 3) are seen that the coordinates (b, g, 3) are chosen from: in what a module is called
    with that returns these, else in what the model is called with."""
    b, g, _ = coordinates.shape
    latest: Tap | None = None
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
            latest = Tap(module=path, side="input", steps=clouds[0])
    return latest


def _tokenizer(seen: Trace, block: str, patches: Tap, coordinates: Tensor) -> tuple[str, ...]:
    """The modules that turn neighbourhoods (b, g, k, 3) into the patch embedding: one, or two after another."""
    last = seen.first(patches.module)
    alone = {
        path: call
        for path, call in seen.before(seen.first(block).when)
        if path and len(call.inputs) == 1 and list(call.outputs) == [()]
    }

    def makes(wanted: Tensor) -> list[str]:
        outputs = {path: call.outputs[()] for path, call in alone.items()}
        return [p for p, made in outputs.items() if made.shape == wanted.shape and torch.equal(made, wanted)]

    for path in makes(last.outputs[patches.steps]):
        (given,) = alone[path].inputs.values()
        for chain in ((path,), *((first, path) for first in makes(given))):
            (first,) = alone[chain[0]].inputs.values()
            if _neighbourhoods(first, coordinates):
                return chain
    return ()


def _neighbourhoods(value: Tensor, centres: Tensor) -> bool:
    """Tell whether a tensor (b, g, k, 3) holds neighbourhoods relative to their centres, which are among them."""
    if value.ndim != 4 or value.shape[:2] != centres.shape[:2] or value.shape[3] != 3:
        return False
    return bool((value == 0).all(dim=3).any(dim=2).all())


def _coordinates(stage: Stage, seen: Trace, tokens: Tensor) -> tuple[Tap, Tensor, Tap | None, str | None, int] | None:
    """Where the coordinates are seen, what they are, where the patch embedding is seen, what makes the positions, and
    how many that are seen there have no token.

    They are points of the input cloud, as many as there are tokens less a prefix, in the order of the tokens. The last
    has none where a start token has taken the place of its.
    """
    path = stage.blocks[0].path
    call = seen.first(path)
    candidates: list[tuple[Tap, Tensor, Tensor]] = []
    for side in ("output", "input"):
        for module, other in [*seen.before(call.when), (path, call)]:
            if not module or (side == "output" and (module == path or path.startswith(module + "."))):
                continue
            own, live = (other.outputs, other.live_outputs) if side == "output" else (other.inputs, other.live_inputs)
            for steps, value in own.items():
                if value.ndim == 3 and value.shape[2] == 3 and _as_many(value[:, :-1], tokens):
                    tap = Tap(module=module, side="output" if side == "output" else "input", steps=steps)
                    candidates.append((tap, value, live[steps]))
    larger = [points for when, points in seen.given if when < call.when] + seen.moved
    candidates = [
        entry
        for entry in candidates
        if any(_consists_of(entry[1], cloud) for cloud in seen.clouds)
        or any(len(cloud) > entry[1].shape[0] * entry[1].shape[1] and _consists_of(entry[1], cloud) for cloud in larger)
    ]
    summed = {}
    for tap, value, tensor in candidates:
        if not _as_many(value, tokens):
            continue
        layout: Layout = "bgc" if tokens.shape[0] == value.shape[0] else "gbc"
        rows = batch_first(tokens, layout)
        prefix = rows.shape[1] - value.shape[1]
        key = (layout, prefix)
        if key not in summed:
            summed[key] = _embeddings(seen, path, rows[:, prefix:])
        patches, made_from = summed[key]
        same = [(source, other) for source, other in made_from if torch.equal(value, other)]
        if same:
            source, points = same[0]
            made = seen.first(source.module)
            return source, points, patches, source.module if len(made.inputs) == 1 and () in made.outputs else None, 0
        if not made_from and _diagonal(call.live_inputs[stage.tokens], tensor, layout, prefix):
            return tap, value, patches, None, 0
    for tap, value, tensor in candidates:
        layout = "bgc" if tokens.shape[0] == value.shape[0] else "gbc"
        prefix = batch_first(tokens, layout).shape[1] - value.shape[1] + 1
        if _diagonal(call.live_inputs[stage.tokens], tensor, layout, prefix, dropped=1):
            return tap, value[:, :-1], None, None, 1
    return None


def _as_many(coordinates: Tensor, tokens: Tensor) -> bool:
    b, g, _ = coordinates.shape
    return any(tokens.shape[i] == b and 0 <= tokens.shape[1 - i] - g <= MAX_PREFIX for i in (0, 1))


def _consists_of(chosen: Tensor, cloud: Tensor) -> bool:
    """Tell whether every row of `chosen` (b, g, 3) is bit for bit a row of `cloud` (n, 3)."""
    rows = rearrange(chosen, "b g xyz -> (b g) xyz")
    # The first row tells most of what is none, and quickly.
    if rows.dtype != cloud.dtype or not len(rows) or not bool((cloud == rows[0]).all(dim=1).any()):
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
    same = [Tap(module=path, side="output", steps=steps) for path, steps, made in outputs if torch.equal(made, patches)]
    return (same[0] if same else None), []


def _rank(seen: Trace, path: str) -> tuple[int, int]:
    """The order that tells a positional from a patch embedding: coordinates as input, else the smaller input."""
    inputs = list(seen.first(path).inputs.values())
    if not inputs:
        return 9, 0
    return inputs[0].ndim + (inputs[0].shape[-1:] != (3,)), inputs[0].numel()


def _diagonal(tokens: Tensor, coordinates: Tensor, layout: Layout, prefix: int, *, dropped: int = 0) -> bool:
    """Tell whether each of a few patch tokens depends on its own row of the coordinates, and on no other."""
    if tokens.grad_fn is None or coordinates.grad_fn is None:
        return False
    g = coordinates.shape[1] - dropped
    for row in sorted({0, 1, g // 2, g - 1}):
        token = batch_first(tokens, layout)[:, prefix + row]
        (gradient,) = gradients_of((token * channel_weights(token)).sum(), [coordinates])
        if gradient is None:
            return False
        weight = gradient.abs().sum(dim=2)
        own = weight[:, row].clone()
        weight[:, row] = 0.0
        if not bool((own > 0).all()) or bool((weight > 0).any()):
            return False
    return True


def packed_stage(stage: Stage, seen: Trace, tokens: Tensor) -> Stage:
    """A stage with packed tokens (n, c): coordinates and sample numbers are seen by the block, or just before it."""
    path, n = stage.blocks[0].path, len(tokens)
    packed = replace(stage, layout="packed", prefix_tokens=0, prompts=False)

    def may_be_coordinates(value: Tensor) -> bool:
        return value.shape == (n, 3) and _inside(value, seen)

    coordinates = _latest(seen, path, may_be_coordinates)
    # What the model alone is given may be in another order than the tokens, as points are than the cells of an octree.
    if coordinates is None or not coordinates.module:
        why = (
            f"the coordinates ({n}, 3) of the packed tokens {tuple(tokens.shape)} of '{path}' were not found, no such "
            "tensor within the bounds of the input cloud was seen by it or by a module before it; state them in "
            "config.anatomy"
        )
        return replace(packed, unknown=why)
    alike = {
        steps: value
        for steps, value in seen.first(path).inputs.items()
        if value.is_floating_point() and may_be_coordinates(value)
    }
    if any(not torch.equal(one, two) for one, two in combinations(alike.values(), 2)):
        places = ", ".join(f"input{spell_steps(steps)}" for steps in alike)
        why = f"'{path}' gets more than one tensor ({n}, 3) that may be the coordinates of its tokens ({places})"
        return replace(packed, unknown=f"{why}; state which in config.anatomy")
    samples = _latest(seen, path, lambda value: seen.samples > 1 and _tells_samples(value, n, seen.samples))
    if samples is None:
        why = (
            f"which sample each of the packed tokens {tuple(tokens.shape)} of '{path}' belongs to was not found; "
            "pass an example of two or more clouds, or state it in config.anatomy"
        )
        return replace(packed, unknown=why)
    return replace(packed, coordinates=coordinates, samples=samples)


def _latest(seen: Trace, block: str, fits: Callable[[Tensor], bool]) -> Tap | None:
    """Where a tensor that fits is seen: by the block itself, else where it was last seen before the block."""
    call = seen.first(block)
    fitting = [steps for steps, value in call.inputs.items() if fits(value)]
    if fitting:
        steps = min(fitting, key=lambda steps: not call.inputs[steps].is_floating_point())
        return Tap(module=block, side="input", steps=steps)
    last: Tap | None = None
    latest = -1
    for path, other in seen.before(call.when):
        # What holds the block is still running when that begins, and has not returned yet.
        sides: list[tuple[Literal["input", "output"], dict[Steps, Tensor]]] = [("input", other.inputs)]
        if path and not block.startswith(path + "."):
            sides.append(("output", other.outputs))
        for side, values in sides:
            for steps, value in values.items():
                if other.when >= latest and fits(value):
                    last, latest = Tap(module=path, side=side, steps=steps), other.when
    return last


def _inside(value: Tensor, seen: Trace) -> bool:
    """Tell whether points lie within the bounds of an input cloud, as means of its points do; or whole numbers do."""
    clouds = seen.clouds if value.is_floating_point() else seen.grid
    bounds = [(cloud.amin(0) - 1e-4, cloud.amax(0) + 1e-4) for cloud in clouds]
    inside = any(bool((value >= low).all() and (value <= high).all()) for low, high in bounds)
    return inside and len(torch.unique(value, dim=0)) > 1


def _tells_samples(value: Tensor, n: int, samples: int) -> bool:
    if value.ndim != 1 or value.is_floating_point() or value.dtype == torch.bool or len(value) not in (n, samples):
        return False
    try:
        return len(as_offset(value, n)) == samples
    except ValueError:
        return False
