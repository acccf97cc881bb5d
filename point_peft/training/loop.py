"""The loop: steps, epochs, validation, checkpoints; the same on one process and on several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset

from point_peft.errors import PointPeftError
from point_peft.training.feeding import on_device, set_mode
from point_peft.training.folder import RunFolder
from point_peft.training.global_batch import GlobalBatch
from point_peft.training.inference import Inference
from point_peft.training.objective import monitored
from point_peft.training.plan import STEP, Drawn, Places, Share, epoch_batches, seed_of, shares
from point_peft.training.progress import Progress
from point_peft.training.recipe import Recipe
from point_peft.training.state import (
    Average,
    Position,
    load_optimizer,
    optimizer_state,
    snapshot,
    trained,
    write_values,
)


@dataclass(kw_only=True)
class Loop:
    """One training under way."""

    inference: Inference
    optimizer: AcceleratedOptimizer
    recipe: Recipe
    train: Drawn
    count: int
    """Training clouds."""
    val: Dataset[Any] | None
    folder: RunFolder
    progress: Progress
    place: Position
    average: Average | None

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.inference.model

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator that prepared the model and the optimizer."""
        return self.inference.accelerator

    @property
    def ranks(self) -> int:
        """The number of processes."""
        number: int = self.accelerator.num_processes
        return number

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch."""
        return -(-self.count // self.recipe.batch_size)

    @property
    def steps(self) -> int:
        """Steps in the whole training."""
        return self.per_epoch * self.recipe.epochs

    def run(self) -> None:
        """Go on from the place to the end; the model then has the values of the best epoch on validation."""
        self.progress.start(self.place.step)
        while self.place.step < self.steps and not self.place.stopped:
            self._epoch(self.place.step // self.per_epoch)
        self.progress.close()
        if self.place.best_values:
            write_values(self.model, self.place.best_values)
        elif self.average is not None:
            self.average.settle()

    def _epoch(self, epoch: int) -> None:
        recipe, first = self.recipe, self.place.step % self.per_epoch
        batches = epoch_batches(self.count, recipe.batch_size, recipe.seed, epoch)[first:]
        plan = [shares(batch, recipe.accumulate, self.accelerator.process_index, self.ranks) for batch in batches]
        loaded = self._loaded(epoch, [part for parts in plan for part in parts])
        set_mode(self.model, True)
        for number, parts in enumerate(plan, start=first + 1):
            loss = self._step([(part, next(loaded)) for part in parts])
            self.place.step += 1
            self.place.loss += loss
            clouds = sum(sum(part.sizes) for part in parts)
            self.folder.log(step=self.place.step, loss=loss, lr=self._rate(self.place.step - 1))
            self.accelerator.log({"loss": loss, "lr": self._rate(self.place.step - 1)}, step=self.place.step)
            self.progress.step(loss, clouds)
            if self.place.step % recipe.checkpoint_steps == 0 and number < self.per_epoch:
                self.checkpoint()
        self._end_epoch(epoch + 1)

    def _loaded(self, epoch: int, parts: Sequence[Share]) -> Iterator[Any]:
        loader = DataLoader(
            self.train,
            batch_sampler=Places(epoch, parts),
            collate_fn=self.inference.feed.batch,
            num_workers=self.recipe.num_workers,
        )
        return iter(loader)

    def _rate(self, step: int) -> float:
        return self.recipe.lr * self.recipe.learning_rate(step, self.steps)

    def _step(self, parts: Sequence[tuple[Share, Any]]) -> float:
        """One step of the optimizer on this process's parts of a batch; the loss is that of the whole batch."""
        set_seed(seed_of(self.recipe.seed, STEP, self.place.step))
        fed = [(share, on_device(batch, self.accelerator.device)) for share, batch in parts]
        labels = [self.inference.feed.labels(batch) for _, batch in fed]
        weight = self.inference.summed(torch.stack([self.inference.loss.weight_of(own) for own in labels]).sum()).clamp(
            min=1e-12
        )
        clouds = sum(sum(share.sizes) for share, _ in fed)
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for number, ((share, batch), own) in enumerate(zip(fed, labels, strict=True), start=1):
            with ExitStack() as stack:
                if number < len(fed):
                    stack.enter_context(self.accelerator.no_sync(self.inference.wrapped))
                if self.ranks > 1:
                    stack.enter_context(GlobalBatch(share.sizes, self.accelerator.process_index))
                mean, auxiliary = self.inference.losses(batch, own, weight, len(share.clouds) / clouds)
                total += mean.detach() + auxiliary.detach()
                # Gradients are averaged over processes, and these losses are parts of a sum.
                self.accelerator.backward(self.ranks * (mean + auxiliary))
        loss = float(self.inference.summed(total))
        if not math.isfinite(loss):
            raise PointPeftError(
                f"the loss of step {self.place.step + 1} is {loss}: take a lower lr, clip gradients, or look for "
                "clouds with extreme coordinates"
            )
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(list(trained(self.model).values()), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self.recipe.learning_rate(self.place.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.step()
        return loss

    def _end_epoch(self, number: int) -> None:
        mean, self.place.loss = self.place.loss / self.per_epoch, 0.0
        val: dict[str, float] = {}
        if self.val is not None:
            with nullcontext() if self.average is None else self.average.in_place():
                val, _ = self.inference.measure(self.val)
                if self.recipe.keep == "best":
                    self._keep_best(number, val[monitored(self.recipe.task == "segmentation")], val["loss"])
        self.folder.log(step=self.place.step, epoch=number, train_loss=mean, **{f"val_{k}": v for k, v in val.items()})
        self.accelerator.log({"train_loss": mean, **{f"val_{k}": v for k, v in val.items()}}, step=self.place.step)
        self.progress.epoch(number, mean, val)
        self.checkpoint()

    def _keep_best(self, number: int, value: float, loss: float) -> None:
        place = self.place
        if place.best is None or (value, -loss) > (place.best, -place.best_loss):
            place.best, place.best_loss, place.best_epoch, place.worse = value, loss, number, 0
            place.best_values = snapshot(self.model)
        else:
            place.worse += 1
            place.stopped = self.recipe.patience is not None and place.worse >= self.recipe.patience

    def checkpoint(self) -> None:
        """Write the state, once, on the first process."""
        state = snapshot(self.model)
        optimizer = optimizer_state(self.optimizer)
        average = None if self.average is None else self.average.state()
        scaler = self.accelerator.scaler
        if self.accelerator.is_main_process:
            self.folder.checkpoint(
                self.place,
                {
                    "values": state,
                    "optimizer": optimizer,
                    "average": average,
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
            )

    def resume(self, place: Position, parts: dict[str, Any]) -> None:
        """Take the place and the state of a checkpoint; the model has its values already."""
        self.place = place
        self.progress.say(f"resumed after step {place.step} of {self.steps}")
        load_optimizer(self.optimizer, parts["optimizer"])
        if self.average is not None:
            self.average.load(parts["average"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(parts["scaler"])
