"""Adapting weights that are read where their module is not called.

`nn.MultiheadAttention` reads the weights of its `out_proj`, and other attentions those of their `qkv`, to pass them to
a function; a hook at those modules never runs. While the module that reads runs, a mode of this thread gives functions
the adapted tensor wherever they are given the base's. The base's tensors stay as they are; no other thread sees it.

Gradient checkpointing of a block or of the module that reads works; of a part of the reader's own forward it does not,
because what is run again then runs outside the reader: torch's non-reentrant kind says so with an error.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LOOKS = frozenset({"__get__", "size", "dim", "numel", "stride", "is_floating_point", "__len__"})
"""Functions that look at a tensor and do not use what it holds."""
VIEWS = frozenset({"T", "mT", "H", "mH"})
"""Attributes that hand on what a tensor holds."""


def looks(func: Any) -> bool:
    """Tell whether a function of torch looks at a tensor and does not use what it holds; `tensor.T` uses it."""
    return func.__name__ in LOOKS and not (func.__name__ == "__get__" and func.__self__.__name__ in VIEWS)


class _State(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, Substitution | Watch]] = []


def arguments(args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """The values that a function of torch is given, with the items of lists and tuples."""
    values = [*args, *kwargs.values()]
    return values + [item for value in values if isinstance(value, (list, tuple)) for item in value]


class Substitution(TorchFunctionMode):
    """Gives functions the tensors of `adapted`, by the identity of the base's, and notes whose were asked for."""

    def __init__(self, adapted: Mapping[int, tuple[str, Tensor]], alive: Callable[[], bool]) -> None:
        super().__init__()
        self.adapted = adapted
        self.alive = alive
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(id(value) in self.adapted for value in arguments(args, kwargs)) and self.alive():
            args = tuple(self._given(value) for value in args)
            kwargs = {name: self._given(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _given(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self._given(item) for item in value)
        if id(value) not in self.adapted:
            return value
        owner, adapted = self.adapted[id(value)]
        self.used.add(owner)
        return adapted


class Watch(TorchFunctionMode):
    """Notes whose tensors functions are given, by the identity of these, while it is `alive`."""

    def __init__(self, owners: Mapping[int, str], alive: Callable[[], bool]) -> None:
        super().__init__()
        self.owners = owners
        self.alive = alive
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Not in what a model compiles itself, such as its attention, which knows no identities.
        if not torch.compiler.is_compiling() and not looks(func):
            used = {self.owners[id(value)] for value in arguments(args, kwargs) if id(value) in self.owners}
            if used and self.alive():
                self.used |= used
        return func(*args, **kwargs)


_state = _State()


def watch(reader: nn.Module, owners: Mapping[int, str], alive: Callable[[], bool]) -> None:
    """From now on, until the reader's `leave`, it is noted whose tensors functions called on this thread are given.

    `owners` has modules' paths by the identity of their tensors; nothing is noted while it is not `alive`.
    """
    _begin(reader, Watch(owners, alive))


def enter(reader: nn.Module, adapted: Mapping[int, tuple[str, Tensor]], alive: Callable[[], bool]) -> None:
    """From now on, until the reader's `leave`, functions called on this thread get the adapted tensors while `alive`.

    `adapted` has them by the identity of the base's, each with the path of the module that it belongs to.
    """
    _begin(reader, Substitution(adapted, alive))


def _begin(reader: nn.Module, mode: Substitution | Watch) -> None:
    mode.__enter__()  # type: ignore[no-untyped-call]
    _state.stack.append((reader, mode))


def leave(reader: nn.Module) -> set[str] | None:
    """End what the reader's `enter` began: the modules whose tensors were asked for. None if nothing was begun."""
    stack = _state.stack
    if not stack or stack[-1][0] is not reader:
        return None
    _, mode = stack.pop()
    mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    return mode.used


def depth() -> int:
    """The number of calls of `enter` that are open on this thread."""
    return len(_state.stack)


def unwind(to: int) -> None:
    """End what was left open, as by Ctrl-C, which no hook is told of."""
    stack = _state.stack
    while len(stack) > to:
        stack.pop()[1].__exit__(None, None, None)  # type: ignore[no-untyped-call]
