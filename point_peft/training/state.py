"""The state of a training, and its file: whatever moment the process dies at, a whole one is there."""

from __future__ import annotations

import math
import os
import pickle
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from point_peft.adapter_set import AdapterSet
from point_peft.adapting.site import CHILD
from point_peft.errors import PointPeftError, quoted
from point_peft.files.tensors import SHARDED, is_sharded

if TYPE_CHECKING:
    from collections.abc import Iterator

Tensors = dict[str, Tensor]
VERSION = 1


def adapters_of(model: nn.Module) -> AdapterSet | None:
    """The adapters of a model, which is adapted or holds them; None for a plain one."""
    held = model if isinstance(model, AdapterSet) else model._modules.get(CHILD)
    return held if isinstance(held, AdapterSet) else None


def trained_part(model: nn.Module) -> nn.Module:
    """The module with everything that a training changes: the adapters of an adapted model, else the model."""
    held = adapters_of(model)
    return model if held is None else held.adapters


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names in `trained_part`."""
    return {name: p for name, p in trained_part(model).named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> Tensors:
    """Copies on the CPU of everything that a training changes: trained parameters, statistics, banks."""
    part = trained_part(model)
    frozen = {name for name, p in part.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: whole(value).cpu().clone() for name, value in part.state_dict().items() if name not in frozen}


def write_values(model: nn.Module, tensors: Tensors) -> None:
    """Give a model the values of a `snapshot` of it."""
    part = trained_part(model)
    there = part.state_dict()
    placed = {name: _placed_as(there[name], value) for name, value in tensors.items()}
    part.load_state_dict(placed, strict=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor without gradient, gathered if it is sharded over processes."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within the block, every process has the whole of each parameter, also of those that are sharded."""
    if SHARDED in sys.modules:
        model.state_dict()  # puts shards back in their places, where a forward has left whole tensors
    sharded: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    for module, name, parameter in sharded:
        module._parameters[name] = nn.Parameter(parameter.detach().full_tensor(), parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter


def _placed_as(there: Tensor, value: Tensor) -> Tensor:
    if not is_sharded(there):
        return value
    sharded: Any = there
    module = sys.modules[SHARDED]
    placed: Tensor = module.distribute_tensor(value.to(there.device), sharded.device_mesh, sharded.placements)
    return placed


class Average:
    """A running average of what is trained: after each step, decay * average + (1 - decay) * present."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.values = {name: p.detach().clone() for name, p in trained(model).items()}
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Take in the present values."""
        present = [p.detach() for p in trained(self.model).values()]
        self._update(list(self.values.values()), present, 1)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the model has the average's values; statistics and banks are those of the present."""
        parameters = trained(self.model)
        present = {name: p.detach().clone() for name, p in parameters.items()}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(present)

    def settle(self) -> None:
        """Give the model the average's values for good."""
        self._write(self.values)

    def _write(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in trained(self.model).items():
                parameter.copy_(values[name])

    def state(self) -> Tensors:
        """Its values on the CPU."""
        return {name: whole(value).cpu() for name, value in self.values.items()}

    def load(self, values: Tensors) -> None:
        """Take values that `state` gave."""
        for name, value in self.values.items():
            value.copy_(_placed_as(value, values[name]))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, gathered where it is sharded over processes."""
    state = optimizer.state_dict()
    gathered = {
        number: {name: whole(value) if isinstance(value, Tensor) else value for name, value in own.items()}
        for number, own in state["state"].items()
    }
    return {**state, "state": gathered}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer a state that `optimizer_state` gave, on whatever number of processes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    placed = {
        number: {
            name: _placed_as(parameters[number].detach(), value) if value.shape == parameters[number].shape else value
            for name, value in own.items()
        }
        for number, own in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": placed})


@dataclass(kw_only=True)
class Position:
    """The place that a training has reached, and the best that it has seen."""

    step: int = 0
    """Steps of the optimizer that were taken."""
    loss: float = 0.0
    """The sum of the losses of this epoch's steps so far."""
    best: float | None = None
    """The measure of the best epoch on validation."""
    best_loss: float = math.inf
    """That of the best epoch, by which epochs are told apart that are equally good."""
    best_epoch: int = 0
    worse: int = 0
    """Epochs since then."""
    stopped: bool = False
    """True once it has ended early."""
    best_values: Tensors = field(default_factory=dict)


def write_checkpoint(path: Path, place: Position, parts: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write the state of a training in the place of the last one, at once or not at all."""
    record = {"version": VERSION, "identity": dict(identity), "place": _vars(place), **parts}
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _vars(place: Position) -> dict[str, Any]:
    return {item.name: getattr(place, item.name) for item in fields(place)}


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> tuple[Position, dict[str, Any]]:
    """The place and the further parts of a checkpoint, which must be of the same training.

    Raises `PointPeftError` that names what differs.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, LookupError, ValueError, TypeError) as error:
        raise PointPeftError(f"the checkpoint '{path}' cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise PointPeftError(f"'{path}' is no checkpoint of this version of point_peft: begin anew in another folder")
    for name, value in identity.items():
        if record["identity"].get(name) != value:
            raise PointPeftError(
                f"'{path}' is of a training with another {name}, {quoted(record['identity'].get(name))}, "
                f"and not {quoted(value)}: "
                "resume with the same, or begin anew in another folder"
            )
    parts = {name: value for name, value in record.items() if name not in ("version", "identity", "place")}
    return Position(**record["place"]), parts
