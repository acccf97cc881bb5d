"""One loop of training, as you would write it for any PyTorch model: an adapted model needs nothing of its own.

curve = train(model, data, Recipe(), lr=3e-3)     # what requires a gradient is trained
accuracy(model, data.test)                        # in percent
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from point_peft.quickstart.data import Clouds, Split


@dataclass(frozen=True)
class Recipe:
    """All of a training but the learning rate."""

    epochs: int = 4
    batch_size: int = 16
    weight_decay: float = 0.05
    warm_up: float = 0.1  # share of the steps
    rotation: float = 0.1  # radians about the z axis, either way
    stretch: float = 0.1  # share of each axis, either way


@dataclass
class Curve:
    """The course of one training."""

    losses: list[float] = field(default_factory=list)  # by epoch
    val: list[float] = field(default_factory=list)  # accuracy in percent, by epoch
    seconds: float = 0.0


def augment(points: Tensor, recipe: Recipe) -> Tensor:
    """(b, n, 3) -> (b, n, 3): each cloud turned a little about z and stretched a little along each axis."""
    b = len(points)
    angle = (2 * torch.rand(b) - 1) * recipe.rotation
    turn = torch.eye(3).repeat(b, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 0, 1], turn[:, 1, 0] = angle.sin(), -angle.sin()
    return points @ turn * (1 + (2 * torch.rand(b, 1, 3) - 1) * recipe.stretch)


def batches(split: Split, size: int = 32) -> Iterator[Split]:
    """(points, labels) in order."""
    points, labels = split
    yield from zip(torch.split(points, size), torch.split(labels, size), strict=True)


@torch.inference_mode()
def predict(model: nn.Module, points: Tensor, size: int = 32) -> Tensor:
    """Logits (m, classes) of clouds (m, n, 3)."""
    model.eval()
    return torch.cat([model(part) for part in torch.split(points, size)])


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of a split that is classified correctly, in percent."""
    points, labels = split
    return 100 * float((predict(model, points).argmax(dim=1) == labels).float().mean())


def optimisation(
    params: list[nn.Parameter], recipe: Recipe, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW without decay of biases, norms and gates; a linear warm-up, then a cosine to zero."""
    decay = {"params": [p for p in params if p.ndim > 1], "weight_decay": recipe.weight_decay}
    plain = {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decay, plain], lr=lr)
    warm_up = max(int(recipe.warm_up * steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * np.cos(np.pi * step / steps))
    )
    return optimizer, schedule


def train(model: nn.Module, data: Clouds, recipe: Recipe, lr: float, in_train_mode: nn.Module | None = None) -> Curve:
    """Train the parameters that require gradients, and print a line an epoch.

    `in_train_mode` is the part of the model that is set to train mode; None: all of it. An adapted model keeps the
    normalisation of its frozen backbone still by itself.
    """
    points, labels = data.train
    per_epoch = max(len(labels) // recipe.batch_size, 1)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = optimisation(params, recipe, lr, recipe.epochs * per_epoch)
    curve, start = Curve(), time.perf_counter()
    for epoch in range(1, recipe.epochs + 1):
        model.eval()
        (in_train_mode or model).train()
        losses = []
        order = torch.split(torch.randperm(len(labels)), recipe.batch_size)[:per_epoch]
        # A bar for whoever watches, nothing where stderr is a file.
        for chosen in tqdm(order, desc=f"epoch {epoch}/{recipe.epochs}", unit="batch", leave=False, disable=None):
            logits = model(augment(points[chosen], recipe))
            loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(params, 10.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        curve.losses.append(float(np.mean(losses)))
        curve.val.append(accuracy(model, data.val))
        curve.seconds = time.perf_counter() - start
        print(
            f"  epoch {epoch}/{recipe.epochs}: loss {curve.losses[-1]:.3f}, validation {curve.val[-1]:.1f} %, "
            f"{curve.seconds:.0f} s",
            flush=True,
        )
    return curve
