"""The material of every method: parts at sites of the backbone, state that a method's parts share, and their plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from einops import reduce
from torch import Tensor, nn

from point_peft.errors import AdapterError, AnatomyError
from point_peft.parts.prototypes import CHUNK_ROWS
from point_peft.running.forward import Forward
from point_peft.running.nested import Args, Kwargs

if TYPE_CHECKING:
    from typing_extensions import Self

M = TypeVar("M", bound=nn.Module)
FEWEST_ROWS = 8
"""Rows of a bank from which on it tells something to leave one out."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an adapted module, as a part sees it."""

    path: str
    """The site: the path of the module in the backbone."""
    module: nn.Module
    forward: Forward
    adapter: str
    shared: nn.ModuleDict
    """The state that the parts of one method in one adapter share, by name."""

    def state(self, name: str, kind: type[M]) -> M:
        """The shared state of that name, which must be of that kind."""
        module = self.shared[name]
        if not isinstance(module, kind):
            raise AdapterError(f"shared state '{name}' is a {type(module).__name__}, not a {kind.__name__}")
        return module


class Narrow(NamedTuple):
    """Two layers of a part that lead through few channels; it adds what the second gives."""

    down: nn.Linear | nn.Conv1d
    up: nn.Linear | nn.Conv1d
    slices: int = 1
    """The number of slices of the output that have rows of `down` of their own."""


class Part(nn.Module):
    """A method at one site of the backbone: it may change the module's inputs, its output, or both.

    A part holds the trainable tensors of its site and nothing about the forward it is in; that comes with the `Call`.
    The parts of several active adapters nest: `before` runs in the order of the adapters, `after` in reverse. What
    kind of part it is, it says itself: whoever attaches and runs parts knows no method, and asks for these answers.
    """

    prefix: ClassVar[str] = ""
    """Stands before the names of its tensors in a file, so that methods at one site do not collide."""
    mergeable: bool = False
    """True of a part that is a change of the module's own tensors, which `weights` gives."""
    tuned: tuple[str, ...] = ()
    """Names of those of the module's tensors that it has trained copies of, which may stand in their places."""
    needs_coordinates: ClassVar[bool] = False
    """True of a part that, at a block, needs one patch token for each of the coordinates that were seen."""
    token_parameters: ClassVar[frozenset[str]] = frozenset()
    """Names of its parameters that are tokens, such as prompts, or places in space: optimizers treat them apart."""
    restores: bool = False
    """True of a part that does no more than to put values of the base that it was made for in their places."""
    in_second_pass: ClassVar[bool] = False
    """True of a part that acts, by `before_second`, in the second pass too, which is otherwise the plain backbone's."""
    tuner: int = 0
    """The number of the method, among the adapter's, that it belongs to; set when the adapter is built."""
    by_weight: bool = False
    """True where its module is not called: another reads its tensors, and gets those of `weights` instead."""

    @property
    def own_module(self) -> nn.Module | None:
        """The module of the adapter's own that runs in the place of the site's; None for what acts beside that."""
        return None

    @property
    def narrow(self) -> Narrow | None:
        """Its layers that lead through few channels, which may start from data; None for a part without such."""
        return None

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The inputs that the module gets instead of `args` and `kwargs`."""
        return args, kwargs

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """The output that the caller gets instead of `output`; `args` and `kwargs` are what the module got."""
        return output

    def unused(self, call: Call) -> Iterable[Tensor]:
        """Its tensors that take no part in this forward, where another warning says why."""
        return ()

    def before_second(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The inputs that the module gets in the second pass, for parts that act in it."""
        return args, kwargs

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's own tensors, by name, with this part folded in; with gradient to the part."""
        raise AdapterError(f"{type(self).__name__} is not a change of its module's tensors")

    def key(self, call: Call, name: str) -> tuple[str, int, str]:
        """The name in a forward of what the parts of its method in this adapter note there and hand on."""
        return call.adapter, self.tuner, name

    def act_by_weight(self, path: str) -> None:
        """From now on, act through the tensors of the module at `path`, which is not called; or refuse to."""
        if not self.mergeable:
            raise AnatomyError(
                f"'{path}' is not called, another module reads its weights; a {type(self).__name__} there would have "
                "no effect: leave it out with exclude_modules or modules_to_save, or use a method that changes weights"
            )
        self.by_weight = True

    def file_name(self, name: str) -> str:
        """The name in a file of the tensor that this module's state dict calls `name`."""
        return f"{self.prefix}.{name}" if self.prefix else name


class SharedState(nn.Module):
    """State of a method in one adapter that does not belong to one site, such as a memory bank."""

    prefix: str = ""
    free_rows: ClassVar[frozenset[str]] = frozenset()
    """Buffers whose number of rows is not told by the configuration."""
    token_parameters: frozenset[str] = frozenset()
    """Names of its parameters that are tokens or places in space, as of a `Part`."""
    tuned_tokens: frozenset[str] = frozenset()
    """Names of the prefix tokens and positions of the backbone that it has trained copies of."""
    kept_tokens: frozenset[str] = frozenset()
    """Names of those whose values in the base it keeps."""
    trained_tokens: frozenset[str] = frozenset()
    """Names of those that any method of the adapter has trained copies of."""
    in_forward: ClassVar[bool] = True
    """False of state that no forward of the adapter reads, so that a merge needs none of it."""
    takes: Hashable = None
    """The form of the model's arguments that `fit` expects, which active adapters must agree on; None: any."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: WeakSet[SharedState] = WeakSet()
        """Copies that were made while it had no rows, such as a running average: they get the first with it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "waiting": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "waiting": WeakSet()})  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if self.lacks_rows():
            self.waiting.add(copied)
        return copied

    def lacks_rows(self) -> bool:
        """Tell whether it is still to be filled."""
        return any(len(self.get_buffer(name)) == 0 for name in self.free_rows)

    def hand_on(self) -> None:
        """Give the rows that it now has, with its other buffers, to the copies that wait and have none of their own."""
        if self.lacks_rows():
            return
        copies, self.waiting = list(self.waiting), WeakSet()
        for copied in copies:
            if copied.lacks_rows():
                for name, buffer in self.named_buffers():
                    setattr(copied, name, copied.new_buffer(name, buffer.shape).copy_(buffer))
                copied.hand_on()

    def new_buffer(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of that shape for a buffer, which can be written to later even if it is made in inference mode."""
        with torch.inference_mode(False):
            return self.get_buffer(name).new_empty(tuple(shape))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Load what torch would, and of buffers with free rows as many as there are."""
        for name in self.free_rows:
            there: Tensor = self.get_buffer(name)
            loaded: Any = state_dict.get(prefix + name)
            # Another width is left to torch, which refuses it.
            fits = isinstance(loaded, Tensor) and loaded.ndim == there.ndim and loaded.shape[1:] == there.shape[1:]
            if fits and len(loaded) != len(there):
                setattr(self, name, self.new_buffer(name, loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.hand_on()

    @property
    def bank(self) -> Bank | None:
        """Itself, where it is a bank; None for other state."""
        return None

    def other_base(self, base_model: nn.Module) -> bool:
        """Tell whether it was made for a base with other values, with which a second pass must then run."""
        return False

    def file_name(self, name: str) -> str:
        """The name in a file of the tensor that this module's state dict calls `name`."""
        return f"{self.prefix}.{name}" if self.prefix else name

    def fit(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments of the model as the backbone takes them, of those that it is called with."""
        return args, kwargs

    def check(self, base_model: nn.Module) -> None:
        """Raise `AdapterError` if what came from a file fits the tensors but cannot be worked with on this backbone."""
        return


class Bank(SharedState):
    """State that `build_memory_bank` fills with features of training clouds, in a type of its own."""

    source: str
    """The tokens that the features come from: "backbone", "stem", or those that the block of this path gets."""
    size: int | None = None
    """Rows that `fill` reduces more of them to; None: it keeps all."""
    rows: Tensor
    """(rows, c), in a form of its own."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers, but keep their types: bfloat16 would mix up which rows are near."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @property
    def bank(self) -> Bank:
        return self

    def query(self, tokens: Tensor) -> Tensor:
        """The features (b, c) of clouds with patch tokens (b, g, c): the maximum over the tokens."""
        feature: Tensor = reduce(tokens, "b g c -> b c", "max")
        return feature

    def features(self) -> Tensor:
        """The features (rows, c) that it was filled with, of unit length."""
        raise NotImplementedError

    def likenesses(self, query: Tensor) -> Tensor:
        """Cosines (b, rows) of queries (b, c) and the rows, as the bank compares them: here by direction alone."""
        likenesses: Tensor = nn.functional.normalize(query.float(), dim=1) @ self.features().T
        return likenesses

    def fill(self, features: Tensor, labels: Tensor | None = None, size: int | None = None) -> int:
        """Take features (rows, c); more than `size` are reduced, None: as the configuration says.

        Labels (rows,) say which class each is of. Returns the number of rows that it keeps.
        """
        raise NotImplementedError

    def keep(self, features: Tensor, direction: Callable[[Tensor], Tensor]) -> int:
        """Hold what `direction` makes of features (rows, c) as the rows, some at a time; returns their number."""
        rows = self.new_buffer("rows", features.shape)
        for part, into in zip(torch.split(features, CHUNK_ROWS), torch.split(rows, CHUNK_ROWS), strict=True):
            into.copy_(direction(part.float().to(rows.device)))
        self.rows = rows
        self.hand_on()
        return len(rows)


@dataclass(kw_only=True)
class Blueprint:
    """Everything that a method wants to add to a backbone, built but not attached."""

    parts: list[tuple[str, Part]] = field(default_factory=list)
    """(site path, part)"""
    modules: list[str] = field(default_factory=list)
    """Modules of the backbone that the method trains as a whole, which the adapter then has copies of."""
    holds_statistics: bool = False
    """True if running statistics in these copies stay those of the backbone, as the rest of it keeps its own."""
    shared: dict[str, SharedState] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)
    """The choices for this backbone that the configuration leaves open, in words for the report."""
