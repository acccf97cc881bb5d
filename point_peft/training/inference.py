"""A model over a data set: scores, confusions, figures; on one process or on several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from point_peft.training.feeding import Feed, on_device, set_mode
from point_peft.training.objective import Loss, confusion, figures, flat_scores
from point_peft.training.plan import in_order, shares
from point_peft.training.state import adapters_of


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A model and how clouds get through it."""

    model: nn.Module
    wrapped: nn.Module
    """The model as accelerate prepared it, or itself."""
    accelerator: Accelerator
    feed: Feed
    loss: Loss
    batch_size: int
    segmentation: bool

    def losses(self, batch: Any, labels: Tensor, weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The terms of a part of a batch, in training: of the loss, divided by `weight`, and of what methods add to it.

        The latter is a mean over clouds, of which this part has the `share` of the whole batch.
        """
        args, kwargs = self.feed.inputs(batch)
        scores = flat_scores(self.wrapped(*args, **kwargs), labels, self.loss.classes, self.feed.to_logits)
        mean = self.loss.total(scores, labels.reshape(-1)) / weight.float()
        held = adapters_of(self.model)
        return mean, torch.zeros_like(mean) if held is None else held.auxiliary_loss() * share

    def measure(self, clouds: Dataset[Any]) -> tuple[dict[str, float], Tensor]:
        """The figures of a data set, over all processes, and its confusions (classes, classes)."""
        sized: Any = clouds
        counts = torch.zeros(self.loss.classes, self.loss.classes, dtype=torch.int64)
        loss = torch.zeros(2, dtype=torch.float64)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        for batch in in_order(len(sized), self.batch_size):
            own = shares(batch, 1, rank, ranks)[0].clouds
            # All processes go forward equally often, as sharded models must; one without a cloud repeats the first.
            for labels, scores in self.predicted(clouds, [own or batch[:1]]):
                if own:
                    counts += confusion(scores, labels.reshape(-1))
                    total, weight = self.loss.total(scores, labels.reshape(-1)), self.loss.weight_of(labels)
                    loss += torch.stack([total.double(), weight]).cpu()
        both = self.summed(torch.cat([counts.reshape(-1).double(), loss])).cpu()
        counts, loss = both[:-2].long().reshape_as(counts), both[-2:]
        return {"loss": float(loss[0] / loss[1]), **figures(counts, self.segmentation)}, counts

    @torch.no_grad()
    def predicted(
        self, clouds: Dataset[Any] | Sequence[Any], batches: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of these batches of clouds the labels (b,) or (b, n) and the scores (m, classes) float32."""
        set_mode(self.model, False)
        for places in batches:
            batch = on_device(self.feed.batch([clouds[place] for place in places]), self.accelerator.device)
            labels = self.feed.labels(batch)
            args, kwargs = self.feed.inputs(batch)
            with self.accelerator.autocast():
                output = self.wrapped(*args, **kwargs)
            yield labels, flat_scores(output, labels, self.loss.classes, self.feed.to_logits).float()

    def summed(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        total: Tensor = self.accelerator.reduce(value.to(self.accelerator.device), "sum")
        return total
