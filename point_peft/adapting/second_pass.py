"""The second pass: the frozen backbone run once more within a forward, for a prior.

Point-PEFT enhances prompts by a prior, which it looks up in a bank by a feature of the cloud. As published, that is of
the tokens that the backbone without adapters has after its last block. An adapted forward does not compute them, and
those that a block gets only where nothing has acted ahead of it. So when the first block asks (`backbone_tokens`), the
blocks are run through without adapters, in eval mode and without gradients, as far as is asked for; then the forward
goes on where it was.

**The groups are those of the forward.** The prior must be of the very groups whose tokens it enhances, and what was
computed ahead of the blocks is not computed again. A function in a model's forward that groups points cannot be
answered for, and may begin at a random point. So the second pass does not begin at the model's input but at the
module that runs all blocks, with what it was given (`trunk_of`, `see_trunk`): the tokens of the same groups, and
their positions.

**Where the model itself runs the blocks**, or an adapter has changed something ahead of them, the model's own call is
repeated (`Start`). The modules of the stem are then answered with what they gave in the forward, if they are asked
the same (`answering`, `Stem`). If random numbers have been drawn in the meantime, the second pass draws the same
again, by the same code: all but the blocks keep their modes. So it comes to the same groups. If it does not, because
a model draws other random numbers than torch's, it asks the stem something else and that runs again: the prior then
is of other groups, but all in it is of one grouping.

**It leaves nothing behind.** It is a forward of its own, with no active adapters and a record of its own, a child of
the one that asked. An exception (`Stop`) ends it. The generators of random numbers are put back.

A batch that several forwards run (`mixed`) shares one second pass among those whose groups are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.site import anatomy_of, backbone_modules, here, hook
from point_peft.errors import AdapterError, AnatomyError
from point_peft.running.forward import Forward, Root, open_forward, opened, reopen
from point_peft.running.nested import Args, Kwargs
from point_peft.running.second import RandomNumbers, Start, Stop, end_second_pass, eval_mode
from point_peft.running.tokens import batch_first, output_tokens


def backbone_tokens(root: Root, forward: Forward, source: str, adapter: str) -> Tensor:
    """Patch tokens (b, g, c) of the frozen backbone without adapters, once per forward.

    `source` is "stem" for the patch embedding, "backbone" for the tokens of the last block after the final norm, or the
    path of a block for the tokens that it gets. The last two take a second pass, which reuses what the stem has
    computed from the same inputs and ends there. An adapter that was made for other random values of prefix tokens
    gets a second pass with those.
    """
    if source == "stem" and 0 in forward.seen.patches and not _changes_stem(forward):
        return forward.seen.patches[0].detach()
    states = get_adapter(forward.root, adapter).shared_states()
    owner = adapter if any(state.other_base(forward.root.base_model) for state in states) else None
    key = "tokens", source, owner
    if forward.inputs is None and key not in forward.cache:
        hint = ", or run its patch embedding first" if source == "stem" else ', or use prior="stem"'
        raise AdapterError(
            f"the prior from the {source} needs a call of the model itself, which it runs a second time; this is a "
            f"direct call of a part of it: call the model{hint}"
        )

    def take() -> Tensor:
        batch, rows = forward.whole, forward.rows
        if batch is None or forward.given is not None:  # with arguments of its own
            return _second_pass(root, forward, source, owner)
        # Where groups are random, those of the forwards before this one are others.
        if rows is None and forward.stem.computed and key in batch.cache:
            return _second_pass(root, forward, source, owner)
        tokens = batch.once(key, lambda: _second_pass(root, forward if rows is None else batch, source, owner))
        return tokens if rows is None else tokens[rows]

    return forward.once(key, take)


def _second_pass(root: Root, forward: Forward, source: str, owner: str | None) -> Tensor:
    tokens = run_plain(root, forward, source, owner)
    if tokens is None:
        raise AdapterError(f"the second pass for the prior never came to what tells the tokens of the {source}")
    return tokens


def run_plain(root: Root, forward: Forward, source: str, owner: str | None) -> Tensor | None:
    """Run the model without adapters as far as `source`; the tokens there, if they are known."""
    assert forward.inputs is not None
    start = forward.second.start or Start("", *forward.inputs, (), None)
    if source != "stem" and forward.second.trunk is not None and forward.second.trunk.intact:
        start = forward.second.trunk
    with _second(root, forward, source, owner, start), answering(root), torch.no_grad():
        try:
            if start.path:
                # It begins amid the model: all ahead of it has been seen already.
                open_forward(root, *forward.inputs).seen = forward.seen.again()
                root.base_model.get_submodule(start.path)(*start.args, **start.kwargs)
            elif forward.method is None:
                root.base_model(*start.args, **start.kwargs)
            else:
                open_forward(root, start.args, start.kwargs)
                getattr(root.base_model, forward.method)(*start.args, **start.kwargs)
        except Stop as stop:
            forward.second.reached = stop.args[0]
    reached, forward.second.reached = forward.second.reached, None
    return reached


@contextmanager
def _second(root: Root, forward: Forward, source: str, owner: str | None, start: Start) -> Iterator[None]:
    """In here, the model runs without adapters and, but for the stem, in eval mode.

    If random numbers were drawn ahead of the blocks, such as the point that sampling begins with, the same are drawn
    again, and by the same code: what is not in a block then keeps its mode.
    """
    random = start.random if start.random is not None and start.random.drawn else None
    modules = backbone_modules(root)
    blocks = [modules[block.path] for block in anatomy_of(root).blocks]
    stem = {module for path in anatomy_of(root).stem for module in modules[path].modules()}
    inside = {module for block in blocks for module in block.modules()}
    quiet = [m for m in modules.values() if (m not in stem if random is None else m in inside)]
    before = opened(root)
    forward.second.wanted, forward.second.asked_for = source, owner
    reopen(forward.root, forward)
    try:
        with eval_mode(quiet), _own_random_numbers(root, random):
            yield
    finally:
        forward.second.wanted, forward.second.asked_for = None, None
        reopen(forward.root, before)


@contextmanager
def _own_random_numbers(root: Root, repeated: RandomNumbers | None) -> Iterator[None]:
    """In here, drawing random numbers leaves the generators as they were.

    Gradient checkpointing may run a block again, but not the second pass that ran within it.
    """
    if torch.compiler.is_compiling():
        yield
        return
    devices = {parameter.device for parameter in root.base_model.parameters()}
    now = RandomNumbers.of(devices if repeated is None else {*devices, *repeated.states})
    try:
        if repeated is not None:
            repeated.restore()
        yield
    finally:
        now.restore()


def trunk_of(root: Root) -> str:
    """The module that runs all the blocks that a second pass runs, "" where that is the model itself.

    A second pass may begin there, since it ends before that module does.
    """
    anatomy = anatomy_of(root)
    if anatomy.last_block_calls > 1:
        return ""
    blocks = [block for stage in anatomy.stages[: anatomy.queried + 1] for block in stage.blocks]
    steps = blocks[0].path.split(".")[:-1]
    for end in range(len(steps), 0, -1):
        path = ".".join(steps[:end])
        called = not isinstance(root.base_model.get_submodule(path), (nn.ModuleList, nn.ModuleDict))
        if called and all(block.path.startswith(path + ".") for block in blocks):
            return path
    return ""


@hook
def see_trunk(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Remember what the module that runs all blocks is called with, unless an adapter has changed it."""
    site, forward = here(module)
    if forward.second.start is not None and not forward.second.acted and not forward.apart:
        forward.second.trunk = Start.of(site.path, args, kwargs)


@hook
def end_at_last_block(module: nn.Module, args: Args, output: Any) -> None:
    site, forward = here(module)
    if forward.parent is None or forward.parent.second.wanted != "backbone":
        return
    anatomy = anatomy_of(site.root)
    forward.second.ended += 1
    if forward.second.ended < anatomy.last_block_calls:
        return
    stage = anatomy.stages[anatomy.queried]
    tokens = batch_first(output_tokens(stage, site.path, output), stage.layout)
    if stage is anatomy.stages[-1]:
        for path in anatomy.final_norms:
            tokens = forward.root.base_model.get_submodule(path)(tokens)
    if anatomy.queried not in forward.seen.coordinates:
        raise AnatomyError(
            forward.seen.misplaced.get(anatomy.queried)
            or f"the coordinates of the tokens of '{site.path}' were not seen at the {stage.coordinates}"
        )
    g = forward.seen.coordinates[anatomy.queried].shape[1]
    end_second_pass(forward.parent.second, tokens[:, tokens.shape[1] - g :])


@hook
def keep_stem(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Remember what a module of the stem computed, for forwards that ask it the same; give what was remembered."""
    site, forward = here(module)
    answer = forward.stem.answering.pop(site.path, None)
    if answer is not None:
        return answer.output
    second = forward.parent is not None and forward.parent.second.wanted is not None
    wanted = second or forward.active or forward.whole is not None
    if wanted and not kwargs and not forward.apart and not _changes_stem(forward, site.path):
        call = forward.stem.keep(site.path, args, output, _points_within(forward, site.path))
        if call is not None and second and forward.parent is not None:
            forward.parent.stem.calls.setdefault(site.path, []).append(call)
    return None


def _points_within(forward: Forward, path: str) -> dict[int, Tensor]:
    """Stage -> the clouds that were seen at modules within a module."""
    taps = {number: stage.points for number, stage in enumerate(anatomy_of(forward.root).stages)}
    inside = {number for number, tap in taps.items() if tap is not None and tap.module.startswith(path + ".")}
    return {number: points for number, points in forward.seen.points.items() if number in inside}


def _changes_stem(forward: Forward, path: str | None = None) -> bool:
    """True if an active adapter has a part in a module of the stem, or in any."""
    changed = [get_adapter(forward.root, name).in_stem for name in forward.active]
    return any(paths if path is None else path in paths for paths in changed)


@hook
def reuse_stem(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """In compiled code, a module of the stem runs in the second pass on one sample only; `_keep_stem` does the rest.

    A hook cannot keep a module from running, but it can give it next to nothing to do.
    """
    if not torch.compiler.is_compiling():
        return None
    site, forward = here(module)
    call = None if kwargs or not args else forward.stem.answer(site.path, args)
    if call is None or any(value.shape[0] != args[0].shape[0] for value in args):
        return None
    forward.stem.answering[site.path] = call
    return tuple(value[:1] for value in args), kwargs


@contextmanager
def answering(root: Root) -> Iterator[None]:
    """In here, a module of the stem need not compute what the forward that it runs in knows.

    No hook can keep a module from running. So its `forward` is set for a while, to what runs the module's own unless
    the answer is known; that is right in every other forward and thread as well.
    """
    modules = [] if root.anatomy is None else [root.base_model.get_submodule(path) for path in root.anatomy.stem]
    # Not where compiled code cannot follow, nor where another thread has done it already.
    own = {} if torch.compiler.is_compiling() else {module: module.__dict__.get("forward") for module in modules}
    own = {m: was for m, was in own.items() if not (isinstance(was, partial) and was.func is _answer)}
    for module, set_by_user in own.items():
        module.__dict__["forward"] = partial(_answer, module, set_by_user)
    try:
        yield
    finally:
        for module, set_by_user in own.items():
            if set_by_user is not None:  # as accelerate's are, which moves weights between devices
                module.__dict__["forward"] = set_by_user
            else:
                module.__dict__.pop("forward", None)


def _answer(module: nn.Module, set_by_user: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Give the known output of a module of the stem, else compute it."""
    site, forward = here(module)
    call = None if kwargs or _changes_stem(forward, site.path) else forward.stem.answer(site.path, args)
    if call is not None:
        forward.seen.points = {**call.points, **forward.seen.points}
        return call.output
    return type(module).forward(module, *args, **kwargs) if set_by_user is None else set_by_user(*args, **kwargs)
