"""The anatomy of a backbone that no preset describes, from one traced forward.

Names play no part. Coordinates are a tensor (b, g, 3) whose points are all points of the input cloud; the patch and the
positional embedding are two outputs whose sum is what the first block gets; prefix tokens are what that has more than
there are coordinates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.anatomy import (
    Anatomy,
    Block,
    Layout,
    PrefixParameter,
    Stage,
    Tap,
    block_width,
    find_blocks,
    is_norm,
    prefix_rows,
)
from point_peft.context import eval_mode
from point_peft.errors import AnatomyError


@dataclass
class _Trace:
    """What was seen while a model ran, by module path and in order."""

    order: dict[str, int] = field(default_factory=dict)
    """Path -> when the module was first called."""
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Anatomy:
    """Run the model once, in eval mode and without gradient, and say how it is built; the model is not changed.

    The example should hold two or more different clouds. What cannot be established raises `AnatomyError`.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise AnatomyError(
            f"no transformer block was found in {type(model).__name__}: no module has an attention, a norm and a "
            "linear "
            "layer outside the attention"
        )
    seen = _run(model, args, kwargs)
    called = {path: block for path, block in blocks.items() if path in seen.order}
    if not called:
        raise AnatomyError(f"the blocks of {type(model).__name__} ('{next(iter(blocks))}' …) were never called")
    clouds = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()]
    stages = [_stage(model, list(group), seen, clouds) for group in _groups(model, called, seen)]
    first = stages[0]
    last = seen.order[stages[-1].blocks[-1].path]
    inside = tuple(block.path + "." for block in called.values())
    after = [path for path, when in seen.order.items() if when > last and path and not path.startswith(inside)]
    final_norms = tuple(p for p in after if _is_final_norm(model, p, stages[-1].width))
    before = [path for path, when in seen.order.items() if path and when < seen.order[first.blocks[0].path]]
    tops = [
        path
        for path in after
        if next(model.get_submodule(path).parameters(), None) is not None and path not in final_norms
    ]
    return Anatomy(
        source="traced",
        stages=tuple(stages),
        stem=_outermost(before, called),
        prefix_parameters=tuple(_prefix_parameters(model, first, seen)),
        final_norms=final_norms[:1],
        heads=_outermost(tops, called),
    )


def _outermost(paths: Sequence[str], blocks: dict[str, Block]) -> tuple[str, ...]:
    """Those of the modules that hold no block and lie in no other of them."""
    free = [path for path in paths if not any(block.startswith(path + ".") for block in blocks)]
    return tuple(path for path in free if not any(path.startswith(other + ".") for other in free))


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Trace:
    seen = _Trace()
    paths = {module: path for path, module in model.named_modules()}

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        path = paths[module]
        if path not in seen.order:
            seen.order[path] = len(seen.order)
            seen.inputs[path] = [_kept(value) for value in (*inputs, *named.values())]

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        values = output if isinstance(output, (tuple, list)) else (output,)
        seen.outputs.setdefault(paths[module], [_kept(value) for value in values])

    handles = []
    with eval_mode(model.modules()), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            for module in paths:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return seen


def _kept(value: Any) -> Any:
    """Tokens and coordinates are kept as they are now, whatever is done to them in place later."""
    return value.clone() if isinstance(value, Tensor) and value.ndim == 3 else None


def _groups(model: nn.Module, blocks: dict[str, Block], seen: _Trace) -> Iterator[list[Block]]:
    """The blocks in the order in which they ran, grouped into stages: same container, class and width."""
    group: list[Block] = []
    kind: tuple[str, type[nn.Module], int] | None = None
    for block in sorted(blocks.values(), key=lambda block: seen.order[block.path]):
        container = re.sub(r"\.?\d+$", "", block.path)
        own = (container, type(model.get_submodule(block.path)), block_width(model, block))
        if group and own != kind:
            yield group
            group = []
        group.append(block)
        kind = own
    yield group


def _stage(model: nn.Module, blocks: list[Block], seen: _Trace, clouds: list[Tensor]) -> Stage:
    width = block_width(model, blocks[0])
    tokens = seen.inputs[blocks[0].path][0] if seen.inputs[blocks[0].path] else None
    if tokens is None or tokens.shape[2] != width:
        raise AnatomyError(
            f"block '{blocks[0].path}' does not get dense tokens (b, g, {width}) as its first argument, so its "
            "tokens and "
            "their coordinates cannot be told"
        )
    found = _coordinates(blocks, seen, clouds, tokens)
    if found is None:
        raise AnatomyError(
            f"the coordinates of the tokens of '{blocks[0].path}' {tuple(tokens.shape)} were not found: no tensor "
            "(b, g, 3) "
            "seen before it consists of points of the input cloud"
        )
    tap, coordinates = found
    layout: Layout = "bgc" if tokens.shape[0] == coordinates.shape[0] else "gbc"
    if layout == "gbc":
        tokens = rearrange(tokens, "l b c -> b l c")
    prefix = tokens.shape[1] - coordinates.shape[1]
    position: Literal["every_block", "once"] = "every_block"
    if len(blocks) > 1:
        between = seen.inputs[blocks[1].path][0], seen.outputs[blocks[0].path][0]
        if all(isinstance(value, Tensor) for value in between) and torch.equal(*between):
            position = "once"
    return Stage(
        blocks=tuple(blocks),
        width=width,
        layout=layout,
        prefix_tokens=prefix,
        coordinates=tap,
        patch_tokens=_patch_tokens(seen, blocks[0], tokens[:, prefix:]),
        position=position,
    )


def _coordinates(
    blocks: Sequence[Block], seen: _Trace, clouds: list[Tensor], tokens: Tensor
) -> tuple[Tap, Tensor] | None:
    """Where points of the input cloud are first seen, as many as there are tokens less a prefix of at most 8."""
    limit = seen.order[blocks[0].path]
    points = [rearrange(cloud, "... xyz -> (...) xyz") for cloud in clouds if cloud.shape[-1] == 3]
    points += [rearrange(cloud, "b xyz n -> (b n) xyz") for cloud in clouds if cloud.ndim == 3 and cloud.shape[1] == 3]
    for side, values in (("output", seen.outputs), ("input", seen.inputs)):
        for path, when in seen.order.items():
            if when >= limit or not path:
                continue
            for index, value in enumerate(values.get(path, ())):
                if not isinstance(value, Tensor) or value.shape[2] != 3 or not value.is_floating_point():
                    continue
                b, g, _ = value.shape
                fits = any(tokens.shape[i] == b and 0 <= tokens.shape[1 - i] - g <= 8 for i in (0, 1))
                if fits and any(_consists_of(value, cloud) for cloud in points):
                    return Tap(module=path, side="output" if side == "output" else "input", index=index), value
    return None


def _consists_of(chosen: Tensor, cloud: Tensor) -> bool:
    """Whether every row of `chosen` (b, g, 3) is bit for bit a row of `cloud` (n, 3)."""
    rows = rearrange(chosen, "b g xyz -> (b g) xyz")
    if rows.dtype != cloud.dtype:
        return False
    unique = torch.unique(cloud, dim=0)
    return len(torch.unique(torch.cat([unique, rows]), dim=0)) == len(unique)


def _patch_tokens(seen: _Trace, block: Block, patches: Tensor) -> Tap | None:
    """The output E with a later output P so that E + P are the patch tokens (b, g, c) of the first block."""
    limit = seen.order[block.path]
    candidates = [
        (path, value)
        for path, values in seen.outputs.items()
        if seen.order[path] < limit
        for value in values[:1]
        if isinstance(value, Tensor) and value.shape == patches.shape
    ]
    for (one, first), (two, second) in combinations(candidates, 2):
        if torch.allclose(first + second, patches, atol=1e-5):
            # The positional embedding is the one that is fed with coordinates.
            path = two if _gets_coordinates(seen, one) else one
            return Tap(module=path, side="output")
    return next((Tap(module=p, side="output") for p, value in candidates if torch.equal(value, patches)), None)


def _gets_coordinates(seen: _Trace, path: str) -> bool:
    return any(isinstance(value, Tensor) and value.shape[2] == 3 for value in seen.inputs[path])


def _is_final_norm(model: nn.Module, path: str, width: int) -> bool:
    module = model.get_submodule(path)
    return is_norm(module) and isinstance(module, nn.LayerNorm) and module.normalized_shape == (width,)


def _prefix_parameters(model: nn.Module, stage: Stage, seen: _Trace) -> Iterator[PrefixParameter]:
    """Tensors of the model that alone, or in a sum of two, are the prefix tokens that the first block gets."""
    tokens = seen.inputs[stage.blocks[0].path][0]
    rows = (tokens[0] if stage.layout == "bgc" else tokens[:, 0])[: stage.prefix_tokens]
    candidates = [
        (name, parameter.detach().reshape(-1, stage.width))
        for name, parameter in model.named_parameters()
        if len(rows) and parameter.shape[-1:] == (stage.width,) and prefix_rows(parameter) == len(rows)
    ]
    for name, value in candidates:
        if torch.allclose(value, rows, atol=1e-6):
            yield PrefixParameter(name=name, role="token", row=0)
            return
    for (one, first), (two, second) in combinations(candidates, 2):
        if torch.allclose(first + second, rows, atol=1e-6):
            token, position = one, two
            if stage.position == "every_block" and len(stage.blocks) > 1:
                # What is added before the second block is the position.
                given, made = seen.inputs[stage.blocks[1].path][0], seen.outputs[stage.blocks[0].path][0]
                added = given - made
                added = (added[0] if stage.layout == "bgc" else added[:, 0])[: stage.prefix_tokens]
                if torch.allclose(added, first, atol=1e-5):
                    token, position = two, one
            yield PrefixParameter(name=token, role="token", row=0)
            yield PrefixParameter(name=position, role="position", row=0)
            return
