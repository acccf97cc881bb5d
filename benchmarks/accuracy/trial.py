"""One run: an entry on the clouds of a task with one seed, and what came of it as JSON."""

from __future__ import annotations

import resource
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.accuracy.entries import PROBE, Entry
from benchmarks.accuracy.frozen import converged_probe, features_of, retrieval
from benchmarks.accuracy.measuring import answers, classifier_of, measured
from benchmarks.accuracy.protocol import Protocol, heads_of
from benchmarks.accuracy.sets import Parts
from point_peft.data.cloud import Sample
from point_peft.data.cloud_set import CloudSet
from point_peft.errors import PointPeftError
from point_peft.training import Recipe, fit
from point_peft.training.report import load_values
from point_peft.training.state import snapshot, trained, write_values


@dataclass
class Watch:
    """What the data sets of a training see of it: the time of each epoch, and the values after the last one."""

    model: nn.Module
    epochs: int
    seconds: list[float] = field(default_factory=list)
    """Of this process, for the steps of each epoch."""
    last: dict[str, Tensor] | None = None
    _begin: float | None = None

    def training(self) -> None:
        """A training cloud is asked for."""
        if self._begin is None:
            self._begin = time.process_time()

    def validating(self) -> None:
        """A validation cloud is asked for: an epoch is at its end, if one began."""
        if self._begin is not None:
            self.seconds.append(time.process_time() - self._begin)
            self._begin = None
            # The labels are counted once before the first epoch.
            if len(self.seconds) == self.epochs + 1:
                self.last = snapshot(self.model)

    def epoch(self) -> float | None:
        """Seconds that the steps of an epoch take, by the median; the first epoch has other things to do."""
        own = sorted(self.seconds[2:] or self.seconds[1:])
        return own[len(own) // 2] if own else None


@dataclass(frozen=True)
class Watched(Dataset[Sample]):
    """Clouds that tell a watch when one of them is asked for."""

    clouds: CloudSet
    watch: Watch
    training: bool

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> Sample:
        self.watch.training() if self.training else self.watch.validating()
        return self.clouds[index]


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_trained(
    entry: Entry, parts: Parts, protocol: Protocol, recipe: Recipe, folder: Path, *, test: bool, keep: bool
) -> dict[str, Any]:
    """Train an entry in a folder, which is left with the trained values if they are to be kept.

    Without `test` the test clouds are not touched.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    classes = parts.train.classes
    plain = protocol.plain(len(classes), recipe.seed)
    head = sum(p.numel() for path in heads_of(plain) for p in plain.get_submodule(path).parameters())
    model = protocol.model(entry, len(classes), recipe.seed)
    before, watch = peak_bytes(), Watch(model, recipe.epochs)
    val = Watched(parts.val, watch, False) if len(parts.val) else None
    start = time.process_time()
    done = fit(model, Watched(parts.train, watch, True), val, recipe, out=folder, classes=classes)
    trainable = sum(p.numel() for p in trained(model).values())
    found: dict[str, Any] = {
        "trainable": trainable,
        "trainable_without_head": trainable - head,
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": time.process_time() - start,
        "seconds_an_epoch": watch.epoch(),
        "peak_bytes": peak_bytes(),
        "peak_bytes_of_training": peak_bytes() - before,
        "best_epoch": done.best_epoch,
        "train_loss": [round(line["train_loss"], 4) for line in done.history],
    }
    if val is not None:
        found["val"] = [round(line["val_accuracy"], 3) for line in done.history]
        found["val_loss"] = [round(line["val_loss"], 4) for line in done.history]
    if test:
        classify = classifier_of(model, len(classes))
        found.update(measured(classify, parts.test, protocol.corrupted_clouds))
        found["last_accuracy"] = found["accuracy"]
        if watch.last is not None and done.best_epoch < recipe.epochs:
            write_values(model, watch.last)
            found["last_accuracy"] = answers(classify, parts.test).accuracy
    for file in folder.iterdir():
        if file.suffix == ".png":
            file.unlink()
    if not keep:
        shutil.rmtree(folder)
    return found


def run_frozen(entry: Entry, model: nn.Module, parts: Parts, corrupted: int) -> dict[str, Any]:
    """Classify by the features that the head of a model reads; the head itself is not used."""
    start, classes = time.process_time(), len(parts.train.classes)
    head = head_of(model)
    if entry.method == PROBE:
        classify, chosen = converged_probe(model, head, parts.train, parts.val, classes)
        width = features_of(model, head, parts.train.subset([0]))[0].shape[1]
        own = {"trainable": classes * (width + 1), "chosen": chosen}
    else:
        classify, own = retrieval(model, head, parts.train, classes), {"trainable": 0}
    own |= {"trainable_without_head": 0, "seconds": time.process_time() - start, "peak_bytes": peak_bytes()}
    return {**own, **measured(classify, parts.test, corrupted)}


def run_transfer(
    entry: Entry, parts: Parts, protocol: Protocol, seed: int, source: Path, classes: int
) -> dict[str, Any]:
    """A converged probe on the features of a model that was trained on another task, whose values lie in `source`.

    `classes` is the number of that task's classes. An entry that trains nothing gives the features as they were.
    """
    model = protocol.model(entry, classes, seed)
    if entry.trains:
        load_values(model, source)
    return run_frozen(Entry(PROBE, PROBE), model, parts, 0)


def head_of(model: nn.Module) -> str:
    """The path of the one head of a plain or an adapted model."""
    own: Any = model
    base = own.base_model if "base_model" in dict(model.named_children()) else model
    heads = heads_of(base)
    if len(heads) != 1:
        raise PointPeftError(f"a {type(base).__name__} has {len(heads)} heads that are known; features need one")
    return heads[0] if base is model else f"base_model.{heads[0]}"
