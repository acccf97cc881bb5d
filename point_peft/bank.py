"""A memory bank built from batches of training clouds, by one process or several."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from point_peft.adapting.adapter import Adapter, get_adapter
from point_peft.adapting.fitting import fitted
from point_peft.adapting.mixed import choosing
from point_peft.anatomy.description import Steps
from point_peft.errors import AdapterError, PointPeftError
from point_peft.parts.base import Bank
from point_peft.parts.prototypes import Stream, joined, reduced
from point_peft.running.forward import Root, close_forward, open_forward
from point_peft.running.nested import Args, Kwargs, all_arguments, call_arguments, leaves
from point_peft.running.second import eval_mode

T = TypeVar("T")
EXACT_ROWS = 65_536
"""Clouds, of all processes, up to which a bank is reduced from all of their features; those of more are streamed."""


def banks_of(adapter: Adapter, name: str) -> list[Bank]:
    """The memory banks of an adapter, at least one."""
    banks = [state.bank for state in adapter.shared_states() if state.bank is not None]
    if banks:
        return banks
    methods = ", ".join(tuner.method for tuner in adapter.config.tuners)
    raise AdapterError(
        f"adapter '{name}' ({methods}) has no memory bank: its configuration asks for none, or no block that is as "
        "wide as the features has prompts"
    )


def fill_bank(adapter: Adapter, name: str, rows: Tensor | None) -> None:
    """Fill the bank of an adapter, of several the first, with rows (rows, c) that a user has given, if so."""
    if rows is None:
        return
    kept = banks_of(adapter, name)[0].fill(rows)
    if kept < len(rows):
        _warn_unlabelled(len(rows), kept, "memory_bank= has none; build_memory_bank(batches) takes labels too")


def build_banks(
    root: Root,
    adapter: Adapter,
    name: str,
    batches: Iterable[Any],
    to_inputs: Callable[[Any], Any] | None,
    to_labels: Callable[[Any], Any] | None,
    size: int | None,
) -> None:
    """Fill an adapter's banks with the backbone's features of batches, as `AdapterSet.build_memory_bank` says."""
    if size is not None and (type(size) is not int or size < 1):
        raise PointPeftError(f"size is {size!r}; allowed: 1 or more, or None")
    banks, ranks = banks_of(adapter, name), processes()
    harvests = [Harvest(bank.size if size is None else size) for bank in banks]
    # One process of several draws a bar, and none does where stderr is no terminal: that is what None means.
    hidden = ranks is not None and torch.distributed.get_rank() > 0
    progress = tqdm(batches, desc="memory bank", unit="batch", disable=hidden or None)  # type: ignore[no-untyped-call]
    with eval_mode(root.base_model.modules()):
        for batch in progress:
            inputs = model_inputs(batch, to_inputs)
            tokens = {source: frozen_tokens(root, *inputs, source, name) for source in {b.source for b in banks}}
            features = [bank.query(tokens[bank.source]).float().cpu() for bank in banks]
            count = len(features[0])
            if to_labels is None:
                labels = _possible_labels(batch, inputs, count)
            else:
                labels = {(): _checked_labels(to_labels(batch), count)}
            for harvest, own in zip(harvests, features, strict=True):
                harvest.take(own, labels)
            progress.set_description(f"memory bank (labels: {_shown(harvests[0].places)})", refresh=False)
    for bank, harvest in zip(banks, harvests, strict=True):
        rows, classes, count, places = harvest.rows(ranks)
        kept = bank.fill(rows, classes, size)
        if classes is None and kept < count:
            why = (
                f"those of the batches may be {_shown(places)}" if places else "no tensor of every batch can be theirs"
            )
            _warn_unlabelled(count, kept, f"{why}; to_labels=function that turns a batch into its labels gives them")


class Harvest:
    """The features of batches that one process has seen, and what may be their labels; prototypes, if they are many.

    `size` is the number of rows that they will be reduced to, None: all are kept.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.features: list[Tensor] = []
        self.labels: list[dict[Steps, Tensor]] = []
        self.places: list[Steps] = []
        """The places where every batch has what may be labels."""
        self.count = 0
        self.stream: Stream | None = None
        self.place: Steps | None = None
        """The place of the labels of what was streamed; None: it has none, as there was more than one place."""

    @property
    def most(self) -> float:
        """Rows that may be held."""
        return math.inf if self.size is None else max(EXACT_ROWS, 2 * self.size)

    def take(self, features: Tensor, labels: dict[Steps, Tensor]) -> None:
        """Take the features (b, c) of a batch, and what may be their labels."""
        if self.stream is None or self.place is not None:
            self.places = _common([dict.fromkeys(self.places), labels]) if self.count else list(labels)
        self.count += len(features)
        self.features.append(features)
        self.labels.append(labels)
        # Prototypes are half of what may be held, rows that wait for them the other.
        if sum(map(len, self.features)) > (self.most if self.stream is None else self.most // 2):
            self.condense()

    def condense(self) -> None:
        """Turn the rows that are held into prototypes."""
        if not self.features or self.size is None:
            return
        if self.stream is None:
            self.stream = Stream(self.size, int(self.most) // 2)
            self.place = self.places[0] if len(self.places) == 1 else None
        elif self.place is not None and self.place not in self.places:
            self.place = None
            self.stream.forget_labels()
        place = self.place
        labels = None if place is None else torch.cat([found[place] for found in self.labels])
        self.stream.add(torch.cat(self.features), labels)
        self.features, self.labels = [], []

    def rows(self, ranks: int | None) -> tuple[Tensor, Tensor | None, int, list[Steps]]:
        """The rows (n, c), the class of each if it is known, the number of all, and where labels may be.

        The same in all processes.
        """
        if sum(of_all_processes(self.count, ranks)) > self.most:
            self.condense()
            return joint_rows(of_all_processes(self, ranks))
        shards = of_all_processes((self.features, self.labels), ranks)
        features = [entry for part, _ in shards for entry in part]
        labels = [entry for _, part in shards for entry in part]
        if not features:
            raise AdapterError("build_memory_bank got no batches")
        # Sorted rows do not depend on the order of batches and processes, and a cloud seen twice counts once.
        rows, member = torch.unique(torch.cat(features), dim=0, return_inverse=True)
        classes, places = None, _common(labels)
        if len(places) == 1:
            classes = torch.cat([found[places[0]] for found in labels])
            classes = torch.zeros(len(rows), dtype=classes.dtype).scatter_(0, member, classes)
        return rows, classes, len(rows), places


def joint_rows(harvests: Sequence[Harvest]) -> tuple[Tensor, Tensor | None, int, list[Steps]]:
    """The same of processes that have all streamed what they had; their labels count where all have the same."""
    streamed = [(harvest, harvest.stream) for harvest in harvests if harvest.stream is not None]
    size, place = streamed[0][0].size, streamed[0][0].place
    assert size is not None  # without one, nothing is streamed
    labelled = place is not None and all(harvest.place == place for harvest, _ in streamed)
    for _, stream in streamed:
        if not labelled:
            stream.forget_labels()
    count = sum(stream.rows for _, stream in streamed)
    rows, classes = reduced(joined([stream.sums for _, stream in streamed]), size, count)
    places = _common([dict.fromkeys(harvest.places) for harvest, _ in streamed])
    return rows, classes if labelled else None, count, places


def of_all_processes(value: T, ranks: int | None) -> list[T]:
    """The values of all processes."""
    if ranks is None:
        return [value]
    gathered: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def _warn_unlabelled(count: int, kept: int, why: str) -> None:
    warnings.warn(
        f"{count} rows of the memory bank were reduced to {kept} without labels, so classes may have lost all of "
        f"theirs: {why}",
        stacklevel=4,  # where the user has called a method of the model
    )


def frozen_tokens(root: Root, args: Args, kwargs: Kwargs, source: str, adapter_name: str) -> Tensor:
    """Patch tokens (b, g, c) of the frozen backbone, for what an adapter takes as the arguments of the model."""
    with torch.no_grad(), choosing(root, ()):
        forward = open_forward(root, *fitted(get_adapter(root, adapter_name), args, kwargs))
        try:
            return root.backbone_tokens(forward, source, adapter_name)
        finally:
            close_forward(forward)


def model_inputs(batch: Any, to_inputs: Callable[[Any], Any] | None) -> tuple[Args, Kwargs]:
    """The model's arguments in a batch of a loader, see `AdapterSet.build_memory_bank`."""
    if to_inputs is not None:
        return call_arguments(to_inputs(batch))
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return (batch[0],), {}
    raise AdapterError(
        f"a batch must be a tensor or a tuple that begins with one, not {type(batch).__name__}: pass "
        "to_inputs=function that turns a batch into the model's arguments"
    )


def processes() -> int | None:
    """The number of processes that work together, None if this one is alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise AdapterError(
            f"this is one of {launched} processes, but torch.distributed is not initialised, so they would end with "
            "different banks: create the accelerate.Accelerator (or call init_process_group) first"
        )
    return None


def _possible_labels(batch: Any, inputs: tuple[Args, Kwargs], count: int) -> dict[Steps, Tensor]:
    """The tensors in a batch that hold one integer for each of `count` clouds and are no input of the model."""
    given = [tensor for _, tensor in all_arguments(*inputs)]
    return {
        steps: tensor.reshape(-1).cpu().long()
        for steps, tensor in leaves(batch)
        if steps and _one_integer_each(tensor, count) and not any(_equal(tensor, other) for other in given)
    }


def _one_integer_each(tensor: Tensor, count: int) -> bool:
    integers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return integers and tensor.numel() == count and tensor.shape[:1] in ((), (count,))


def _equal(tensor: Tensor, other: Tensor) -> bool:
    """Tell whether they are the same; on another device too, as what a model is given may have been moved."""
    return tensor is other or (tensor.shape == other.shape and bool((tensor.cpu() == other.cpu()).all()))


def _checked_labels(labels: Any, count: int) -> Tensor:
    """The labels (b,) that a function of the user's gives, as a tensor, an array or a list."""
    try:
        tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        shown = "None" if labels is None else f"a {type(labels).__name__} that is no tensor"
    else:
        if _one_integer_each(tensor, count):
            return tensor.reshape(-1).cpu().long()
        shown = f"a {type(labels).__name__} of shape {tuple(tensor.shape)} and type {tensor.dtype}"
    raise AdapterError(
        f"to_labels must give one integer for each of the {count} clouds of a batch, but it gave {shown}"
    )


def _common(labels: Sequence[Mapping[Steps, Tensor | None]]) -> list[Steps]:
    """The places where every batch has what may be labels; () stands for what `to_labels` gives."""
    return [steps for steps in labels[0] if all(steps in found for found in labels)] if labels else []


def _shown(places: Sequence[Steps]) -> str:
    names = ["batch" + "".join(f"[{step!r}]" for step in steps) if steps else "to_labels" for steps in places]
    return " or ".join(names) or "none"
