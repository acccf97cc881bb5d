"""A task on the page: an adapter, what it answers with, and how it takes clouds; from a folder or from the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from point_peft.adapter_set import AdapterSet
from point_peft.backbones import default_backbone
from point_peft.data.cloud import Sample
from point_peft.data.options import DataOptions
from point_peft.demo.nearest import BankClouds, bank_in_forward, read_bank_clouds
from point_peft.errors import AdapterFileError
from point_peft.hub.pulling import Place, folder_of, is_repo_id
from point_peft.model import PointPeftModel
from point_peft.training.contenders import ACTIVE, is_run
from point_peft.training.feeding import Feed, on_device
from point_peft.training.inference import Inference
from point_peft.training.models import to_inputs_of
from point_peft.training.objective import Loss, scores_of
from point_peft.training.opening import OpenedRun, open_run
from point_peft.training.predicting import Predictor
from point_peft.training.recipe import Recipe
from point_peft.training.state import adapters_of

ASSUMED = "Its files do not say how clouds are prepared: here centred, in the unit sphere, 1024 points."


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedTask:
    """One task, ready to answer."""

    name: str
    adapter: str | None
    """The name in the model; None: the model was trained itself and has no adapter."""
    predictor: Predictor
    clouds: BankClouds | None = None
    """The training clouds of its bank."""
    said: str = ""
    """A sentence on it: its accuracy on test clouds, or a choice that its files leave open."""

    @property
    def model(self) -> nn.Module:
        """The backbone with all of its adapters."""
        return self.predictor.inference.model

    @property
    def held(self) -> AdapterSet | None:
        """The adapters of the model."""
        return adapters_of(self.model)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes."""
        return self.predictor.classes

    @property
    def segmentation(self) -> bool:
        """True if it gives each point a class, and not the whole cloud."""
        return self.predictor.inference.segmentation

    @property
    def has_bank(self) -> bool:
        """True if it looks training clouds up."""
        held, adapter = self.held, self.adapter
        return held is not None and adapter is not None and bank_in_forward(held, adapter) is not None


def open_task(source: str, name: str, others: Sequence[LoadedTask]) -> LoadedTask:
    """The task of a run's folder, an adapter's, or a repository of the Hub; on the backbone of another if it fits.

    Raises `PointPeftError` for what cannot be read, or fits neither of their backbones nor the package's.
    """
    is_repository = is_repo_id(source) and not Path(source).exists()
    folder = folder_of(source, Place()) if is_repository else Path(source).expanduser()
    task = _of_run(folder, name, others) if is_run(folder) else _of_adapter(folder, name, others)
    return replace(task, clouds=read_bank_clouds(folder)) if task.has_bank else task


def _of_run(folder: Path, name: str, others: Sequence[LoadedTask]) -> LoadedTask:
    run = open_run(folder)
    if adapters_of(run.model) is None:
        return LoadedTask(name=name, adapter=None, predictor=run.predictor, said=_accuracy(run))
    beside = _taken_by(others, folder, name)
    if beside is None:
        return LoadedTask(name=name, adapter=ACTIVE, predictor=run.predictor, said=_accuracy(run))
    inference = replace(run.inference, model=beside.model, wrapped=beside.model)
    predictor = replace(run.predictor, inference=inference)
    return LoadedTask(name=name, adapter=name, predictor=predictor, said=_accuracy(run))


def _accuracy(run: OpenedRun) -> str:
    """The run's accuracy on test clouds, or if there were none on those of the validation; "" where neither was."""
    results = run.record["results"]
    for split, name in (("test", "test"), ("val", "validation")):
        if split in results:
            what = "points" if run.inference.segmentation else "clouds"
            return f"Right for {results[split]['accuracy']:.1f} % of its {name} {what}."
    return ""


def _of_adapter(folder: Path, name: str, others: Sequence[LoadedTask]) -> LoadedTask:
    """The task of an adapter's files alone, whose classes have no names."""
    beside = _taken_by(others, folder, name)
    accelerator = Accelerator(cpu=None)
    if beside is None:
        model: nn.Module = PointPeftModel.from_pretrained(default_backbone(cls_dim=2), folder, name)
        model.to(accelerator.device).eval()
        feed = Feed(to_inputs=to_inputs_of(model, 1))
    else:
        model, feed = beside.model, beside.predictor.inference.feed
    held = adapters_of(model)
    assert held is not None
    scores = _tried(held, name, feed, accelerator.device)
    classes = tuple(f"class {number}" for number in range(scores.shape[-1]))
    inference = Inference(
        model=model,
        wrapped=model,
        accelerator=accelerator,
        feed=feed,
        loss=Loss(classes=len(classes)),
        batch_size=Recipe().batch_size,
        segmentation=scores.ndim == 3,
    )
    predictor = Predictor(inference=inference, classes=classes, options=DataOptions(), codes={})
    return LoadedTask(name=name, adapter=name, predictor=predictor, said=ASSUMED)


def _tried(held: AdapterSet, name: str, feed: Feed, device: torch.device) -> Tensor:
    """The scores that an adapter gives for some cloud, which tell how many classes it has, and of what."""
    points = torch.linspace(-1, 1, 3 * 512).reshape(512, 3)
    batch = on_device(feed.batch([Sample(points, torch.tensor(0), torch.tensor(0))]), device)
    args, kwargs = feed.inputs(batch)
    with torch.no_grad(), held.use_adapter(name):
        return scores_of(held(*args, **kwargs), None)


def _taken_by(others: Sequence[LoadedTask], folder: Path, name: str) -> LoadedTask | None:
    """The first of these tasks whose model takes the adapter of a folder; None where their backbones are others."""
    for other in others:
        if other.held is None or name in other.held.adapters:
            continue
        try:
            other.held.load_adapter(folder, name)
        except AdapterFileError:
            continue
        return other
    return None


def unused_name(wanted: str, taken: Sequence[str]) -> str:
    """A name for a task that an adapter may bear and that none of these has."""
    name = re.sub(r"[^A-Za-z0-9_\-]+", "_", wanted).strip("_-")[:80] or "adapter"
    numbers = [name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))]
    return next(number for number in numbers if number not in (ACTIVE, *taken))
