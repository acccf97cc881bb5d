"""The stage of blocks on packed tokens, as a trace shows it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from point_peft.anatomy.description import Stage, Steps, Tap, spell_steps
from point_peft.geometry.offsets import as_offset
from point_peft.tracing.observing import Trace


def packed_stage(stage: Stage, seen: Trace, tokens: Tensor) -> Stage:
    """A stage with packed tokens (n, c): coordinates and sample numbers are seen by the block, or just before it."""
    path, n = stage.blocks[0].path, len(tokens)
    packed = replace(stage, layout="packed", prefix_tokens=0, prompts=False)

    def may_be_coordinates(value: Tensor) -> bool:
        return value.shape == (n, 3) and _inside(value, seen)

    coordinates = _latest(seen, path, may_be_coordinates)
    if coordinates is None:
        why = (
            f"the coordinates ({n}, 3) of the packed tokens {tuple(tokens.shape)} of '{path}' were not found, no such "
            "tensor within the bounds of the input cloud was seen before or by it; state them in config.anatomy"
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
