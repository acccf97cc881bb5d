"""A finished run, opened again: its model, how its data are prepared, and what it can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from point_peft.data.cloud import Sample, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.corrupting import corrupt
from point_peft.data.options import DataOptions
from point_peft.errors import PointPeftError, quoted
from point_peft.schema import from_json
from point_peft.training.feeding import Feed
from point_peft.training.folder import RECIPE_FILE, read_record
from point_peft.training.inference import Inference
from point_peft.training.models import ModelSpec, adapted, backbone_for_task, to_inputs_of
from point_peft.training.objective import Loss
from point_peft.training.plan import seed_of
from point_peft.training.predicting import Predictor
from point_peft.training.recipe import Recipe
from point_peft.training.report import load_values
from point_peft.training.tasks import FewShot, listed, read_data


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run that was trained by the command line, with its model."""

    folder: Path
    record: dict[str, Any]
    recipe: Recipe
    options: DataOptions
    classes: tuple[str, ...]
    categories: tuple[str, ...]
    model: nn.Module
    inference: Inference

    @property
    def predictor(self) -> Predictor:
        """The model on single files."""
        codes = self.record["data"]["codes"]
        return Predictor(inference=self.inference, classes=self.classes, options=self.options, codes=codes)


def open_run(folder: Path) -> OpenedRun:
    """The finished run of a folder, with its model rebuilt; raises `PointPeftError` for what is none."""
    record = read_record(folder)
    if not record["finished"]:
        raise PointPeftError(f"the run {quoted(str(folder))} is not finished: go on with train --resume")
    if "model" not in record:
        raise PointPeftError(
            f"the run {quoted(str(folder))} was made by fit() on a model that only its script can make"
        )
    recipe = Recipe.from_yaml(folder / RECIPE_FILE)
    classes, categories = tuple(record["classes"]), tuple(record["data"]["categories"])
    spec = ModelSpec.from_json(record["model"])
    accelerator = Accelerator(cpu=None)
    model = adapted(backbone_for_task(spec, recipe.task, classes, categories, recipe.seed), spec)
    load_values(model, folder)
    model.to(accelerator.device).eval()
    inference = Inference(
        model=model,
        wrapped=model,
        accelerator=accelerator,
        feed=Feed(to_inputs=to_inputs_of(model, len(categories))),
        loss=Loss(classes=len(classes)),
        batch_size=recipe.batch_size,
        segmentation=recipe.task == "segmentation",
    )
    return OpenedRun(
        folder=folder,
        record=record,
        recipe=recipe,
        options=from_json(record["data"]["options"], DataOptions),
        classes=classes,
        categories=categories,
        model=model,
        inference=inference,
    )


@dataclass(frozen=True)
class Corrupted(Dataset[Sample]):
    """Clouds of a set, each corrupted in one way of one severity, the same way each time."""

    clouds: CloudSet
    kind: str
    severity: int

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> Sample:
        sample = self.clouds[index]
        rng = np.random.default_rng(seed_of(self.severity, index, *self.kind.encode()))
        points, labels = corrupt(
            sample.points, sample.label, self.kind, self.severity, rng, self.clouds.preparation.normals
        )
        assert labels is not None
        return Sample(points, labels, sample.category)


def with_classes_of(run: OpenedRun, clouds: CloudSet) -> CloudSet:
    """The clouds with the run's numbers of classes, which must have the names of theirs.

    Data that lack a class, such as a folder of test clouds, number the others in another way.
    """
    unknown = [name for name in clouds.classes if name not in run.classes]
    if unknown:
        raise PointPeftError(
            f"the class {quoted(unknown[0])} of these data is none of the run's: {', '.join(run.classes)}"
        )
    if clouds.classes == run.classes:
        return clouds
    if clouds.task == "segmentation":
        raise PointPeftError("points of these data have other classes than those of the run: state classes")
    number_of = {number: run.classes.index(name) for number, name in enumerate(clouds.classes)}
    entries = tuple(
        entry if entry.label is None else replace(entry, label=number_of[entry.label]) for entry in clouds.entries
    )
    return replace(clouds, entries=entries, classes=run.classes, _kept={})


def clouds_of(
    run: OpenedRun, paths: Sequence[Path] = (), split: Split | Literal["all"] = "test", skip_bad: bool = False
) -> CloudSet:
    """The clouds of a split of these data, or of the run's if there are none, with the run's numbers of classes.

    Raises `PointPeftError` where none are of that split.
    """
    data = run.record["data"]
    given = [*paths] or [Path(path) for path in data["paths"]]
    # Where all clouds are asked for, there need not be enough of them for splits.
    chosen = replace(run.options, val_share=0.0, test_share=0.0) if split == "all" and paths else run.options
    clouds = read_data(given, chosen, skip_bad or (data["skip_bad"] and not paths))
    if not paths and data["few_shot"] is not None:
        clouds = from_json(data["few_shot"], FewShot).drawn(clouds)
    return of_split(with_classes_of(run, clouds), given, split)


def of_split(clouds: CloudSet, paths: Sequence[Path], split: Split | Literal["all"]) -> CloudSet:
    """The clouds of one split, or all; raises `PointPeftError` where there are none."""
    part = clouds if split == "all" else clouds.part(split)
    if not len(part):
        there = sorted({entry.split for entry in clouds.entries if entry.split is not None})
        raise PointPeftError(
            f"{listed(paths)}: no clouds are of the split {split!r}; there are {', '.join([*there, 'all'])}"
        )
    return part
