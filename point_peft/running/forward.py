"""What one forward pass of an adapted model knows, and which adapters are active in it.

Hooks keep no state of their own. They find it here: in eager mode in a context variable, so that threads and asyncio
tasks do not see each other; while `torch.compile` traces, which cannot read context variables, on the model itself.

Gradient checkpointing runs blocks again in the backward pass, when the forward is long over and possibly on another
thread. The outputs of a forward therefore carry a mark in the autograd graph: when the backward pass comes through it,
the thread that runs it is told which forward it is in.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Anatomy
from point_peft.errors import AdapterError
from point_peft.running.nested import leaves
from point_peft.running.second import Start
from point_peft.running.stem import Stem
from point_peft.torch_private import graph_task

T = TypeVar("T")
_NO_GRADIENT = (
    "a method that hands tensors on beside the tokens needs their gradient, and a part of the model runs without: use "
    "torch.utils.checkpoint with use_reentrant=False, and no torch.no_grad() inside the model"
)


class Key:
    """The identity of an adapted model: shared with its DataParallel replicas, new in a deep copy or a pickle."""


class Root(Protocol):
    """What a forward needs of the module that holds the adapters."""

    key: Key
    anatomy: Anatomy | None
    default: tuple[str, ...]
    slots: dict[str, nn.Module]
    traced: Forward | None
    losses: tuple[Tensor, ...]
    unproven: set[str]
    base_model: nn.Module
    adapters: nn.ModuleDict

    def backbone_tokens(self, forward: Forward, source: str, adapter: str) -> Tensor: ...


class Forward:
    """One pass through an adapted model: its inputs, the active adapters, coordinates and what is derived from them."""

    def __init__(self, root: Root, active: tuple[str, ...], parent: Forward | None = None) -> None:
        self.root = root
        self.active = active
        self.parent = parent
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """What the model was called with, until the forward ends."""
        self.method: str | None = None
        """The method that was called instead of the model itself."""
        self.coordinates: dict[int, Tensor] = {}
        """Stage -> coordinates (b, g, 3) of its patch tokens, in token order; of packed tokens (n, 3)."""
        self.samples: dict[int, Tensor] = {}
        """Stage -> for packed tokens, which sample each belongs to: numbers (n,) or ends of samples (b,)."""
        self.misplaced: dict[int, str] = {}
        """Stage -> what is wrong with its coordinates, for those that need them."""
        self.begun: set[int] = set()
        """Stages of which a block has run."""
        self.ended = 0
        """In a second pass: how often the block that it ends at has run."""
        self.calls: Counter[tuple[str, str]] = Counter()
        """(adapter, site) -> calls so far, where a part must tell its first call from others."""
        self.patches: dict[int, Tensor] = {}
        """Stage -> patch embedding (b, g, c), before positions are added."""
        self.points: dict[int, Tensor] = {}
        """Stage -> the clouds (b, n, 3) that its tokens were grouped from."""
        self.notes: dict[Hashable, Tensor] = {}
        """What one hook of a module leaves for another of the same call, as of a norm for its block."""
        self.gradless: set[Hashable] = set()
        """Notes that were made where gradients were off."""
        self.first_seen: tuple[str, int] | None = None
        """What was seen first in it, of which stage."""
        self.losses: list[Tensor] = []
        """What parts add to the training loss."""
        self.apart = False
        """Whether a part runs modules of the backbone for itself, so that what they are given is not the model's."""
        self._left: dict[Hashable, Tensor] = {}
        self._taken: dict[tuple[Hashable, str], list[Tensor | None]] = {}
        self.with_gradient = torch.is_grad_enabled()
        self.cache: dict[Hashable, Any] = {}
        self.stem = Stem()
        self.start: Start | None = None
        """The call of the model itself, if adapters are active in it."""
        self.trunk: Start | None = None
        """The call of the module that runs all blocks, if no adapter has acted before it."""
        self.acted = False
        """Whether a part of an adapter has acted."""
        self.shares = False
        """Whether this is a batch that several forwards, one after another, run parts of or run for several tasks."""
        self.rows: Tensor | None = None
        """Of such a batch: the samples that the next forward runs, None for all of them."""
        self.samples_in_all = 0
        """Of such a batch: how many samples it has."""
        self.whole: Forward | None = None
        """The batch that this forward runs a part of."""
        self.stop_at: str | None = None
        """While a second pass runs: what it is run for, "stem" or "backbone"."""
        self.stop_owner: str | None = None
        """And the adapter that it is run for, if that was made for another base's values of prefix tokens."""
        self.reached: Tensor | None = None
        """What a second pass was run for, where it could not end there."""
        self.owner: str | None = None
        """The same adapter, in the second pass itself."""
        self.ran: set[tuple[str, str]] | None = None
        """The (adapter, site) pairs that ran, while that is still to be proved."""
        self.task = graph_task()

    @property
    def recomputing(self) -> bool:
        """Whether gradient checkpointing is running a part of this forward again."""
        return graph_task() != self.task

    def leave(self, key: Hashable, value: Tensor) -> None:
        """Leave a tensor for modules that run later in this forward; it may have a gradient."""
        if self.recomputing:
            return  # those that run later have taken theirs
        if self.with_gradient and self.inputs is not None and not torch.is_grad_enabled():
            raise AdapterError(_NO_GRADIENT)
        self._left[key] = value

    def take(self, key: Hashable, path: str) -> Tensor | None:
        """What was last left under a key, None if nothing was; `path` says which module takes it.

        When checkpointing runs the module again, it gets what it got the first time.
        """
        taken = self._taken.setdefault((key, path), [])
        if not self.recomputing:
            taken.append(self._left.get(key))
        elif len(taken) > 1:
            raise AdapterError(
                f"'{path}' runs several times in a forward, and checkpointing runs it again: which of its runs that is "
                "cannot be told, so neither can what the block before it left for it; do without one of the two"
            )
        return taken[-1] if taken else None

    def note(self, key: Hashable, value: Tensor) -> None:
        """Leave a tensor for another hook of the same call of a module; it may have a gradient."""
        self.notes[key] = value
        if torch.is_grad_enabled():
            self.gradless.discard(key)
        else:
            self.gradless.add(key)

    def noted(self, key: Hashable) -> Tensor:
        """What was noted under a key, once: it need not be kept until the forward ends."""
        if key in self.gradless and torch.is_grad_enabled():
            raise AdapterError(_NO_GRADIENT)
        return self.notes.pop(key)

    def add_loss(self, loss: Tensor) -> None:
        """Add a term to what `auxiliary_loss` gives; not a second time when checkpointing runs a part again."""
        if not self.recomputing:
            self.losses.append(loss)

    def left(self, adapter: str, what: str) -> list[Tensor]:
        """What the methods of an adapter have left under `(adapter, number of the method, what)`."""
        return [value for key, value in self._left.items() if isinstance(key, tuple) and key[::2] == (adapter, what)]

    @property
    def leaves(self) -> bool:
        """Whether anything was left in it."""
        return bool(self._left)

    def forget_left(self) -> None:
        """At the end of a forward: what was taken stays for checkpointing, what was only left does not."""
        self._left.clear()

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


class Stop(Exception):
    """Ends a second pass early; its one argument is the tokens that it was run for."""


def end_second_pass(forward: Forward, tokens: Tensor | None) -> None:
    """End a second pass, of which `forward` is the first, with the tokens that it was run for, if they are known."""
    if not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        raise Stop(tokens)
    # torch.export loses its place in the model by an exception. The rest of the pass will not be in its graph.
    if forward.reached is None:
        forward.reached = tokens


class _PerModel(Generic[T]):
    """A context-local value for every adapted model; models that are gone leave nothing behind."""

    def __init__(self, name: str) -> None:
        self._values: ContextVar[Mapping[Key, T] | None] = ContextVar(name, default=None)

    def get(self, key: Key) -> T | None:
        values = self._values.get()
        return None if values is None else values.get(key)

    def set(self, key: Key, value: T | None) -> None:
        values = weakref.WeakKeyDictionary(self._values.get() or {})
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
        self._values.set(values)


_active: _PerModel[tuple[str, ...]] = _PerModel("point_peft_active")
_forward: _PerModel[Forward] = _PerModel("point_peft_forward")
_direct: _PerModel[Forward] = _PerModel("point_peft_direct")
_replica: _PerModel[Root] = _PerModel("point_peft_replica")
_losses: _PerModel[tuple[Tensor, ...]] = _PerModel("point_peft_losses")
_backward = threading.local()


def active_adapters(root: Root) -> tuple[str, ...]:
    """The adapters that a forward started here would use: this context's choice, else the model's own."""
    if torch.compiler.is_compiling():
        return tuple(root.slots)
    chosen = _active.get(root.key)
    return root.default if chosen is None else chosen


def choose_adapters(root: Root, names: tuple[str, ...] | None) -> None:
    """Set this context's choice; None: follow the model's own again."""
    _active.set(root.key, names)


def chosen_adapters(root: Root) -> tuple[str, ...] | None:
    """This context's own choice, None if it follows the model's."""
    return _active.get(root.key)


@contextmanager
def replica(root: Root) -> Iterator[None]:
    """Within the block, forwards of this model run on the tensors of a DataParallel replica."""
    _replica.set(root.key, root)
    try:
        yield
    finally:
        _replica.set(root.key, None)


@contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, these modules are in eval mode; then in the mode in which each was."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def open_forward(root: Root, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
    """Begin a forward of the whole model; the caller ends it with `close_forward`."""
    compiling = torch.compiler.is_compiling()
    parent = root.traced if compiling else _current(root)
    if not compiling:
        root = _replica.get(root.key) or root
    second = parent is not None and parent.stop_at is not None
    forward = Forward(root, () if second else active_adapters(root), parent)
    forward.inputs = (args, kwargs)
    if forward.active:
        forward.start = Start.of("", args, kwargs)
    if parent is not None and second:
        forward.owner, forward.stem.known = parent.stop_owner, parent.stem.of_samples(None, 0)
    elif parent is not None and parent.shares:
        forward.whole, forward.rows = parent, parent.rows
        forward.stem.known = parent.stem.of_samples(parent.rows, parent.samples_in_all)
        if parent.rows is None:
            forward.stem.calls = parent.stem.calls
    reopen(root, forward)
    return forward


def close_forward(forward: Forward) -> None:
    """End a forward. What checkpointing may need of it stays with its autograd graph."""
    if forward.whole is not None:
        forward.whole.losses += forward.losses
    forward.inputs, forward.whole = None, None
    forward.start, forward.trunk = None, None
    forward.stem.forget()
    forward.notes.clear()
    forward.forget_left()
    if forward.parent is None:
        _keep_losses(forward)
    reopen(forward.root, forward.parent)
    forward.parent = None
    if not torch.compiler.is_compiling():
        _direct.set(forward.root.key, None)


def _keep_losses(forward: Forward) -> None:
    """Keep what the parts of a forward add to the training loss until the next forward."""
    if torch.compiler.is_compiling():
        forward.root.losses = tuple(forward.losses)
    elif forward.losses or _losses.get(forward.root.key):
        _losses.set(forward.root.key, tuple(forward.losses))


def auxiliary_losses(root: Root) -> tuple[Tensor, ...]:
    """What the parts of the last forward of this thread or task add to the training loss."""
    return _losses.get(root.key) or root.losses


def forget(root: Root) -> None:
    """Let go of what this thread or task keeps of its last forward: an adapter that it used may be gone."""
    root.losses = ()
    _losses.set(root.key, None)
    _direct.set(root.key, None)


def opened(root: Root) -> Forward | None:
    """The forward that is open, if any."""
    return root.traced if torch.compiler.is_compiling() else _forward.get(root.key)


def reopen(root: Root, forward: Forward | None) -> None:
    """Be in the forward that `opened` said, whatever came to an end in between."""
    if torch.compiler.is_compiling():
        root.traced = forward
    else:
        _forward.set(root.key, forward)


def current_forward(root: Root) -> Forward:
    """The forward that a hook runs in.

    A submodule or another method of the model called directly, without the model's own forward, gets a forward that
    lasts until the next.
    """
    if torch.compiler.is_compiling():
        traced = root.traced
        return Forward(root, tuple(root.slots)) if traced is None else traced
    forward = _current(root)
    if forward is not None:
        return forward
    direct, active = _direct.get(root.key), active_adapters(root)
    if direct is None or direct.active != active:
        fresh = Forward(_replica.get(root.key) or root, active)
        if direct is not None:
            fresh.coordinates, fresh.patches = dict(direct.coordinates), dict(direct.patches)
            fresh.samples = dict(direct.samples)
        _direct.set(root.key, fresh)
        return fresh
    return direct


def restart_direct(root: Root, what: str, stage: int) -> None:
    """Something is seen that begins another direct call: what was seen first in the last one, or its coordinates."""
    if torch.compiler.is_compiling() or _current(root) is not None:
        return
    direct = _direct.get(root.key)
    if direct is not None and (
        direct.first_seen == (what, stage) or (what == "coordinates" and stage in direct.coordinates)
    ):
        _direct.set(root.key, None)
    fresh = current_forward(root)
    fresh.first_seen = fresh.first_seen or (what, stage)


def _current(root: Root) -> Forward | None:
    task = graph_task()
    forward = _forward.get(root.key)
    if forward is not None and forward.task == task:
        return forward
    if task == -1:
        return None
    resumed = getattr(_backward, "forwards", {}).get(root.key)
    marked: Forward | None = None if resumed is None else resumed()
    return marked


class _Resume:
    """A mark in the autograd graph: whoever runs the backward pass through here is in this forward."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __call__(self, gradients: Any) -> None:
        if not isinstance(getattr(_backward, "forwards", None), weakref.WeakKeyDictionary):
            _backward.forwards = weakref.WeakKeyDictionary()
        _backward.forwards[self.forward.root.key] = weakref.ref(self.forward)


def mark(forward: Forward, outputs: Any) -> None:
    """Mark the tensors of an output, nested as they may be, as results of this forward."""
    if torch.compiler.is_compiling():
        return
    for _, tensor in leaves(outputs):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(_Resume(forward))
