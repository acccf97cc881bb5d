"""A memory bank built from batches of training clouds, by one process or several."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.mixed import choosing
from point_peft.errors import AdapterError, PointPeftError
from point_peft.parts.base import Bank
from point_peft.running.forward import Root, close_forward, open_forward
from point_peft.running.nested import Args, Kwargs, call_arguments
from point_peft.running.second import eval_mode


def bank_of(adapter: Adapter, name: str) -> Bank:
    """The memory bank of an adapter."""
    for shared in adapter.shared_states():
        if shared.bank is not None:
            return shared.bank
    methods = ", ".join(tuner.method for tuner in adapter.config.tuners)
    raise AdapterError(
        f"adapter '{name}' ({methods}) has no memory bank: its configuration asks for none, or no block that is as "
        "wide as the features has prompts"
    )


def build_bank(
    root: Root, bank: Bank, name: str, batches: Iterable[Any], to_inputs: Callable[[Any], Any] | None, size: int | None
) -> None:
    """Fill a bank with the frozen backbone's features of batches, as `AdapterSet.build_memory_bank` says."""
    if size is not None and (type(size) is not int or size < 1):
        raise PointPeftError(f"size is {size!r}; allowed: 1 or more, or None")
    ranks = _ranks()
    features: list[Tensor] = []
    labels: list[Tensor] = []
    # One process of several draws a bar, and none does where stderr is no terminal: that is what None means.
    hidden = ranks is not None and torch.distributed.get_rank() > 0
    progress = tqdm(batches, desc="memory bank", unit="batch", disable=hidden or None)  # type: ignore[no-untyped-call]
    with eval_mode(root.base_model.modules()):
        for batch in progress:
            tokens = _frozen_tokens(root, *_model_inputs(batch, to_inputs), bank.source, name)
            features.append(bank.query(tokens).float().cpu())
            label = _labels(batch, len(features[-1]))
            if label is not None:
                labels.append(label.cpu())
    if ranks is not None:
        gathered: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(gathered, (features, labels))
        features = [entry for part, _ in gathered for entry in part]
        labels = [entry for _, part in gathered for entry in part]
    if not features:
        raise AdapterError("build_memory_bank got no batches")
    rows = torch.cat(features)
    classes = torch.cat(labels) if sum(map(len, labels)) == len(rows) else None
    # Sorted rows do not depend on the order of batches and processes, and a cloud seen twice counts once.
    rows, member = torch.unique(rows, dim=0, return_inverse=True)
    if classes is not None:
        classes = torch.zeros(len(rows), dtype=classes.dtype).scatter_(0, member, classes)
    bank.fill(rows, classes, size)


def _frozen_tokens(root: Root, args: Args, kwargs: Kwargs, source: str, adapter_name: str) -> Tensor:
    with torch.no_grad(), choosing(root, ()):
        forward = open_forward(root, args, kwargs)
        try:
            return root.backbone_tokens(forward, source, adapter_name)
        finally:
            close_forward(forward)


def _model_inputs(batch: Any, to_inputs: Callable[[Any], Any] | None) -> tuple[Args, Kwargs]:
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


def _ranks() -> int | None:
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


def _labels(batch: Any, count: int) -> Tensor | None:
    """The labels of a batch: a second item that is a tensor of `count` integers."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        return None
    labels = batch[1].reshape(-1)
    return labels if len(labels) == count and not labels.is_floating_point() else None
