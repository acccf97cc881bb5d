"""The record of one forward pass of an adapted model, and where the hooks of its modules find it.

Hooks keep no state of their own. In eager mode the record lies in a context variable, so that threads and asyncio tasks
do not see each other; while `torch.compile` traces, which cannot read context variables, on the model itself. In the
backward pass, when checkpointing runs blocks again, the autograd graph leads to it: see `replay`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Anatomy
from point_peft.running.activation import Key, PerModel, active_adapters
from point_peft.running.handover import Handover
from point_peft.running.nested import Args, Kwargs
from point_peft.running.proof import Ran
from point_peft.running.replay import resumed
from point_peft.running.second import Second, Start
from point_peft.running.stem import Stem
from point_peft.torch_private import graph_task

T = TypeVar("T")


@dataclass
class Seen:
    """Filled by the taps of a forward, read by parts at blocks; it lives as long as the forward's record.

    That is beyond the forward where checkpointing may run a block again, which then reads it again.
    """

    coordinates: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> coordinates (b, g, 3) of its patch tokens, in token order; of packed tokens (n, 3)."""
    samples: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> for packed tokens, which sample each belongs to: numbers (n,) or ends of samples (b,)."""
    patches: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> patch embedding (b, g, c), before positions are added."""
    points: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> the clouds (b, n, 3) that its tokens were grouped from."""
    misplaced: dict[int, str] = field(default_factory=dict)
    """Stage -> the error of its coordinates, for those that need them."""
    begun: set[int] = field(default_factory=set)
    """Stages of which a block has run."""
    first: tuple[str, int] | None = None
    """The kind of what was seen first, and its stage."""

    def again(self) -> Seen:
        """The same for a pass that goes on from here; no block has run in it."""
        copied = Seen()
        for name in ("coordinates", "samples", "patches", "points", "misplaced"):
            setattr(copied, name, dict(getattr(self, name)))
        return copied


class Root(Protocol):
    """The module that holds the adapters, as far as a forward needs it."""

    key: Key
    anatomy: Anatomy | None
    default: tuple[str, ...]
    slots: dict[str, nn.Module]
    traced: Forward | None
    losses: tuple[Tensor, ...]
    base_model: nn.Module
    adapters: nn.ModuleDict

    def backbone_tokens(self, forward: Forward, source: str, adapter: str) -> Tensor: ...


class Forward:
    """One pass through an adapted model, or through a part of it that is called directly."""

    def __init__(self, root: Root, active: tuple[str, ...], parent: Forward | None = None) -> None:
        self.root = root
        self.active = active
        self.parent = parent
        self.inputs: tuple[Args, Kwargs] | None = None
        """The arguments of the model, until the forward ends; None in a direct call of a part of it."""
        self.given: tuple[Args, Kwargs] | None = None
        """The arguments of the call, where an adapter takes others than the backbone."""
        self.method: str | None = None
        """The method that was called instead of the model itself."""
        self.seen = Seen()
        self.handover = Handover()
        self.stem = Stem()
        self.second = Second()
        self.shared: Shared | None = None
        """Set if this is a batch that several forwards run."""
        self.whole: Forward | None = None
        """The batch that this forward runs, or runs a part of."""
        self.rows: Tensor | None = None
        """The samples of it that this forward runs, None for all."""
        self.cache: dict[Hashable, Any] = {}
        self.calls: Counter[tuple[str, int, str]] = Counter()
        """(adapter, number of the method, site) -> calls so far, where a part must tell its first call from others."""
        self.losses: list[Tensor] = []
        """Terms that parts add to the training loss."""
        self.apart = False
        """True while a part runs modules of the backbone for itself: what they are given is not the model's."""
        self.ran: dict[tuple[str, str], Ran] | None = None
        """The (adapter, site) pairs that ran, while something is still to be proved of an adapter."""
        self.watches = False
        """True if it is watched whose weights are read by others."""
        self._task = graph_task()

    @property
    def recomputing(self) -> bool:
        """True while gradient checkpointing runs a part of this forward again."""
        return graph_task() != self._task

    def add_loss(self, loss: Tensor) -> None:
        """Add a term to what `auxiliary_loss` gives; not a second time when checkpointing runs a part again."""
        if not self.recomputing:
            self.losses.append(loss)

    @contextmanager
    def running_apart(self) -> Iterator[None]:
        """Within the block, a part runs modules of the backbone for itself."""
        self.apart = True
        try:
            yield
        finally:
            self.apart = False

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, called once per forward for a key. Only for results without gradient.

        A result with gradient belongs to the block that made it: checkpointing must be able to make it again there.
        """
        if key not in self.cache:
            self.cache[key] = make()
        result: T = self.cache[key]
        return result


@dataclass
class Shared:
    """A batch that several forwards run, one after another: parts of it, or all of it for several tasks."""

    samples: int
    """The number of all samples."""
    rows: Tensor | None = None
    """Those that the next forward runs, None for all."""


_forward: PerModel[Forward] = PerModel("point_peft_forward")
_direct: PerModel[Forward] = PerModel("point_peft_direct")
_replica: PerModel[Root] = PerModel("point_peft_replica")
_losses: PerModel[tuple[Tensor, ...]] = PerModel("point_peft_losses")


# ---- forwards of the model -------------------------------------------------------------------------------------------


def open_forward(root: Root, args: Args, kwargs: Kwargs) -> Forward:
    """Begin a forward of the whole model; the caller ends it with `close_forward`."""
    parent = opened(root) if torch.compiler.is_compiling() else _current(root)
    if not torch.compiler.is_compiling():
        root = _replica.get(root.key) or root
    second = parent is not None and parent.second.wanted is not None
    forward = Forward(root, () if second else active_adapters(root), parent)
    forward.inputs, forward.handover.whole = (args, kwargs), True
    if forward.active:
        forward.second.start = Start.of("", args, kwargs)
    if parent is not None and second:
        forward.second.owner, forward.stem.known = parent.second.asked_for, parent.stem.of_samples(None, 0)
    elif parent is not None and parent.shared is not None:
        batch = parent.shared
        forward.whole, forward.rows = parent, batch.rows
        forward.stem.known = parent.stem.of_samples(batch.rows, batch.samples)
        if batch.rows is None:
            forward.stem.calls = parent.stem.calls
    reopen(root, forward)
    return forward


def close_forward(forward: Forward) -> None:
    """End a forward. What checkpointing may need of it stays with its autograd graph."""
    if forward.whole is not None:
        forward.whole.losses += forward.losses
    forward.inputs, forward.whole = None, None
    forward.stem.forget()
    forward.second.forget()
    forward.handover.end()
    if forward.parent is None and torch.compiler.is_compiling():
        forward.root.losses = tuple(forward.losses)
    elif forward.parent is None and (forward.losses or _losses.get(forward.root.key)):
        _losses.set(forward.root.key, tuple(forward.losses))
    reopen(forward.root, forward.parent)
    forward.parent = None
    if not torch.compiler.is_compiling():
        _direct.set(forward.root.key, None)


def auxiliary_loss(root: Root) -> Tensor:
    """The sum of the terms that parts added to the training loss in the last forward of this thread or task."""
    losses = _losses.get(root.key) or root.losses
    if losses:
        return torch.stack([loss.float() for loss in losses]).sum()
    return torch.zeros((), device=next(root.base_model.parameters()).device)


def opened(root: Root) -> Forward | None:
    """The forward that is open, if any."""
    return root.traced if torch.compiler.is_compiling() else _forward.get(root.key)


def reopen(root: Root, forward: Forward | None) -> None:
    """Be in the forward that `opened` said, whatever came to an end in between."""
    if torch.compiler.is_compiling():
        root.traced = forward
    else:
        _forward.set(root.key, forward)


@contextmanager
def replica(root: Root) -> Iterator[None]:
    """Within the block, forwards of this model run on the tensors of a DataParallel replica."""
    _replica.set(root.key, root)
    try:
        yield
    finally:
        _replica.set(root.key, None)


# ---- the forward that a hook runs in ---------------------------------------------------------------------------------


def current_forward(root: Root) -> Forward:
    """The forward that a hook runs in.

    A submodule or another method of the model called directly, without the model's own forward, gets a forward that
    lasts until the next.
    """
    if torch.compiler.is_compiling():
        return root.traced or Forward(root, tuple(root.slots))
    forward = _current(root)
    if forward is not None:
        return forward
    direct, active = _direct.get(root.key), active_adapters(root)
    if direct is not None and direct.active == active:
        return direct
    fresh = Forward(_replica.get(root.key) or root, active)
    if direct is not None:
        seen = direct.seen.again()
        for name in ("coordinates", "patches", "points", "samples"):
            setattr(fresh.seen, name, getattr(seen, name))
    _direct.set(root.key, fresh)
    return fresh


def restart_direct(root: Root, what: str, stage: int) -> None:
    """Something is seen that begins another direct call: what was seen first in the last one, or its coordinates."""
    if torch.compiler.is_compiling() or _current(root) is not None:
        return
    direct = _direct.get(root.key)
    if direct is not None and (
        # Clouds are seen ahead of the coordinates that are chosen from them.
        direct.seen.first == (what, stage) or (what in ("coordinates", "points") and stage in direct.seen.coordinates)
    ):
        _direct.set(root.key, None)
    fresh = current_forward(root)
    fresh.seen.first = fresh.seen.first or (what, stage)


def forget(root: Root) -> None:
    """Let go of what this thread or task keeps of its last forward: an adapter that it used may be gone."""
    root.losses = ()
    _losses.set(root.key, None)
    _direct.set(root.key, None)


def _current(root: Root) -> Forward | None:
    task, forward = graph_task(), _forward.get(root.key)
    if forward is not None and forward._task == task:
        return forward
    marked: Forward | None = None if task == -1 else resumed(root.key)
    return marked
