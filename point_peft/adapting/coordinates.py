"""Coordinates tapped while the model runs, and the token layout checked at every block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.adapting.adapter import calls_at
from point_peft.adapting.site import SITE, Site, anatomy_of, here, hook, stage_at
from point_peft.anatomy.description import Stage, Steps, Tap
from point_peft.errors import AnatomyError
from point_peft.running import nested
from point_peft.running.forward import Forward, current_forward, restart_direct
from point_peft.running.nested import Args, Kwargs, fetch_argument
from point_peft.running.second import end_second_pass
from point_peft.running.tokens import batch_first, block_tokens, token_dim


@hook
def check_tokens(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Every block must see the token layout that its parts were built for."""
    site, forward = here(module)
    if forward.parent is not None and forward.parent.second.wanted == "stem":
        end_second_pass(forward.parent.second, forward.seen.patches.get(0))
    if forward.parent is not None and forward.parent.second.wanted == site.path:
        _end_at_block(site, forward, args, kwargs)
    parts = [part for part, _ in calls_at(forward, forward.active, site.path, module)]
    if not parts:
        return
    index, stage = stage_at(anatomy_of(site.root), site.path)
    tokens = block_tokens(stage, site.path, args, kwargs)
    if not any(part.needs_coordinates for part in parts):
        return
    forward.seen.begun.add(index)
    if index in forward.seen.misplaced:
        raise AnatomyError(forward.seen.misplaced[index])
    if index not in forward.seen.coordinates:
        raise AnatomyError(
            f"block '{site.path}' runs before the coordinates of its tokens were seen at the {stage.coordinates}: call "
            "the model, or a method that runs its grouping too"
        )
    shape = tuple(forward.seen.coordinates[index].shape)
    if stage.layout == "packed":
        if shape[0] != len(tokens) or index not in forward.seen.samples:
            raise AnatomyError(
                f"block '{site.path}' should get one token for each of the coordinates {shape} and be told which "
                f"sample each belongs to at the {stage.samples}; it got tokens {tuple(tokens.shape)}"
            )
        return
    length = tokens.shape[token_dim(stage.layout)]
    batch = tokens.shape[1 - token_dim(stage.layout)]
    prefix = length - shape[1]
    if batch != shape[0] or prefix < 0 or (stage.prefix_tokens is not None and prefix != stage.prefix_tokens):
        expected = "some" if stage.prefix_tokens is None else stage.prefix_tokens
        raise AnatomyError(
            f"block '{site.path}' should get {expected} prefix tokens and one token for each of the coordinates "
            f"{shape}; it got tokens {tuple(tokens.shape)}"
        )


def _end_at_block(site: Site, forward: Forward, args: Args, kwargs: Kwargs) -> None:
    """End a second pass with the patch tokens (b, g, c) that a block is called with."""
    index, stage = stage_at(anatomy_of(site.root), site.path)
    tokens = batch_first(block_tokens(stage, site.path, args, kwargs), stage.layout)
    assert forward.parent is not None and index in forward.seen.coordinates  # who asks has planned with these
    end_second_pass(forward.parent.second, tokens[:, tokens.shape[1] - forward.seen.coordinates[index].shape[1] :])


@hook
def tap_input(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    _tap(module.__dict__[SITE], "input", lambda steps: fetch_argument(args, kwargs, steps))


@hook
def tap_output(module: nn.Module, args: Args, output: Any) -> None:
    _tap(module.__dict__[SITE], "output", lambda steps: nested.fetch(output, steps))


def _tap(site: Site, side: str, fetch: Callable[[Steps], Any]) -> None:
    def is_here(tap: Tap) -> bool:
        return tap.module == site.path and tap.side == side

    def find(tap: Tap) -> Any:
        value = fetch(tap.steps)
        return fetch(tap.else_steps) if value is None and tap.else_steps else value

    if current_forward(site.root).apart:
        return
    for index, stage in enumerate(anatomy_of(site.root).stages):
        if stage.coordinates is not None and is_here(stage.coordinates):
            restart_direct(site.root, "coordinates", index)
            forward = current_forward(site.root)
            _see_coordinates(forward, index, find(stage.coordinates), stage.coordinates, stage)
        for what, tap in (("samples", stage.samples), ("points", stage.points), ("patches", stage.patch_tokens)):
            value = find(tap) if tap is not None and is_here(tap) else None
            if isinstance(value, Tensor):
                restart_direct(site.root, what, index)
                seen = current_forward(site.root).seen
                {"samples": seen.samples, "points": seen.points, "patches": seen.patches}[what].setdefault(index, value)


def _see_coordinates(forward: Forward, index: int, value: Any, tap: Tap, stage: Stage) -> None:
    """Keep the coordinates of a stage; wrong ones are an error for those alone that need them."""
    dims, shape = (2, "(n, 3)") if stage.layout == "packed" else (3, "(b, g, 3)")
    if not isinstance(value, Tensor) or value.ndim != dims or value.shape[-1] != 3:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        forward.seen.misplaced[index] = f"the {tap} should be the coordinates {shape} of the tokens; it is {got}"
        return
    # Whole numbers are cells of a grid.
    value = value if value.is_floating_point() else value.float()
    value = value[:, : value.shape[1] - stage.dropped] if stage.dropped else value
    known = forward.seen.coordinates.setdefault(index, value)
    again = index in forward.seen.begun and not forward.recomputing
    if again and known is not value and (known.shape != value.shape or not torch.equal(known, value)):
        forward.seen.misplaced[index] = (
            f"the blocks of '{stage.blocks[0].path}' run on a second set of points in one forward (at the {tap}), and "
            "what they share would be the first set's: call the model once for each, or use LORA or BITFIT"
        )
