"""The answers of tasks for one cloud: of all that share a backbone and a preparation, in one call."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from point_peft import geometry
from point_peft.data.cloud import Sample
from point_peft.demo.nearest import Neighbour, nearest_rows
from point_peft.demo.recorder import Notes, recording
from point_peft.demo.shown import ShownCloud, without_folder
from point_peft.demo.task import LoadedTask
from point_peft.errors import PointPeftError
from point_peft.running.nested import Args
from point_peft.training.feeding import on_device
from point_peft.training.objective import flat_scores

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """The answer of one task for a cloud, and what it went by, for the points that the model saw."""

    task: LoadedTask
    shares: Tensor
    """The probability (classes,) of each class of the cloud; or the share of the points that have it."""
    sure: float
    """The probability of the likeliest class; of points, the mean over them."""
    points: npt.NDArray[np.float64]
    """Where the points are (m, 3), in the unit of the file."""
    labels: npt.NDArray[np.int64] | None
    """The class (m,) of each point; None where the whole cloud has one."""
    agreement: float | None
    """The share of the points, of those with a label in the file, to which the answer is that label."""
    attention: npt.NDArray[np.float32] | None
    """The share (m,) of its token's attention that goes to prompts; None where there are none."""
    block: str
    """The block that the attention is of, in words."""
    neighbourhood: npt.NDArray[np.int64] | None
    """The token (m,) whose centre is nearest; None where it is not known where tokens lie."""
    near: tuple[Neighbour, ...]
    seconds: float
    part: str = ""
    """A sentence, where the task answers for a part of the cloud only."""

    @property
    def best(self) -> int:
        """The number of the likeliest class."""
        return int(self.shares.argmax())


@dataclass(frozen=True, kw_only=True, eq=False)
class Refusal:
    """The reason why a task does not answer for a cloud, such as one that has no point within the task's reach."""

    task: LoadedTask
    why: str
    points: npt.NDArray[np.float64]
    """The points of the cloud (m, 3), in the unit of the file."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A cloud as a task takes it: samples, and for each the rows of its points in the cloud."""

    samples: tuple[Sample, ...]
    rows: tuple[Rows, ...]


def answer_cloud(shown: ShownCloud, tasks: Sequence[LoadedTask]) -> dict[str, Answer | Refusal]:
    """Name -> the answer of each task for a cloud; raises `PointPeftError` where none of them can take the cloud."""
    found: dict[str, Answer | Refusal] = {}
    refused: list[PointPeftError] = []
    for group in _groups(tasks):
        try:
            found.update(_answers(group, shown.middle() if group[0].segmentation else shown))
        except PointPeftError as error:
            refused.append(error)
            places = shown.cloud.coordinates
            points = places[np.isfinite(places).all(axis=1)]
            why = without_folder(str(error), shown.path)
            found.update({task.name: Refusal(task=task, why=why, points=points) for task in group})
    if not any(isinstance(own, Answer) for own in found.values()):
        raise refused[0]
    return {task.name: found[task.name] for task in tasks}


def _answers(group: Sequence[LoadedTask], shown: ShownCloud) -> dict[str, Answer]:
    asked = _asked(group[0], shown)
    predictor = group[0].predictor
    size = predictor.inference.batch_size if predictor.options.preparation.num_points else 1
    parts = [asked.samples[start : start + size] for start in range(0, len(asked.samples), size)]
    seen = [_forward(group, part) for part in parts]
    return {task.name: _answer(task, shown, asked, [part[task.name] for part in seen]) for task in group}


def _groups(tasks: Sequence[LoadedTask]) -> list[list[LoadedTask]]:
    """Tasks that get the same points on the same backbone, together."""
    groups: list[list[LoadedTask]] = []
    for task in tasks:
        beside = next((group for group in groups if task.adapter is not None and _alike(task, group[0])), None)
        if beside is None:
            groups.append([task])
        else:
            beside.append(task)
    return groups


def _alike(task: LoadedTask, other: LoadedTask) -> bool:
    ours, theirs = task.predictor, other.predictor
    same = [(own.options.preparation, own.options.seed, own.options.tile, bool(own.codes)) for own in (ours, theirs)]
    return task.model is other.model and task.segmentation == other.segmentation and same[0] == same[1]


def _asked(task: LoadedTask, shown: ShownCloud) -> _Asked:
    """The cloud, prepared as for the task; for classes of points cut into as many pieces as it takes."""
    predictor = task.predictor
    if not task.segmentation:
        sample, rows = predictor.sample(shown.cloud, 0)
        return _Asked(samples=(sample,), rows=(rows,))
    # Points with codes are of scenes, others parts of one object.
    scene = predictor.cut(shown.cloud, shown.name, predictor.options.tile if predictor.codes else math.inf)
    made = [predictor.sample(scene.piece(number), number) for number in range(len(scene.pieces))]
    return _Asked(
        samples=tuple(sample for sample, _ in made),
        rows=tuple(piece[own].astype(np.int64) for piece, (_, own) in zip(scene.pieces, made, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The answer of a task for some samples, and what was seen meanwhile."""

    points: Tensor
    """(b, n, c), as the model took them."""
    scores: Tensor
    """(b, classes) or (b n, classes)"""
    notes: Notes
    near: list[Neighbour]


def _forward(group: Sequence[LoadedTask], samples: Sequence[Sample]) -> dict[str, _Seen]:
    """Name -> what each of these tasks gives for samples, all of them in one call."""
    first, inference = group[0], group[0].predictor.inference
    batch = on_device(inference.feed.batch(samples), inference.accelerator.device)
    args, kwargs = inference.feed.inputs(batch)
    names = [task.adapter for task in group]
    with recording(first.model) as notes:
        if first.held is None or names == [None]:
            outputs: dict[str | None, Any] = {None: first.model(*args, **kwargs)}
        else:
            outputs = first.held.forward_tasks(args, names)
    return {
        task.name: _Seen(
            points=batch.points,
            scores=flat_scores(
                outputs[task.adapter], batch.labels, len(task.classes), inference.feed.to_logits
            ).float(),
            notes=notes[task.adapter],
            near=_near(task, args),
        )
        for task in group
    }


def _near(task: LoadedTask, args: Args) -> list[Neighbour]:
    """The training clouds that a task goes by, where it answers for whole clouds."""
    if task.segmentation or task.held is None or task.adapter is None:
        return []
    return nearest_rows(task.held, task.adapter, args, {})


def _answer(task: LoadedTask, shown: ShownCloud, asked: _Asked, seen: Sequence[_Seen]) -> Answer:
    rows, first = np.unique(np.concatenate(asked.rows), return_index=True)
    shares = torch.cat([part.scores.softmax(dim=1) for part in seen]).cpu()
    labels = shares.argmax(dim=1).numpy()[first] if task.segmentation else None
    sure = float(shares.max(dim=1).values.mean())
    if labels is not None:
        shares = torch.from_numpy(np.bincount(labels, minlength=shares.shape[1]) / len(labels))[None]
    true = task.predictor.numbered(shown.cloud) if labels is not None else None
    agreement = None
    if true is not None and labels is not None and (true[rows] >= 0).any():
        known = true[rows] >= 0
        agreement = float((labels == true[rows])[known].mean())
    notes = seen[0].notes
    attention = [_attention_of(part) for part in seen if part.notes.attention is not None]
    tokens, before = [], 0
    for part in seen:
        centres = part.notes.centres.get(0)
        if centres is not None:
            own = geometry.knn(part.points[..., :3], centres, 1)[..., 0]
            offset = before + torch.arange(len(own), device=own.device)[:, None] * centres.shape[1]
            tokens.append(rearrange(own + offset, "b n -> (b n)").cpu())
            before += centres.shape[0] * centres.shape[1]
    blocks = 0 if notes.attention is None else notes.block + 1
    return Answer(
        task=task,
        shares=shares[0],
        sure=sure,
        points=shown.cloud.coordinates[rows],
        labels=labels,
        agreement=agreement,
        attention=torch.cat(attention).numpy()[first] if attention else None,
        block=f"block {blocks}",
        neighbourhood=torch.cat(tokens).numpy()[first] if tokens else None,
        near=tuple(seen[0].near),
        seconds=sum(part.notes.seconds for part in seen),
        part=shown.part,
    )


def _attention_of(seen: _Seen) -> Tensor:
    """The share (b n,) of attention that goes to prompts at each point, from the three tokens nearest to it."""
    assert seen.notes.attention is not None
    centres = seen.notes.centres[seen.notes.stage]
    at_points = geometry.nearest_interpolate(seen.notes.attention[..., None].float(), centres, seen.points[..., :3])
    return rearrange(at_points, "b n 1 -> (b n)").cpu()


def timed_swap(tasks: Sequence[LoadedTask]) -> float | None:
    """Seconds that it takes to make another adapter the active one; None where no two share a backbone."""
    for task in tasks:
        own = [other.adapter for other in tasks if other.model is task.model and other.adapter is not None]
        if task.held is not None and len(own) > 1:
            began = time.perf_counter()
            for name in own:
                task.held.set_adapter(name)
            return (time.perf_counter() - began) / len(own)
    return None
