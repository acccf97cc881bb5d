"""Values against annotations: one engine for configurations and anatomies, and what their files say.

JSON has neither tuples nor an order of keys: a tuple is a list there, a mapping a list of pairs, a dataclass an object.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from point_peft.errors import PointPeftError, quoted

V = TypeVar("V", covariant=True)

MAX_INTEGER = 2**24
"""No integer is larger, so that products of sizes do not overflow; whether they fit into memory is not told here."""
_UNIONS = (Union, types.UnionType)


class FrozenMapping(Mapping[str, V]):
    """A mapping that can be hashed and not changed; it keeps its order."""

    def __init__(self, items: Mapping[str, V] | None = None) -> None:
        self._items: dict[str, V] = dict(items or {})

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class Limit:
    """Values that a field may have, in words and as a test: an entry of `Annotated`. None is always allowed by it."""

    words: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Limit:
    """The limit of numbers from `least` on."""
    return Limit(f"{least} or more", lambda value: value >= least)


Count = Annotated[int, at_least(1)]
Factor = Annotated[float, Limit("more than 0", lambda value: value > 0)]
Dropout = Annotated[float, Limit("0 or more and less than 1", lambda value: 0 <= value < 1)]


class MisfitError(PointPeftError):
    """A JSON value is not what an annotation asks for; the text names the innermost value that is not."""

    def __init__(self, value: object, hint: Any) -> None:
        super().__init__(f"{quoted(value)} where {getattr(hint, '__name__', hint)} is expected")


def frozen(value: Any) -> Any:
    """A list or set as a tuple, a mapping as a `FrozenMapping`, anything else as it is."""
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(value, key=lambda entry: (type(entry).__name__, entry)))
    if isinstance(value, list):
        return tuple(value)
    return FrozenMapping(value) if isinstance(value, Mapping) else value


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is what an annotation asks for, of a dataclass only whether it is one of that class.

    A bool is no int here, an int is a float, both have limits; sequences are tuples, mappings are frozen.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(fits(value, option) for option in options)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin is Mapping:
        key, entry = options
        return isinstance(value, FrozenMapping) and all(fits(k, key) and fits(v, entry) for k, v in value.items())
    if origin is not None:
        return isinstance(value, tuple) and all(fits(entry, options[0]) for entry in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if hint is int:
        return type(value) is int and abs(value) <= MAX_INTEGER
    return type(value) is hint if hint in (bool, str, types.NoneType) else isinstance(value, hint)


def spell(hint: Any) -> str:
    """An annotation in words."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return " or ".join(map(spell, options))
    if origin is Literal:
        return " or ".join(map(repr, options))
    if origin is Mapping:
        return "a mapping of {} to {}".format(*map(spell, options))
    if origin is not None:
        return f"a list of {spell(options[0])}"
    words: dict[Any, str] = {
        int: f"an integer, at most {MAX_INTEGER}",
        float: "a finite number",
        bool: "True or False",
        str: "a string",
        types.NoneType: "None",
    }
    return words.get(hint, str(getattr(hint, "__name__", hint)))


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of the fields of a dataclass, without limits."""
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind)}


@functools.cache
def limits_of(kind: type) -> dict[str, tuple[Limit, ...]]:
    """The limits of the fields of a dataclass that have any."""
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: get_args(hint)[1:] for item in fields(kind) if get_origin(hint := hints[item.name]) is Annotated}


def to_json(value: Any) -> Any:
    """A dataclass, tuple, mapping or plain value as a JSON value."""
    if is_dataclass(value):
        return {item.name: to_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, FrozenMapping):
        return [[key, to_json(entry)] for key, entry in value.items()]  # a file's objects are sorted, the order counts
    return [to_json(entry) for entry in value] if isinstance(value, tuple) else value


def from_json(value: Any, hint: Any) -> Any:
    """The value that `to_json` turned into this JSON value; raises `MisfitError` if the annotation does not fit it."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        if value is None and types.NoneType in options:
            return None
        some = [option for option in options if option is not types.NoneType]
        if len(some) == 1:
            return from_json(value, some[0])
        for option in some:
            with suppress(MisfitError):
                return from_json(value, option)
    elif origin is Mapping:
        pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        if pairs and len({from_json(key, options[0]) for key, _ in value}) == len(value):
            return FrozenMapping({key: from_json(entry, options[1]) for key, entry in value})
    elif is_dataclass(hint) and isinstance(hint, type):
        needed = {item.name for item in fields(hint) if item.default is MISSING}
        hints = hints_of(hint)
        if isinstance(value, dict) and needed <= set(value) <= set(hints):
            return hint(**{name: from_json(entry, hints[name]) for name, entry in value.items()})
    elif origin in (tuple, Sequence):
        if isinstance(value, (list, tuple)):
            return tuple(from_json(entry, options[0]) for entry in value)
    elif fits(value, hint):
        return value
    raise MisfitError(value, hint)
