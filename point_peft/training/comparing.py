"""Two models on the same clouds: how good each is, where they differ, and who is right there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from point_peft.data.cloud import Task
from point_peft.data.cloud_set import CloudSet
from point_peft.errors import PointPeftError
from point_peft.training.answers import Comparison, Counts, Names
from point_peft.training.feeding import Feed, on_device, set_mode, size_of
from point_peft.training.objective import flat_scores, scores_of
from point_peft.training.plan import in_order
from point_peft.training.state import adapters_of


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One of the models that are compared, and how clouds get through it."""

    name: str
    """For errors."""
    model: nn.Module
    clouds: Dataset[Any]
    """The same clouds for all, each prepared as this model takes them."""
    feed: Feed
    adapter: str | None = None
    """The adapter that answers; None: those that are active."""
    order: Tensor | None = None
    """(classes,): the places of the classes among this model's own; None: as they are."""


def compare(
    first: nn.Module,
    second: nn.Module,
    clouds: Dataset[Any],
    classes: Sequence[str] | None = None,
    *,
    adapters: tuple[str | None, str | None] = (None, None),
    together: bool = False,
    task: Task = "classification",
    batch_size: int = 16,
    to_inputs: Callable[[Any], Any] | None = None,
    to_labels: Callable[[Any], Tensor] | None = None,
    to_logits: Callable[[Any], Tensor] | None = None,
    collate: Callable[[Sequence[Any]], Any] | None = None,
) -> Comparison:
    """Compare two models, A and B, on the same clouds; both are left in eval mode.

    They may be one model with two `adapters`, whose stem then runs once for both, and with `together` both are also
    active at once, A's before B's, and answer with A's head. `classes` are their names (default: those of a
    `CloudSet`). What is not labelled, -1, takes part in the agreement only. Data sets, `to_inputs`, `to_labels`,
    `to_logits` and `collate` are as for `fit`. Packed clouds need batches of one.

    Raises `PointPeftError` for outputs that do not fit the classes or are not finite, and for an empty data set.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> from point_peft import BitFitConfig, LoraConfig, get_peft_model
    >>> from point_peft.backbones import PointTransformer
    >>> from point_peft.training import compare
    >>> backbone = PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8)
    >>> model = get_peft_model(backbone, LoraConfig(r=4), "a")
    >>> model.add_adapter("b", BitFitConfig())
    >>> clouds = TensorDataset(torch.rand(8, 64, 3), torch.arange(8) % 2)
    >>> found = compare(model, model, clouds, [str(number) for number in range(15)], adapters=("a", "b"))
    >>> found.clouds, found.agreement >= 0, found.right.both <= 8
    (8, True, True)
    """
    names = clouds.classes if classes is None and isinstance(clouds, CloudSet) else tuple(classes or ())
    if not names:
        raise PointPeftError("the names of the classes are not known: give classes=, in the order of the outputs")
    feed = Feed(to_inputs=to_inputs, to_labels=to_labels, to_logits=to_logits, collate=collate)
    contenders = tuple(
        Contender(name=name, model=model, clouds=clouds, feed=feed, adapter=adapter)
        for name, model, adapter in zip("AB", (first, second), adapters, strict=True)
    )
    return compared(contenders[0], contenders[1], names, task, batch_size, together=together)


@torch.no_grad()
def compared(
    first: Contender, second: Contender, classes: Sequence[str], task: Task, batch_size: int, *, together: bool = False
) -> Comparison:
    """The comparison of two contenders, see `compare`."""
    if together and not _share_a_model(first, second):
        raise PointPeftError(
            "together needs two adapters of one backbone in one model, and here are two models: see if both were "
            "trained on the same backbone and take clouds that are prepared alike"
        )
    for contender in (first, second):
        set_mode(contender.model, False)
    count = size_of(first.clouds, "the data set")
    if not count:
        raise PointPeftError("there are no clouds to compare on")
    total: Counts | None = None
    for places in in_order(count, batch_size):
        answers, labels = zip(*_answers(first, second, places, classes, together), strict=True)
        counts = Counts.of(torch.stack(answers), labels[0].reshape(-1), len(places))
        total = counts if total is None else total + counts
    assert total is not None
    return Comparison.of(total, Names(tuple(classes), tuple(name_of(first.clouds, i) for i in range(count))), task)


@torch.no_grad()
def answers_for(first: Contender, second: Contender, place: int, classes: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """The labels (n,) of one cloud or its points, and the answers (n,) of two contenders, in eval mode."""
    logs, labels = zip(*_answers(first, second, [place], classes, False), strict=True)
    return labels[0].reshape(-1).cpu(), [own.argmax(dim=1).cpu() for own in logs]


def _answers(
    first: Contender, second: Contender, places: Sequence[int], classes: Sequence[str], together: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The log-probabilities (m, classes) and the labels of each contender for some clouds, and of both together."""
    if not _share_a_model(first, second):
        for contender in (first, second):
            labels, (args, kwargs) = _batch(contender, places)
            held = adapters_of(contender.model)
            named = contender.adapter
            with nullcontext() if held is None or named is None else held.use_adapter(named):
                output = contender.model(*args, **kwargs)
            yield _log_probabilities(contender, contender.name, output, labels, places, classes), labels
        return
    held = adapters_of(first.model)
    assert held is not None and first.adapter is not None and second.adapter is not None
    labels, (args, kwargs) = _batch(first, places)
    outputs = held.forward_tasks(args if args else kwargs, list(dict.fromkeys([first.adapter, second.adapter])))
    for contender in (first, second):
        output = outputs[contender.adapter]
        yield _log_probabilities(contender, contender.name, output, labels, places, classes), labels
    if together:
        with held.use_adapter([first.adapter, second.adapter]):
            output = first.model(*args, **kwargs)
        yield _log_probabilities(first, "A with B", output, labels, places, classes), labels


def _share_a_model(first: Contender, second: Contender) -> bool:
    alike = first.model is second.model and first.clouds is second.clouds
    return alike and first.adapter is not None and second.adapter is not None


def _batch(contender: Contender, places: Sequence[int]) -> tuple[Tensor, tuple[Any, Any]]:
    """The labels of some clouds, and the model's arguments for them."""
    device = next(contender.model.parameters()).device
    clouds: Any = contender.clouds
    batch = on_device(contender.feed.batch([clouds[place] for place in places]), device)
    return contender.feed.labels(batch), contender.feed.inputs(batch)


def _log_probabilities(
    contender: Contender, name: str, output: Any, labels: Tensor, places: Sequence[int], classes: Sequence[str]
) -> Tensor:
    """Log-probabilities (m, classes) out of what a model gives."""
    scores = scores_of(output, contender.feed.to_logits)
    if len(classes) not in scores.shape[1:]:
        raise PointPeftError(
            f"{name} gives {tuple(scores.shape)} for {len(places)} clouds, which is not one score for each of the "
            f"{len(classes)} classes: {', '.join(classes)}"
        )
    flat = flat_scores(scores, labels, len(classes), None).float()
    found = (flat if contender.order is None else flat[:, contender.order]).log_softmax(dim=1)
    broken = found.isnan().any(dim=1).reshape(len(places), -1).any(dim=1)
    if broken.any():
        place = places[int(broken.nonzero()[0])]
        raise PointPeftError(
            f"the outputs of {name} are not finite for {name_of(contender.clouds, place)}: a training that diverged "
            "leaves such values"
        )
    return found


def name_of(clouds: Dataset[Any], place: int) -> str:
    """A name for a cloud: where it comes from, if that is known, else its place."""
    return clouds.entries[place].source if isinstance(clouds, CloudSet) else f"cloud {place}"
