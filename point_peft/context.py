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

from point_peft.anatomy import Anatomy
from point_peft.tokens import leaves

T = TypeVar("T")


class Key:
    """The identity of an adapted model: shared with its DataParallel replicas, new in a deep copy or a pickle."""


class Root(Protocol):
    """What a forward needs of the module that holds the adapters."""

    key: Key
    anatomy: Anatomy | None
    default: tuple[str, ...]
    traced: Forward | None
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
        self.cache: dict[Hashable, Any] = {}
        self.stem: dict[str, tuple[tuple[Any, ...], tuple[int, ...], Any]] = {}
        """Stem module -> its inputs, the versions of its output tensors, its output."""
        self.stop_at: str | None = None
        """While a second pass runs: what it is run for, "stem" or "backbone"."""
        self.stop_owner: str | None = None
        """And the adapter that it is run for, if that was made for another base's values of prefix tokens."""
        self.owner: str | None = None
        """The same adapter, in the second pass itself."""
        self.ran: set[tuple[str, str]] | None = None
        """The (adapter, site) pairs that ran, while that is still to be proved."""
        self.task = graph_task()

    @property
    def recomputing(self) -> bool:
        """Whether gradient checkpointing is running a part of this forward again."""
        return graph_task() != self.task

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


def graph_task() -> int:
    """The number of the backward pass that this thread is in, -1 outside of any."""
    if torch.compiler.is_compiling():
        return -1
    number: int = torch._C._current_graph_task_id()
    return number


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
_backward = threading.local()


# ---- activation ------------------------------------------------------------------------------------------------------


def active_adapters(root: Root) -> tuple[str, ...]:
    """The adapters that a forward started here would use: this context's choice, else the model's own."""
    if torch.compiler.is_compiling():
        return root.default
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


# ---- forwards --------------------------------------------------------------------------------------------------------


def open_forward(root: Root, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
    """Begin a forward of the whole model; the caller ends it with `close_forward`."""
    compiling = torch.compiler.is_compiling()
    parent = root.traced if compiling else _current(root)
    if not compiling:
        root = _replica.get(root.key) or root
    second = parent is not None and parent.stop_at is not None
    forward = Forward(root, () if second else active_adapters(root), parent)
    if second and parent is not None:
        forward.owner = parent.stop_owner
    forward.inputs = (args, kwargs)
    reopen(root, forward)
    return forward


def close_forward(forward: Forward) -> None:
    """End a forward. What checkpointing may need of it stays with its autograd graph."""
    forward.inputs = None
    forward.stem.clear()
    reopen(forward.root, forward.parent)
    forward.parent = None
    if not torch.compiler.is_compiling():
        _direct.set(forward.root.key, None)


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
        return Forward(root, root.default) if traced is None else traced
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


def restart_direct(root: Root, stage: int) -> None:
    """Coordinates of a stage arrive: if they already did in a direct call, another one has begun."""
    if torch.compiler.is_compiling() or _current(root) is not None:
        return
    direct = _direct.get(root.key)
    if direct is not None and stage in direct.coordinates:
        _direct.set(root.key, None)


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
