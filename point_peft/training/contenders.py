"""Runs and adapters as two contenders on the same clouds: in one model wherever they have one backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from point_peft.data.cloud import Split, Task
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.errors import AdapterFileError, PointPeftError, quoted
from point_peft.files.format import CONFIG_FILE, RUN_FILE
from point_peft.model import PointPeftModel
from point_peft.training.comparing import Contender
from point_peft.training.feeding import Feed
from point_peft.training.models import ModelSpec, backbone_for_task, to_inputs_of
from point_peft.training.opening import OpenedRun, clouds_of, of_split, open_run
from point_peft.training.recipe import Recipe
from point_peft.training.state import adapters_of
from point_peft.training.tasks import listed, read_data

ACTIVE = "default"
"""The name of a run's adapter in its model."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """The clouds that are asked for, and the backbone of adapters that no run stands beside."""

    paths: Sequence[Path]
    """Empty: those of the run."""
    split: Split | Literal["all"]
    skip_bad: bool
    backbone: ModelSpec | None = None
    """Given: both are adapters of it, whatever else their folders hold."""
    options: DataOptions | None = None
    """The ways in which clouds are opened and prepared, where no run says it."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two contenders, ready to be compared."""

    first: Contender
    second: Contender
    clouds: CloudSet
    """With the classes of the first, prepared as for the first."""
    task: Task
    batch_size: int
    data: str
    """A name for the clouds."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Everything that an adapter's files leave open: the backbone, and the classes of its head."""

    spec: ModelSpec
    task: Task
    classes: tuple[str, ...]
    categories: tuple[str, ...]
    seed: int

    def adapted(self, folder: Path) -> PointPeftModel:
        """The backbone anew, with the adapter of a folder."""
        spec = replace(self.spec, methods=self.spec.methods or ({},))  # an adapter needs weights
        base = backbone_for_task(spec, self.task, self.classes, self.categories, self.seed)
        model = PointPeftModel.from_pretrained(base, folder, ACTIVE)
        return model.to(Accelerator(cpu=None).device)


def is_run(folder: Path) -> bool:
    """Tell whether a folder is that of a run."""
    return (folder / RUN_FILE).is_file()


def open_pair(a: Path, b: Path, question: Question) -> Pair:
    """The contenders of two folders; raises `PointPeftError` where they do not answer the same question."""
    runs = [open_run(folder) if question.backbone is None and is_run(folder) else None for folder in (a, b)]
    for name, folder, opened in zip("AB", (a, b), runs, strict=True):
        if opened is None and not (folder / CONFIG_FILE).is_file():
            what = "trained the model itself" if is_run(folder) else "is no run"
            raise PointPeftError(
                f"{name}, {quoted(str(folder))}, {what} and holds no adapter: there is no {CONFIG_FILE}"
            )
    first, second = runs
    if first is not None and second is not None:
        return _of_runs(first, second, question)
    run = first or second
    if run is not None:
        return _beside_run(run, a, b, question)
    if question.backbone is None or not question.paths:
        raise PointPeftError(
            f"neither {quoted(str(a))} nor {quoted(str(b))} is a run, which would know its backbone and its clouds: "
            "say --backbone and --data"
        )
    options = question.options or DataOptions()
    everything = question.split == "all"
    chosen = replace(options, val_share=0.0, test_share=0.0) if everything else options
    found = read_data(question.paths, chosen, question.skip_bad)
    clouds = of_split(found, question.paths, question.split)
    if not clouds.classes:
        raise PointPeftError(f"{listed(question.paths)}: without a label the number of classes is not known")
    ground = Ground(
        spec=question.backbone,
        task=clouds.task,
        classes=clouds.classes,
        categories=clouds.categories,
        seed=Recipe().seed,
    )
    model = ground.adapted(a)
    model.load_adapter(b, "B")
    return _pair([(model, ACTIVE), (model, "B")], clouds, ground, Recipe().batch_size, listed(question.paths))


def _beside_run(run: OpenedRun, a: Path, b: Path, question: Question) -> Pair:
    """A run, and an adapter of its backbone and its classes."""
    ground, clouds = _ground(run), _clouds(run, question)
    held, alone = adapters_of(run.model), b if run.folder == a else a
    if held is None:
        other: tuple[nn.Module, str | None] = (ground.adapted(alone), ACTIVE)
    else:
        held.load_adapter(alone, "other")
        other = (run.model, "other")
    own = (run.model, None if held is None else ACTIVE)
    both = [own, other] if run.folder == a else [other, own]
    return _pair(both, clouds, ground, run.recipe.batch_size, _data(run, question))


def _of_runs(first: OpenedRun, second: OpenedRun, question: Question) -> Pair:
    if first.recipe.task != second.recipe.task:
        raise PointPeftError(
            f"A is a {first.recipe.task} and B a {second.recipe.task}: what answers for clouds and what answers for "
            "points cannot agree"
        )
    _check_classes(first.classes, second.classes)
    if first.categories != second.categories:
        raise PointPeftError(
            f"A knows parts of {', '.join(first.categories)} and B of {', '.join(second.categories)}: compare runs on "
            "the same kinds of objects"
        )
    clouds = _clouds(first, question)
    own, others = first.options.preparation, second.options.preparation
    if own != others and clouds.task == "segmentation":
        raise PointPeftError(
            "A and B prepare clouds in different ways, and so they answer for different points: compare runs with the "
            "same preparation"
        )
    ground, alike = _ground(first), own == others and first.classes == second.classes
    batch_size, data = first.recipe.batch_size, _data(first, question)
    if alike and _takes(first, second):
        return _pair([(first.model, ACTIVE), (first.model, "B")], clouds, ground, batch_size, data)
    pair = _pair(
        [(run.model, None if adapters_of(run.model) is None else ACTIVE) for run in (first, second)],
        clouds,
        ground,
        batch_size,
        data,
    )
    order = torch.tensor([second.classes.index(name) for name in first.classes])
    prepared = clouds if own == others else clouds.prepared(others)
    return replace(pair, second=replace(pair.second, clouds=prepared, order=order))


def _takes(first: OpenedRun, second: OpenedRun) -> bool:
    """Load the adapter of the second run into the model of the first; tell if it could be done.

    It cannot where one has none, or where the frozen backbone is another, even if it has the same name.
    """
    held, other = adapters_of(first.model), adapters_of(second.model)
    if held is None or other is None or not (second.folder / CONFIG_FILE).is_file():
        return False
    try:
        held.load_adapter(second.folder, "B")
    except AdapterFileError:
        return False
    return True


def _check_classes(ours: Sequence[str], theirs: Sequence[str]) -> None:
    only = [[name for name in one if name not in other] for one, other in ((ours, theirs), (theirs, ours))]
    if any(only):
        said = [f"only {who} knows {', '.join(names)}" for who, names in zip("AB", only, strict=True) if names]
        raise PointPeftError(f"A and B answer with different classes: {'; '.join(said)}")


def _ground(run: OpenedRun) -> Ground:
    return Ground(
        spec=ModelSpec.from_json(run.record["model"]),
        task=run.recipe.task,
        classes=run.classes,
        categories=run.categories,
        seed=run.recipe.seed,
    )


def _clouds(run: OpenedRun, question: Question) -> CloudSet:
    """The clouds of a question, opened as those of the run; without labels they are of the run's task all the same."""
    options = replace(run.options, task=run.recipe.task) if question.paths else run.options
    return clouds_of(replace(run, options=options), question.paths, question.split, question.skip_bad)


def _data(run: OpenedRun, question: Question) -> str:
    return listed(question.paths) if question.paths else str(run.record["name"])


def _pair(
    both: Sequence[tuple[nn.Module, str | None]], clouds: CloudSet, ground: Ground, batch_size: int, data: str
) -> Pair:
    first, second = (
        Contender(
            name=name,
            model=model,
            clouds=clouds,
            feed=Feed(to_inputs=to_inputs_of(model, len(clouds.categories))),
            adapter=adapter,
        )
        for name, (model, adapter) in zip("AB", both, strict=True)
    )
    return Pair(first=first, second=second, clouds=clouds, task=ground.task, batch_size=batch_size, data=data)
