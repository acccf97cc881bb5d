"""From what a data set gives to what a model takes, and which of it is to be learned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from point_peft.data.cloud import Sample
from point_peft.data.cloud_set import collate
from point_peft.errors import PointPeftError
from point_peft.running.nested import Args, Kwargs, call_arguments
from point_peft.training.state import adapters_of


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The ways of one data set into one model; None: as the field does it, by the first items of a batch."""

    to_inputs: Callable[[Any], Any] | None = None
    """A batch -> the model's arguments: one, a tuple of positional or a dict of named ones; None: its first item."""
    to_labels: Callable[[Any], Tensor] | None = None
    """A batch -> its labels (b,) or (b, n); None: its second item."""
    to_logits: Callable[[Any], Tensor] | None = None
    """The model's output -> scores; None: itself, or the first item of a tuple."""
    collate: Callable[[Sequence[Any]], Any] | None = None
    """Samples -> a batch; None: one on the other."""

    def inputs(self, batch: Any) -> tuple[Args, Kwargs]:
        """The model's arguments for a batch."""
        if self.to_inputs is not None:
            return call_arguments(self.to_inputs(batch))
        return (_item(batch, 0, "to_inputs"),), {}

    def labels(self, batch: Any) -> Tensor:
        """The labels of a batch, int64."""
        given = _item(batch, 1, "to_labels") if self.to_labels is None else self.to_labels(batch)
        labels = torch.as_tensor(given)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise PointPeftError(f"labels must be integers, not {labels.dtype}: pass to_labels=function of a batch")
        # (b, 1), as some files have them
        return labels.long().squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels.long()

    def classes(self, batch: Any) -> Tensor:
        """The classes (b,) of whole clouds, by which memory banks are balanced; 0 where points have classes."""
        labels = self.labels(batch)
        return labels if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.int64)

    def batch(self, samples: Sequence[Any]) -> Any:
        """One batch of samples."""
        if self.collate is not None:
            return self.collate(samples)
        return collate(samples) if isinstance(samples[0], Sample) else default_collate(list(samples))


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch, of whatever form, on a device."""
    return send_to_device(batch, device)


def labels_of(clouds: Dataset[Any], feed: Feed, index: int) -> Tensor:
    """The labels of one cloud, (1,) or (1, n), as a batch would have them."""
    return feed.labels(feed.batch([clouds[index]]))


def size_of(clouds: Dataset[Any], what: str) -> int:
    """The number of clouds of a data set with a length and places, which a training needs."""
    if isinstance(clouds, DataLoader):
        raise PointPeftError(
            f"{what} is a DataLoader: give its data set; Recipe.batch_size and num_workers say how it is loaded"
        )
    sized: Any = clouds
    try:
        return len(sized)
    except TypeError:
        raise PointPeftError(
            f"{what} is a {type(clouds).__name__} without a length: give a data set with __len__ and __getitem__"
        ) from None


def set_mode(model: nn.Module, training: bool) -> None:
    """Set train or eval mode; of a plain model, what is frozen stays in eval mode, so that no statistics of it move.

    An adapted model sees to that itself.
    """
    model.train(training)
    if training and adapters_of(model) is None:
        hold_frozen(model)


def hold_frozen(module: nn.Module) -> None:
    """Put modules that have parameters, none of which is trained, into eval mode."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        module.eval()
        return
    for child in module.children():
        hold_frozen(child)


def _item(batch: Any, place: int, argument: str) -> Any:
    if isinstance(batch, (tuple, list)) and len(batch) > place:
        return batch[place]
    raise PointPeftError(
        f"a batch is a {type(batch).__name__}, not a tuple (clouds, labels, …): pass {argument}=function of a batch"
    )
