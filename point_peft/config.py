"""Configurations: frozen, keyword-only, self-validating dataclasses that travel as JSON.

A method's configuration registers itself under its method name and builds the method's parts; nothing else lists
the methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor, nn

from point_peft.anatomy.checking import anatomy_from_json
from point_peft.anatomy.description import Anatomy, Block, Stage
from point_peft.errors import PointPeftError, quoted
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone, narrowed
from point_peft.parts.base import Blueprint, Part
from point_peft.schema import Limit, MisfitError, at_least, fits, from_json, frozen, hints_of, limits_of, spell, to_json

CombinationType = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
"""The names of ways to combine adapters, which are PEFT's; `Combination` says what they mean."""
MajoritySign = Literal["total", "frequency"]
"""The count by which a sign is elected: of sizes or of adapters."""
Changes = Mapping[str, Mapping[str, Part]]
"""Adapter -> site -> the part that is a change of the backbone's weights there."""
METHODS: dict[str, type[TunerConfig]] = {}
"""Every method by name; a class enters by being defined."""


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
    adapts_columns: ClassVar[bool] = False
    """True of the method that fits clouds with other columns, by its fields `channels` and `backbone_channels`."""
    earlier: ClassVar[Mapping[str, Any]] = {}
    """Values of the fields that files do not state which were written before there were these fields."""
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
        check_fields(self)
        for layer in self.layers_to_transform or ():
            require(layer >= 0, self, "layers_to_transform", "block numbers from 0")

    @abstractmethod
    def build(self, backbone: Backbone) -> Blueprint:
        """The parts and shared state that this method adds to a backbone, which is not changed."""

    def chosen_blocks(self, backbone: Backbone) -> tuple[tuple[int, Block], ...]:
        """(number, block) of the blocks that are meant, for methods whose `target_modules` name blocks."""
        return backbone.select_blocks(self.method, self.target_modules, self.exclude_modules, self.layers_to_transform)

    def chosen_stages(self, backbone: Backbone) -> list[tuple[int, Stage, list[Block]]]:
        """(number, stage, blocks) of the stages that have blocks that are meant, with these."""
        chosen = [block for _, block in self.chosen_blocks(backbone)]
        stages = enumerate(backbone.known_anatomy(self.method).stages)
        split = [(number, stage, [block for block in chosen if block in stage.blocks]) for number, stage in stages]
        return [entry for entry in split if entry[2]]

    def chosen_modules(
        self,
        backbone: Backbone,
        inside: Callable[[Block], Iterable[str]],
        *,
        ahead: Iterable[str] = (),
        behind: Iterable[str] = (),
    ) -> list[str]:
        """Paths of the modules that are meant, for methods whose `target_modules` name modules.

        None means those `inside` every block and, unless `layers_to_transform` leaves some out, those `ahead` of the
        blocks and `behind` them.
        """
        layers, within = self.layers_to_transform, None
        if self.target_modules is None or layers is not None:
            within = [block for _, block in backbone.select_blocks(self.method, None, None, layers)]
        if self.target_modules is not None:
            paths = list(match_names(self.target_modules, list(backbone.modules)))
        else:
            paths = [path for block in within or () for path in inside(block)]
        if self.target_modules is None and layers is None:
            paths, within = [*ahead, *paths, *behind], None
        return narrowed(paths, self.method, self.exclude_modules, within)

    @property
    def identity_at_init(self) -> bool:
        """True if a fresh adapter leaves the backbone's output as it is."""
        return True

    def with_ranks(self, ranks: Mapping[str, int], names: Sequence[str]) -> TunerConfig:
        """The same with other ranks, by site, 0 for those that are left out, among modules called `names`.

        The scale of every change stays what it is. A method whose widths are fixed is the same as it was.
        """
        return self

    def principal(self) -> TunerConfig | None:
        """The same, begun from the principal factors of the weights that it changes; None: there is no such start."""
        return None

    def combined(
        self, adapters: Changes, weights: Sequence[float], combination: Combination
    ) -> tuple[TunerConfig, Mapping[str, Mapping[str, Tensor]]]:
        """The configuration and, by site, the tensors of the weighted combination of adapters of this method alone.

        For methods of which `combines` is true.
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
        values = {**METHODS[name].earlier, **{key: value for key, value in data.items() if key != "method"}}
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
        check_fields(self)
        require(bool(self.tuners), self, "tuners", "a list of at least one method's configuration")

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
        return {**_values(self), "tuners": [tuner.to_json() for tuner in self.tuners]}

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


@dataclass(frozen=True)
class Combination:
    """A way to make one adapter of several, each with a weight; the names and the results are those of PEFT.

    Of changes D_i = s_i B_i A_i with weights w_i:

    - "svd": the best approximation of sum_i w_i D_i of rank `svd_rank`, by default the largest of their ranks.
    - "cat": that sum exactly, of the rank of all together.
    - "linear": the sum of the factors, each times the root of |w_i s_i|. It is cheap and rough, since it has products
      of B_i and A_j too, and needs adapters of one rank, which it keeps.
    - "magnitude_prune_svd": "svd" of what is left of each D_i when only the share `density` of its values is kept, the
      largest ones.
    - "dare_linear_svd": values are kept at random with the probability `density`, and divided by it.
      `torch.manual_seed` decides.
    - "ties_svd", "dare_ties_svd": of what is left of the D_i by size, or at random, only values of the sign that wins
      are kept, by their sum (`majority_sign_method="total"`) or by their number ("frequency"), and their mean is taken,
      not their sum.
    - "magnitude_prune", "dare_linear", "ties", "dare_ties": the same with each of the factors, as "linear" is to "svd".

    A negative weight counts as the adapter with its change negated, in a vote too. The module `task_vectors` has the
    equations, and where they differ from PEFT's. PEFT's arguments `svd_clamp`, `svd_full_matrices` and `svd_driver` are
    left out: the last two do not change the result, and the first is of no paper.

    Changes add up only if they are of one backbone. Files are compared with it when they are loaded, by its
    fingerprint; those that PEFT wrote, and tensors put in by `load_state_dict`, do not say whose they are.
    """

    combination_type: CombinationType
    svd_rank: Annotated[int | None, at_least(1)] = None
    density: Annotated[float | None, Limit("more than 0, at most 1", lambda value: 0 < value <= 1)] = None
    majority_sign_method: MajoritySign = "total"

    def __post_init__(self) -> None:
        check_fields(self)
        kind = f"combination_type='{self.combination_type}'"
        require(self.svd_rank is None or self.of_changes, self, "svd_rank", f"None with {kind}, only svd has a rank")
        require(self.density is None or self.prunes, self, "density", f"None with {kind}, which keeps all values")
        require(self.density is not None or not self.prunes, self, "density", f"more than 0, at most 1 with {kind}")
        counts = self.majority_sign_method == "total" or self.elects
        require(counts, self, "majority_sign_method", f"'total' with {kind}, which elects no sign")

    @property
    def of_changes(self) -> bool:
        """True where changes are combined and approximated, false where their factors are."""
        return self.combination_type.endswith("svd")

    @property
    def prunes(self) -> bool:
        """True where only the share `density` of the values is kept."""
        return self.combination_type not in ("linear", "cat", "svd")

    @property
    def elects(self) -> bool:
        """True where a sign is elected for each value."""
        return "ties" in self.combination_type


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


def require(holds: bool, config: object, name: str, allowed: str) -> None:
    """Raise an error that names a field, its value and what is allowed, unless `holds`."""
    if not holds:
        raise PointPeftError(f"{type(config).__name__}.{name} is {quoted(getattr(config, name))}; allowed: {allowed}")


def check_fields(config: Any) -> None:
    """Freeze what is given for the fields, so that it can be hashed, and check it against their annotations."""
    for name, hint in hints_of(config.__class__).items():
        object.__setattr__(config, name, frozen(getattr(config, name)))
        require(fits(getattr(config, name), hint), config, name, spell(hint))
    for name, limits in limits_of(config.__class__).items():
        for limit in limits if getattr(config, name) is not None else ():
            require(limit.holds(getattr(config, name)), config, name, limit.words)


def _values(config: Any) -> dict[str, Any]:
    """The fields of a configuration as JSON values; an anatomy only where one is stated."""
    return {name: value for name, value in to_json(config).items() if name != "anatomy" or value is not None}


def _known_fields(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration from JSON values; those that do not fit are left to the check of the fields."""
    hints = hints_of(kind)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise PointPeftError(
            f"{kind.__name__} has no field {quoted(unknown[0])}; a newer version of point_peft may have written it"
        )
    values = dict(data)
    for name, value in data.items():
        if name == "anatomy":
            values[name] = None if value is None else anatomy_from_json(value)
        elif name != "tuners":
            with suppress(MisfitError):
                values[name] = from_json(value, hints[name])
    return values
