"""One run: an entry on the clouds of a task with one seed, and what came of it as JSON."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks.accuracy.entries import PROBE, Entry
from benchmarks.accuracy.frozen import converged_probe, features_of, retrieval
from benchmarks.accuracy.measuring import classifier_of, inference_of, measured
from benchmarks.accuracy.protocol import Protocol, heads_of
from benchmarks.accuracy.sets import Parts
from benchmarks.accuracy.stem import Store
from benchmarks.memory import cost_of
from point_peft import initialise
from point_peft.data.augmenting import augment
from point_peft.data.cloud import CloudBatch, Sample
from point_peft.data.cloud_set import CloudSet
from point_peft.errors import PointPeftError
from point_peft.training import Recipe, fit
from point_peft.training.feeding import set_mode
from point_peft.training.report import load_values
from point_peft.training.state import trained


@dataclass(frozen=True)
class Views(Dataset[Sample]):
    """Training clouds: while the model trains, one of a few augmented versions after the other, else as they are."""

    clouds: CloudSet
    model: nn.Module
    augmentations: Sequence[str]
    views: int
    seed: int
    asked: dict[int, int] = field(default_factory=dict)
    """How often the model trained on each of the clouds."""

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> Sample:
        if not self.model.training:
            return self.clouds[index]
        count = self.asked[index] = self.asked.get(index, -1) + 1
        rng = np.random.default_rng((self.seed, index, count % self.views))
        return augment(self.clouds[index], self.augmentations, rng, self.clouds.preparation.normals)


def batches_of(model: nn.Module, clouds: CloudSet, size: int) -> Iterator[CloudBatch]:
    """The clouds in batches, as a model takes them."""
    feed = inference_of(model, len(clouds.classes)).feed
    for begin in range(0, len(clouds), size):
        yield feed.batch([clouds[place] for place in range(begin, min(begin + size, len(clouds)))])


def cost(model: nn.Module, train: CloudSet, recipe: Recipe) -> dict[str, float]:
    """The memory of a first step, and this process's time for an epoch, by the median of a few steps, as JSON.

    It leaves the model spoilt.
    """
    inference = inference_of(model, len(train.classes))
    batch = inference.feed.batch([train[place] for place in range(min(recipe.batch_size, len(train)))])
    labels = inference.feed.labels(batch)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=recipe.lr)
    set_mode(model, True)

    def step() -> None:
        mean, auxiliary = inference.losses(batch, labels, inference.loss.weight_of(labels), 1.0)
        optimizer.zero_grad()
        (mean + auxiliary).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    peak, seconds = cost_of(step)
    return {"peak_bytes_of_a_step": peak, "seconds_an_epoch": seconds * len(train) / len(labels)}


def run_trained(
    entry: Entry,
    parts: Parts,
    protocol: Protocol,
    recipe: Recipe,
    folder: Path,
    stem: Store,
    *,
    test: bool,
    timed: bool,
    keep: bool,
) -> dict[str, Any]:
    """Train an entry in a folder, which is left with the trained values if they are to be kept.

    Without `test` the test clouds are not touched; `timed` says that its cost is measured, after everything else.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    classes = parts.train.classes
    plain = protocol.plain(len(classes), recipe.seed)
    head = sum(p.numel() for path in heads_of(plain) for p in plain.get_submodule(path).parameters())
    model = protocol.model(entry, len(classes), recipe.seed).eval()
    if entry.eva:
        initialise(model, batches_of(model, parts.train, recipe.batch_size), "eva", to_inputs=attrgetter("points"))
    train = Views(parts.train, model, recipe.augment, protocol.views, recipe.seed)
    val = parts.val.subset(range(min(protocol.curve_clouds, len(parts.val)))) if len(parts.val) else None
    start = time.process_time()
    with stem.serving(model):
        done = fit(model, train, val, replace(recipe, augment=()), out=folder, classes=classes)
    trainable = sum(p.numel() for p in trained(model).values())
    found: dict[str, Any] = {
        "trainable": trainable,
        "trainable_without_head": trainable - head,
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": time.process_time() - start,
        "train_loss": [round(line["train_loss"], 4) for line in done.history],
    }
    if val is not None:
        found["val"] = [round(line["val_accuracy"], 3) for line in done.history]
        with stem.serving(model):
            figures, _ = inference_of(model, len(classes)).measure(parts.val)
        found |= {"validated": figures["accuracy"], "validated_loss": figures["loss"]}
    if test:
        classify = classifier_of(model, len(classes))
        with stem.serving(model):
            found.update(measured(classify, parts.test, protocol.corrupted_clouds))
    if timed:
        found.update(cost(model, parts.train, recipe))  # the stem runs again, for it is part of it
    for file in folder.iterdir():
        if file.suffix == ".png":
            file.unlink()
    if not keep:
        shutil.rmtree(folder)
    return found


def run_frozen(entry: Entry, model: nn.Module, parts: Parts, corrupted: int, stem: Store) -> dict[str, Any]:
    """Classify by the features that the head of a model reads; the head itself is not used."""
    with stem.serving(model):
        return _run_frozen(entry, model, parts, corrupted)


def _run_frozen(entry: Entry, model: nn.Module, parts: Parts, corrupted: int) -> dict[str, Any]:
    start, classes = time.process_time(), len(parts.train.classes)
    head = head_of(model)
    if entry.method == PROBE:
        classify, chosen = converged_probe(model, head, parts.train, parts.val, classes)
        width = features_of(model, head, parts.train.subset([0]))[0].shape[1]
        own = {"trainable": classes * (width + 1), "chosen": chosen}
    else:
        classify, own = retrieval(model, head, parts.train, classes), {"trainable": 0}
    own |= {"trainable_without_head": 0, "seconds": time.process_time() - start}
    return {**own, **measured(classify, parts.test, corrupted)}


def run_transfer(
    entry: Entry, parts: Parts, protocol: Protocol, seed: int, source: Path, classes: int, stem: Store
) -> dict[str, Any]:
    """A converged probe on the features of a model that was trained on another task, whose values lie in `source`.

    `classes` is the number of that task's classes. An entry that trains nothing gives the features as they were.
    """
    model = protocol.model(entry, classes, seed)
    if entry.trains:
        load_values(model, source)
    return run_frozen(Entry(PROBE, PROBE), model, parts, 0, stem)


def head_of(model: nn.Module) -> str:
    """The path of the one head of a plain or an adapted model."""
    own: Any = model
    base = own.base_model if "base_model" in dict(model.named_children()) else model
    heads = heads_of(base)
    if len(heads) != 1:
        raise PointPeftError(f"a {type(base).__name__} has {len(heads)} heads that are known; features need one")
    return heads[0] if base is model else f"base_model.{heads[0]}"
