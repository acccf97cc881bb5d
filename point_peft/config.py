"""Configurations: frozen, keyword-only, self-validating dataclasses that travel as JSON.

A method's configuration registers itself under its method name and builds the method's parts; nothing else lists
the methods.
"""

from __future__ import annotations

import functools
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from point_peft.anatomy.description import Anatomy, Block
from point_peft.anatomy.values import from_json as anatomy_from_json
from point_peft.anatomy.values import to_json as anatomy_to_json
from point_peft.errors import PointPeftError, quoted
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Part

V = TypeVar("V", covariant=True)

Combination = Literal["linear", "cat", "svd"]
"""A way to combine adapters, see `PointPeftModel.add_weighted_adapter`."""
METHODS: dict[str, type[TunerConfig]] = {}
"""Every method by name; a class enters by being defined."""
MAX_INTEGER = 2**24
"""No integer of a configuration is larger."""


class FrozenMapping(Mapping[str, V]):
    """A mapping that can be hashed and not changed; it keeps its order. In JSON it is a list of pairs."""

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


@dataclass(frozen=True, kw_only=True)
class TunerConfig(ABC):
    """Configuration of one method.

    `target_modules` and `exclude_modules` are a list of names (exact or a dotted suffix) or one regular expression
    (full match); every entry must match. `layers_to_transform` keeps only these blocks, counted from 0.
    `modules_to_save` names modules that are trained and saved whole, by the same rule: None means the heads that the
    anatomy finds, an empty list none.
    """

    method: ClassVar[str]
    peft_type: ClassVar[str | None] = None
    """The name of the method in the PEFT package, if its adapters can be written in PEFT's format."""
    combines: ClassVar[bool] = False
    """True where several adapters of the method can become one, by `combined`."""

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: Sequence[int] | None = None
    modules_to_save: str | Sequence[str] | None = None
    anatomy: Anatomy | None = None
    """The anatomy of the backbone, stated or corrected; None: what is found."""

    def __init_subclass__(cls) -> None:
        name = cls.__dict__.get("method")
        if name is None:
            raise TypeError(f"{cls.__name__} must state its method name: method: ClassVar[str] = ...")
        known = METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"method {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        METHODS[name] = cls

    def __post_init__(self) -> None:
        freeze_collections(self)
        check_types(self)
        for layer in self.layers_to_transform or ():
            require(layer >= 0, self, "layers_to_transform", "block numbers from 0")

    @abstractmethod
    def build(self, backbone: Backbone) -> Blueprint:
        """The parts and shared state that this method adds to a backbone, which is not changed."""

    def chosen_blocks(self, backbone: Backbone) -> tuple[tuple[int, Block], ...]:
        """(number, block) of the blocks that are meant, for methods whose `target_modules` name blocks."""
        return backbone.select_blocks(self.method, self.target_modules, self.exclude_modules, self.layers_to_transform)

    @property
    def identity_at_init(self) -> bool:
        """True if a fresh adapter leaves the backbone's output as it is."""
        return True

    def combined(
        self,
        adapters: Mapping[str, Mapping[str, Part]],
        weights: Sequence[float],
        combination_type: Combination,
        svd_rank: int | None,
    ) -> tuple[TunerConfig, Mapping[str, Mapping[str, Tensor]]]:
        """The configuration and, by site, the tensors of the weighted combination of adapters of this method alone.

        `adapters` has the changes of the backbone's weights of each, by site. For methods of which `combines` is true.
        """
        raise NotImplementedError

    def why_not_peft(self, parts: Mapping[str, Part], modules: Mapping[str, nn.Module]) -> str | None:
        """A reason why PEFT's format cannot say what is at some site; None if it can. For those with a `peft_type`."""
        raise NotImplementedError

    def to_peft(self, paths: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
        """The fields of PEFT's configuration for this method at the sites `paths`, among modules called `names`."""
        raise NotImplementedError

    @staticmethod
    def from_peft(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """The fields of this method, and the modules to save whole, that PEFT's configuration means among `names`."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, with the method's name."""
        return {"method": self.method, **_values(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TunerConfig:
        """The configuration that `to_json` describes; unknown methods and fields are refused."""
        name = data.get("method")
        if not isinstance(name, str) or name not in METHODS:
            raise PointPeftError(f"method {quoted(name)} is unknown; known methods: {', '.join(sorted(METHODS))}")
        values = {key: value for key, value in data.items() if key != "method"}
        return METHODS[name](**_known_fields(METHODS[name], values))


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Configuration of one adapter: one or more methods, and what they are applied to.

    `base_model_name_or_path` and `revision` say which backbone the adapter belongs to; they are kept as given.
    `modules_to_save` and `anatomy` override what the methods' own fields say.
    """

    tuners: Sequence[TunerConfig]
    modules_to_save: str | Sequence[str] | None = None
    anatomy: Anatomy | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        freeze_collections(self)
        require(bool(self.tuners), self, "tuners", "a list of at least one method's configuration")
        check_types(self)

    @staticmethod
    def of(config: PeftConfig | TunerConfig) -> PeftConfig:
        """A configuration of one method as that of an adapter."""
        if isinstance(config, PeftConfig):
            return config
        if isinstance(config, TunerConfig):
            return PeftConfig(tuners=(config,))
        raise PointPeftError(f"config must be a method's configuration or a PeftConfig, not {type(config).__name__}")

    @property
    def stated_anatomy(self) -> Anatomy | None:
        """The anatomy of this field, else those of the methods, which must agree; None: what is found."""
        if self.anatomy is not None:
            return self.anatomy
        stated = [tuner.anatomy for tuner in self.tuners if tuner.anatomy is not None]
        if not all(anatomy.agrees(stated[0]) for anatomy in stated):
            raise PointPeftError("anatomy: the methods of one adapter state different ones; state it in PeftConfig")
        return stated[0] if stated else None

    @property
    def saved_modules(self) -> str | tuple[str, ...] | None:
        """The modules saved whole: those of this field, else those of the methods; None: the heads that are found."""
        if self.modules_to_save is not None:
            return self.modules_to_save if isinstance(self.modules_to_save, str) else tuple(self.modules_to_save)
        stated = [tuner.modules_to_save for tuner in self.tuners if tuner.modules_to_save is not None]
        if not stated:
            return None
        if len(stated) == 1 and isinstance(stated[0], str):
            return stated[0]
        if any(isinstance(value, str) for value in stated):
            raise PointPeftError(
                "modules_to_save: state a regular expression in PeftConfig, not in one of several methods"
            )
        return tuple(dict.fromkeys(name for value in stated for name in value))

    @property
    def identity_at_init(self) -> bool:
        """True if a fresh adapter leaves the backbone's output as it is."""
        return all(tuner.identity_at_init for tuner in self.tuners)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return _values(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PeftConfig:
        """The configuration that `to_json` describes; unknown methods and fields are refused."""
        values = _known_fields(PeftConfig, data)
        tuners = values.get("tuners")
        if not isinstance(tuners, list) or not all(isinstance(tuner, dict) for tuner in tuners):
            raise PointPeftError("tuners must be a list of objects, one a method")
        return PeftConfig(**{**values, "tuners": [TunerConfig.from_json(tuner) for tuner in tuners]})

    def with_base(self, name_or_path: str, revision: str | None = None) -> PeftConfig:
        """The same configuration for a named base model."""
        return replace(self, base_model_name_or_path=name_or_path, revision=revision)


def difference(config: PeftConfig, other: PeftConfig) -> str | None:
    """The first field in which two configurations differ, in words; None: their adapters are built alike.

    Where the base came from does not count, and an anatomy, which the base must have, neither.
    """
    methods, others = [tuner.method for tuner in config.tuners], [tuner.method for tuner in other.tuners]
    if methods != others:
        return f"it is {' and '.join(methods)}, what is there is {' and '.join(others)}"
    pairs: list[tuple[PeftConfig | TunerConfig, PeftConfig | TunerConfig]] = [(config, other)]
    for mine, theirs in [*pairs, *zip(config.tuners, other.tuners, strict=True)]:
        stated = theirs.to_json()
        for name, value in mine.to_json().items():
            if name not in ("tuners", "anatomy", "base_model_name_or_path", "revision") and value != stated[name]:
                kind = type(mine).__name__
                return f"its {kind}.{name} is {quoted(value)}, what is there has {quoted(stated[name])}"
    return None


# ---- validation ------------------------------------------------------------------------------------------------------


def require(holds: bool, config: object, name: str, allowed: str) -> None:
    """Raise an error that names a field, its value and what is allowed, unless `holds`."""
    if not holds:
        raise PointPeftError(f"{type(config).__name__}.{name} is {quoted(getattr(config, name))}; allowed: {allowed}")


def freeze_collections(config: Any) -> None:
    """Turn lists given for fields into tuples, and dicts too, so that a configuration can be hashed and not changed."""
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, (list, set, frozenset)):
            ordered = value if isinstance(value, list) else sorted(value, key=_by_type)
            object.__setattr__(config, item.name, tuple(ordered))
        elif isinstance(value, Mapping):
            object.__setattr__(config, item.name, FrozenMapping(value))


def _by_type(value: Any) -> tuple[str, Any]:
    return type(value).__name__, value


def check_types(config: Any) -> None:
    """Check every field against its annotation; bool is not an int here, an int is a float, and an int has a limit.

    The limit keeps products of sizes from overflowing; whether they fit into memory is not told by a configuration.
    """
    hints = _hints(config.__class__)
    for item in fields(config):
        hint = hints[item.name]
        require(_fits(getattr(config, item.name), hint), config, item.name, _spell(hint))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, tuple) and all(_fits(entry, get_args(hint)[0]) for entry in value)
    if origin is Mapping:
        key, entry = get_args(hint)
        return isinstance(value, FrozenMapping) and all(_fits(k, key) and _fits(v, entry) for k, v in value.items())
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if hint is int:
        return type(value) is int and abs(value) <= MAX_INTEGER
    return type(value) is hint if hint in (bool, str, types.NoneType) else isinstance(value, hint)


def _spell(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(option) for option in get_args(hint))
    if origin is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    if origin is Mapping:
        return "a mapping of {} to {}".format(*map(_spell, get_args(hint)))
    if origin is not None:
        return f"a list of {_spell(get_args(hint)[0])}"
    words: dict[Any, str] = {
        int: f"an integer, at most {MAX_INTEGER}",
        float: "a finite number",
        bool: "True or False",
        str: "a string",
        types.NoneType: "None",
    }
    return words.get(hint, str(getattr(hint, "__name__", hint)))


def _values(config: Any) -> dict[str, Any]:
    """The fields of a configuration as JSON values; an anatomy only where one is stated."""
    found = {item.name: _to_json(getattr(config, item.name)) for item in fields(config)}
    return {name: value for name, value in found.items() if name != "anatomy" or value is not None}


def _to_json(value: Any) -> Any:
    if isinstance(value, TunerConfig):
        return value.to_json()
    if isinstance(value, Anatomy):
        return anatomy_to_json(value)
    if isinstance(value, FrozenMapping):
        return [[key, entry] for key, entry in value.items()]  # a file's objects are sorted, and the order counts
    return [_to_json(entry) for entry in value] if isinstance(value, tuple) else value


def _known_fields(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    known = {item.name for item in fields(kind)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise PointPeftError(
            f"{kind.__name__} has no field {quoted(unknown[0])}; a newer version of point_peft may have written it"
        )
    hints = _hints(kind)
    found = {name: _pairs(value) if get_origin(hints[name]) is Mapping else value for name, value in data.items()}
    anatomy = data.get("anatomy")
    return found if anatomy is None else {**found, "anatomy": anatomy_from_json(anatomy)}


def _pairs(value: Any) -> Any:
    """A list of pairs as a mapping; anything else, or a key that stands twice, is left to the check of types."""
    pairs = isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 and type(p[0]) is str for p in value)
    return FrozenMapping(dict(value)) if pairs and len(dict(value)) == len(value) else value
