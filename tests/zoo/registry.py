"""The registry of tiny backbones: what an entry holds, and how one enters."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from point_peft import Anatomy, describe
from point_peft.anatomy.presets import known_anatomy

CLASSES = 5
WIDTH = 24
"""Channels c of most of the backbones."""
ENCODER_WIDTHS = (16, 32, 32)
"""Channels inside of the encoder of patches, where it is this library's."""

Args = tuple[Any, ...]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TinyBackbone:
    """Recipe of a backbone and of its inputs. Outputs, by `select`, begin with the batch dimension."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Args]
    """(batch, seed) -> arguments of the model, all positional; one of them may be a dict or a list of tensors."""
    slice: Callable[[Args, int], Args]
    """Arguments for one sample of a batch."""
    select: Callable[[Any], Tensor]
    """The output as (b, ...)."""
    heads: tuple[str, ...]
    """The modules that a default adapter has to itself."""
    other_head: tuple[str, Callable[[], nn.Module]]
    """The last of them, and a replacement for seven classes."""
    random_in_training: bool = False
    bfloat16: bool = True
    """True if the model itself runs in bfloat16."""
    unused: tuple[str, ...] = ()
    """Parts, modules or parameters, that the output does not depend on."""
    needs: tuple[str, ...] = ()
    """Packages without which it cannot be made."""
    kind: str = "prefix tokens"
    """Kind of a backbone, as an adapter meets it; see `tests.test_representatives`, which also proves it."""

    @property
    def example(self) -> Args | None:
        """Inputs that `get_peft_model` needs as `example_inputs`: none where a preset describes the model."""
        return None if self.traced is None else self.inputs(3, 1)

    @property
    def traced(self) -> Anatomy | None:
        """The anatomy that tracing `example` gives, for a model that no preset describes."""
        return _traced(self)

    def build(self) -> nn.Module:
        """A fresh copy in eval mode, always of the same values."""
        return _mould(self).copy()


BACKBONES: dict[str, TinyBackbone] = {}


@functools.cache
def _prototype(backbone: TinyBackbone) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = backbone.make()
        enliven(model)
    return model.eval()


class _Writer(pickle.Pickler):
    """Pickles a model without its tensors, which it numbers: reading them from a pickle takes most of the time."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.numbers: dict[int, int] = {}
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.numbers[id(value)]


class _Reader(pickle.Unpickler):
    """Reads what `_Writer` wrote, with copies of the tensors."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors
        self.copies: dict[int, Tensor] = {}

    def persistent_load(self, number: int) -> Tensor:
        if number not in self.copies:
            value = self.tensors[number]
            copied = value.detach().clone()
            is_parameter = isinstance(value, nn.Parameter)
            self.copies[number] = nn.Parameter(copied, value.requires_grad) if is_parameter else copied
        return self.copies[number]


class Mould(Generic[Model]):
    """A model of which copies are made, several times as fast as deep ones, and than its class draws random numbers."""

    def __init__(self, model: Model) -> None:
        file = io.BytesIO()
        writer = _Writer(file)
        writer.dump(model)
        self._pickled, self._tensors = file.getvalue(), writer.tensors

    def copy(self) -> Model:
        model: Model = _Reader(io.BytesIO(self._pickled), self._tensors).load()
        return model


@functools.cache
def _mould(backbone: TinyBackbone) -> Mould[nn.Module]:
    return Mould(_prototype(backbone))


@functools.cache
def _traced(backbone: TinyBackbone) -> Anatomy | None:
    model = _prototype(backbone)
    return None if known_anatomy(model) is not None else describe(model, *backbone.inputs(3, 1))


def enliven(model: nn.Module) -> None:
    """Values at which every tensor matters: no zero biases, no unit scales, no fresh running statistics."""
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name in module._non_persistent_buffers_set:
                    continue  # a checkpoint would not carry it
                if not tensor.is_floating_point():
                    tensor.fill_(7)
                elif name == "running_var":
                    tensor.uniform_(0.5, 1.5)
                elif "norm" in type(module).__name__.lower() and name == "weight":
                    tensor.normal_(1.0, 0.1)
                elif tensor.ndim > 1:
                    tensor.normal_(0.0, (tensor.numel() / tensor.shape[0]) ** -0.5)
                else:
                    tensor.normal_(0.0, 0.1)


def register(
    *,
    inputs: Callable[[int, int], Args],
    slice: Callable[[Args, int], Args],
    heads: tuple[str, ...],
    other_head: Callable[[], nn.Module],
    select: Callable[[Any], Tensor] = lambda output: output,
    random_in_training: bool = False,
    bfloat16: bool = True,
    unused: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
    kind: str = "prefix tokens",
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Enter the decorated function, which makes a model, under its name.

    It stays out where one of the packages that it `needs` is not installed; so these are imported inside the function.
    """

    def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        if all(find_spec(package) is not None for package in needs):
            BACKBONES[make.__name__] = TinyBackbone(
                name=make.__name__,
                make=make,
                inputs=inputs,
                slice=slice,
                select=select,
                heads=heads,
                other_head=(heads[-1], other_head),
                random_in_training=random_in_training,
                bfloat16=bfloat16,
                unused=unused,
                needs=needs,
                kind=kind,
            )
        return make

    return enter


def linear_head(width: int) -> Callable[[], nn.Module]:
    """Makes a head of seven classes."""
    return lambda: nn.Sequential(nn.Linear(width, 7))
