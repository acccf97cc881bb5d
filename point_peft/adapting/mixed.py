"""Several adapters in one call: for the same inputs, or each for its samples of a batch.

Forwards run one after another, one for each adapter, and share the backbone's frozen work.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.fitting import fitting_states
from point_peft.adapting.second_pass import answering, run_plain
from point_peft.errors import AdapterError
from point_peft.running.activation import choose_adapters, chosen_adapters
from point_peft.running.batching import Batch
from point_peft.running.forward import Forward, Root, Shared, close_forward, open_forward, opened, reopen
from point_peft.running.nested import Args, Kwargs
from point_peft.running.second import RandomNumbers


@contextmanager
def choosing(root: Root, names: tuple[str, ...]) -> Iterator[None]:
    """Within the block, and only in this thread or task, these adapters are active."""
    before = chosen_adapters(root)
    choose_adapters(root, names)
    try:
        yield
    finally:
        choose_adapters(root, before)


def forward_tasks(root: Root, args: Args, kwargs: Kwargs, names: Sequence[str | None]) -> dict[str | None, Any]:
    if len(set(names)) != len(names):
        raise AdapterError(f"a task is named twice in {list(names)}")
    random = _random_numbers(root)
    with sharing(root, args, kwargs, 0):
        return {name: _run(root, name, args, kwargs, random) for name in names}


def forward_mixed(root: Root, args: Args, kwargs: Kwargs, names: Sequence[str | None]) -> Any:
    if any(module.training for module in (root.adapters, root.base_model)):
        raise AdapterError("adapter_names is for inference: call model.eval() first, or train one adapter at a time")
    batch, random = Batch.of(args, kwargs, len(names)), _random_numbers(root)
    if len(set(names)) == 1:
        return _run(root, names[0], args, kwargs, random)
    device = next(root.base_model.parameters()).device
    places = {name: [i for i, other in enumerate(names) if other == name] for name in names}
    groups = {name: torch.tensor(rows, device=device) for name, rows in places.items()}
    asking = [name for name in groups if name is not None and get_adapter(root, name).asks_backbone]
    with sharing(root, args, kwargs, batch.count) as (whole, parts):
        alike = not any(fitting_states(get_adapter(root, name)) for name in groups if name is not None)
        if root.anatomy is not None and root.anatomy.stem and alike:
            run_plain(root, whole, "stem", None)
        outputs = _run_groups(root, parts, batch, {n: groups[n] for n in groups if n not in asking}, random)
        if asking:
            rows = torch.cat([groups[name] for name in asking]).sort().values
            part, parts.rows = batch.part(rows), rows
            with sharing(root, part.args, part.kwargs, part.count) as (_, shared):
                own = {name: torch.searchsorted(rows, groups[name]) for name in asking}
                outputs += [(rows[at], output) for at, output in _run_groups(root, shared, part, own, random)]
    return batch.joined(outputs)


@contextmanager
def sharing(root: Root, args: Args, kwargs: Kwargs, count: int) -> Iterator[tuple[Forward, Shared]]:
    """In here, forwards run parts of one batch, or run it for several tasks, and share the backbone's frozen work.

    Gives the batch's own forward, and what says which of its `count` samples the next forward runs.
    """
    before = opened(root)
    batch = open_forward(root, args, kwargs)
    batch.active, batch.shared = (), Shared(count)
    batch.stem.calls = {path: list(calls) for path, calls in batch.stem.known.items()}
    try:
        with answering(root):
            yield batch, batch.shared
    finally:
        close_forward(batch)
        reopen(root, before)


def _random_numbers(root: Root) -> RandomNumbers:
    """The numbers that come next: every forward of one call draws the same, such as the serial orders of its points."""
    return RandomNumbers.of({parameter.device for parameter in root.base_model.parameters()})


def _run_groups(
    root: Root,
    shared: Shared,
    batch: Batch,
    groups: Mapping[str | None, Tensor] | Mapping[str, Tensor],
    random: RandomNumbers,
) -> list[tuple[Tensor, Any]]:
    """(samples, output) of adapters, each for its samples of a batch."""
    outputs: list[tuple[Tensor, Any]] = []
    for name, rows in groups.items():
        part, shared.rows = batch.part(rows), rows
        outputs.append((rows, _run(root, name, part.args, part.kwargs, random)))
    return outputs


def _run(root: Root, name: str | None, args: Args, kwargs: Kwargs, random: RandomNumbers) -> Any:
    random.restore()
    with choosing(root, () if name is None else (name,)):
        return root.base_model(*args, **kwargs)
