"""What every method is made of: parts at sites of the backbone, state that a method's parts share, and their plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from point_peft.anatomy import Anatomy, Block, is_norm
from point_peft.context import Forward
from point_peft.errors import AdapterError, AnatomyError
from point_peft.matching import match_names
from point_peft.tokens import Args, Kwargs

M = TypeVar("M", bound=nn.Module)


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


class Part(nn.Module):
    """What a method does at one site: it may change the module's inputs, its output, or both.

    A part holds the trainable tensors of its site and nothing about the forward it is in; that comes with the `Call`.
    The parts of several active adapters nest: `before` runs in the order of the adapters, `after` in reverse.
    """

    prefix: ClassVar[str] = ""
    """Stands before the names of its tensors in a file, so that methods at one site do not collide."""
    mergeable: bool = False
    """Whether the part is a change of the module's own tensors, which `weights` gives."""
    needs_coordinates: ClassVar[bool] = False
    """Whether the part, at a block, needs one patch token for each of the coordinates that were seen."""
    in_second_pass: ClassVar[bool] = False
    """Whether the part acts, by `before_second`, in the second pass too, which is otherwise the plain backbone's."""
    tuner: int = 0
    """Which of the adapter's methods it belongs to; set when the adapter is built."""
    by_weight: bool = False
    """Whether its module is not called: another reads its tensors, and gets those of `weights` instead."""

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The inputs that the module gets instead of `args` and `kwargs`."""
        return args, kwargs

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """The output that the caller gets instead of `output`; `args` and `kwargs` are what the module got."""
        return output

    def before_second(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The inputs that the module gets in the second pass, for parts that act in it."""
        return args, kwargs

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's own tensors, by name, with this part folded in; with gradient to the part."""
        raise AdapterError(f"{type(self).__name__} is not a change of its module's tensors")

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

    def file_name(self, name: str) -> str:
        """The name in a file of the tensor that this module's state dict calls `name`."""
        return f"{self.prefix}.{name}" if self.prefix else name

    def check(self, base_model: nn.Module) -> None:
        """Raise `AdapterError` if what came from a file fits the tensors but cannot be worked with on this backbone."""
        return


class Bank(SharedState):
    """State that `build_memory_bank` fills with features of training clouds."""

    source: str
    """Which tokens the features come from: "backbone" or "stem"."""

    def query(self, tokens: Tensor) -> Tensor:
        """The features (b, c) of clouds with patch tokens (b, g, c)."""
        raise NotImplementedError

    def fill(self, features: Tensor, labels: Tensor | None = None, size: int | None = None) -> None:
        """Take features (rows, c); more than `size` are reduced, None: as the configuration says.

        Labels (rows,) say which class each is of.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class Blueprint:
    """Everything that a method wants to add to a backbone, built but not attached."""

    parts: list[tuple[str, Part]] = field(default_factory=list)
    """(site path, part)"""
    modules: list[str] = field(default_factory=list)
    """Modules of the backbone that the method trains as a whole, which the adapter then has copies of."""
    shared: dict[str, SharedState] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A backbone as a method sees it while it plans: to be read, not changed."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    """Every module by path, under each of its names."""
    anatomy: Anatomy | None
    why_unknown: str = ""
    """Why there is no anatomy."""
    tuned_tokens: frozenset[str] = frozenset()
    """Prefix tokens and positions that a method before this one in the adapter trains."""
    pooled: frozenset[str] = frozenset()
    """What the adapter's own heads pool of the tokens, by the names of `heads.POOLS`; empty for the base's heads."""

    def known_anatomy(self, method: str) -> Anatomy:
        """The anatomy, which the method cannot do without."""
        if self.anatomy is None:
            raise AnatomyError(
                f"{method} adapts transformer blocks and needs to know how {type(self.model).__name__} is built, but "
                f"{self.why_unknown}"
            )
        return self.anatomy

    def select_blocks(
        self,
        method: str,
        targets: str | Sequence[str] | None,
        excluded: str | Sequence[str] | None,
        layers: Sequence[int] | None,
    ) -> tuple[tuple[int, Block], ...]:
        """(number, block) of the blocks that are meant: all, or those that the three fields of a config leave."""
        blocks = self.known_anatomy(method).blocks
        names = [block.path for block in blocks]
        chosen = set(names) if targets is None else set(match_names(targets, names, what="block"))
        if excluded is not None:
            chosen -= set(match_names(excluded, names, what="block", field="exclude_modules"))
        for layer in layers or ():
            if layer >= len(blocks):
                raise AnatomyError(
                    f"layers_to_transform: there is no block {layer}, the blocks are 0 to {len(blocks) - 1}"
                )
        kept = tuple((i, b) for i, b in enumerate(blocks) if b.path in chosen and (layers is None or i in layers))
        if not kept:
            raise AnatomyError(f"{method}: target_modules, exclude_modules and layers_to_transform leave no block")
        return kept


def narrowed(
    paths: Sequence[str], method: str, excluded: str | Sequence[str] | None, blocks: Sequence[Block] | None
) -> list[str]:
    """The modules that `exclude_modules` and, where blocks are given, `layers_to_transform` leave; at least one."""
    kept = [p for p in paths if blocks is None or any(p.startswith(block.path + ".") for block in blocks)]
    if excluded is not None:
        out = set(match_names(excluded, kept, field="exclude_modules"))
        kept = [path for path in kept if path not in out]
    if not kept:
        raise AnatomyError(f"{method}: exclude_modules and layers_to_transform leave no module")
    return kept


# ---- tuned tensors of the backbone -----------------------------------------------------------------------------------


def _copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


class TunedCopy(Part):
    """A part whose tensors are trained copies of the module's, by the same names.

    Where such parts are all that acts on a plain linear layer or LayerNorm, it runs with their tensors in the place of
    its own; elsewhere `after` adds the difference. Where two methods of one adapter tune the same tensor, it is tuned
    once.
    """

    mergeable = True
    tuned: tuple[str, ...]
    """The names of the tensors, which DataParallel's replicas do not have as parameters."""

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.tuned}


class TunedModule(Part):
    """A module of the adapter's own, whose output replaces that of the base's module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return self.module(*args, **kwargs)

    def file_name(self, name: str) -> str:
        return name.removeprefix("module.")


class TunedBias(TunedCopy):
    """A trained copy of a module's bias, for a module that adds its bias to the channels of its output.

    The base keeps its own, and several adapters can be active: what each has changed adds up.
    """

    tuned = ("bias",)

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = _copy(bias)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        shift = self.bias - getattr(call.module, "bias")  # noqa: B009 - a replica's is a tensor
        return output + per_channel(shift, call.module, output).to(output.dtype)


def per_channel(values: Tensor, module: nn.Module, output: Tensor) -> Tensor:
    """One value a channel (c,), shaped so that it meets the channels of what a norm or a linear layer returns."""
    # Of three and more dimensions, a BatchNorm's channels are the second; else they come last.
    second = isinstance(module, _BatchNorm) and output.ndim > 2
    return values.reshape(-1, *[1] * (output.ndim - 2)) if second else values


class TunedNorm(TunedCopy):
    """Trained copies of a norm's weight and, if it has one, bias; `after` knows norms that torch has a function for."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.tuned = tuple(name for name in ("weight", "bias") if norm._parameters.get(name) is not None)
        for name in self.tuned:
            self.register_parameter(name, _copy(norm.get_parameter(name)))

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        norm, x = call.module, args[0] if args else kwargs["input"]
        change = {name: per_channel(getattr(self, name) - getattr(norm, name), norm, output) for name in self.tuned}
        changed = _normalised(norm, x) * change["weight"]
        return output + (changed + change["bias"] if "bias" in change else changed).to(output.dtype)


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm gives before its weight and bias; a BatchNorm's frozen statistics do not move."""
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    if isinstance(norm, nn.RMSNorm):
        return nn.functional.rms_norm(x, norm.normalized_shape, eps=norm.eps)
    assert isinstance(norm, _BatchNorm)
    mean, var = norm.running_mean, norm.running_var
    return nn.functional.batch_norm(x, mean, var, training=mean is None, eps=norm.eps)


def tuned_biases(backbone: Backbone, paths: Sequence[str]) -> list[tuple[str, Part]]:
    """A `TunedBias` for each of the modules; each must have a bias."""
    parts: list[tuple[str, Part]] = []
    for path in paths:
        module = backbone.modules[path]
        bias = module._parameters.get("bias")
        if bias is None:
            raise AnatomyError(f"'{path}' ({type(module).__name__}) has no bias to tune")
        parts.append((path, TunedBias(bias)))
    return parts


def block_biases(backbone: Backbone, blocks: Sequence[Block]) -> list[str]:
    """The norms, attention projections and MLP layers of blocks that have a bias."""
    return [
        path
        for block in blocks
        for path in (*block.norms, *filter(None, [block.projection]), *block.linears)
        if backbone.modules[path]._parameters.get("bias") is not None
    ]


def tuned_norms(backbone: Backbone, paths: Sequence[str]) -> list[tuple[str, Part]]:
    """A `TunedNorm` for each of the modules; each must be a norm with a weight."""
    parts: list[tuple[str, Part]] = []
    for path in paths:
        norm = backbone.modules[path]
        if not is_norm(norm) or norm._parameters.get("weight") is None:
            raise AnatomyError(f"'{path}' is a {type(norm).__name__}; only a norm with a weight can be tuned")
        part = TunedNorm(norm)
        if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm, _BatchNorm)):
            part.act_by_weight(path)  # how it normalises is not known
        parts.append((path, part))
    return parts


# ---- what several methods are made of --------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A(x) = W_up dropout(activation(W_down x + b_down)) + b_up, from c channels to `width` and back."""

    def __init__(self, channels: int, width: int, dropout: float, activation: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.up = nn.Linear(width, channels)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.dropout(self.activation(self.down(x))))
        return out

    def zero_up(self) -> None:
        """Let the up-projection give zero, whatever it gets."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)


_ROLES = {
    **dict.fromkeys(("q", "query", "queries", "dst"), "q"),
    **dict.fromkeys(("k", "key", "keys", "src"), "k"),
    **dict.fromkeys(("v", "value", "values"), "v"),
    "qk": "qk",
    "kv": "kv",
}


def projects(block: Block, path: str) -> str:
    """What one of a block's `qkv` layers makes, in the order of its rows: "qkv", "kv", "k"; "" if no name tells it."""
    if len(block.qkv) == 1:
        return "qkv"
    words = path.removeprefix(block.attention + ".").replace(".", "_").split("_")
    # In torch_geometric's convolutions the layer for the values has no name but `lin`.
    return "v" if words == ["lin"] else next((_ROLES[word] for word in words if word in _ROLES), "")
