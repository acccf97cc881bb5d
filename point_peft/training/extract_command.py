"""The command extract: an adapter out of a fully fine-tuned model, with what it costs in accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from point_peft.data.cloud import CloudBatch, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.errors import PointPeftError, quoted
from point_peft.extracting import extract
from point_peft.training.feeding import Feed
from point_peft.training.flags import given_flags
from point_peft.training.inference import Inference
from point_peft.training.models import SMALL, ModelSpec, backbone_for_task, base_name, filled, to_inputs_of
from point_peft.training.objective import Loss
from point_peft.training.opening import open_run, with_classes_of
from point_peft.training.progress import in_words, say
from point_peft.training.tasks import listed, read_data

EXAMPLE_POINTS = 1024
BATCH = 32
TRAIN_CLOUDS = 512
"""Training clouds that changes are weighed on, at most."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """The two models, and the clouds that they are compared on, if any."""

    name: str
    """Of the base, in words."""
    base: nn.Module
    full: nn.Module
    feed: Feed
    loss: Loss
    segmentation: bool
    points: int
    clouds: CloudSet | None
    train: CloudSet | None
    """Training clouds of the same data, on which changes are weighed."""


def extract_adapter(options: argparse.Namespace) -> int:
    """Extract as the command line asks; returns the exit code."""
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PointPeftError(f"--out {quoted(str(out))} is there already: name a new folder")
    models = _of_run(options) if options.full.is_dir() else _of_files(options)
    before = None if models.clouds is None else _measured(models, models.full)
    points = torch.rand(2, models.points, 3, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, dtype=torch.int64)
    example = models.feed.inputs(CloudBatch(points, nothing, nothing))
    model, extraction = extract(
        models.base,
        models.full,
        energy=options.energy,
        example_inputs=example[0],
        batches=None if models.train is None else _batches(models),
        to_inputs=lambda batch: models.feed.inputs(batch)[0],
        base_model_name_or_path=models.name,
    )
    model.eval()
    with torch.no_grad():
        model(*example[0])  # which proves that every part has an effect
    say(str(extraction))
    if before is not None:
        say(f"{options.full}: {in_words(before)}")
        say(f"{out}: {in_words(_measured(models, model))}")
    model.save_pretrained(out, half=options.half)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    whole = sum(_bytes(tensor) for tensor in models.full.state_dict().values())
    say(f"{out}: {size:,} bytes, {size / whole:.1%} of the fine-tuned model's {whole:,}")
    return 0


def _batches(models: Models) -> Iterator[CloudBatch]:
    assert models.train is not None
    for begin in range(0, min(len(models.train), TRAIN_CLOUDS), BATCH):
        places = range(begin, min(begin + BATCH, len(models.train)))
        yield models.feed.batch([models.train[place] for place in places])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _measured(models: Models, model: nn.Module) -> Mapping[str, float]:
    """The figures of one of the models on the clouds."""
    assert models.clouds is not None
    inference = Inference(
        model=model,
        wrapped=model,
        accelerator=Accelerator(cpu=True),
        feed=models.feed,
        loss=models.loss,
        batch_size=BATCH,
        segmentation=models.segmentation,
    )
    return inference.measure(models.clouds)[0]


def _of_run(options: argparse.Namespace) -> Models:
    """The model of a run of `train --method full`, and the backbone that it began as."""
    stated = {**given_flags(options, DataOptions), **given_flags(options, Preparation)}
    for name, given in {
        "BASE": options.base,
        "--backbone": options.backbone,
        "--num-classes": options.num_classes,
    }.items():
        if given is not None:
            raise PointPeftError(f"{name} is what the run {quoted(str(options.full))} says itself: leave it out")
    if stated:
        raise PointPeftError(f"--{next(iter(stated)).replace('_', '-')} is what the run says itself: leave it out")
    run = open_run(options.full)
    spec = ModelSpec.from_json(run.record["model"])
    if spec.methods:
        methods = ", ".join(str(method["method"]) for method in spec.methods)
        raise PointPeftError(
            f"the run {quoted(str(options.full))} has trained an adapter ({methods}) already: extract takes a run of "
            "train --method full"
        )
    base = backbone_for_task(spec, run.recipe.task, run.classes, run.categories, run.recipe.seed)
    clouds = train = None
    if options.data is not None:
        paths = options.data or [Path(path) for path in run.record["data"]["paths"]]
        everything = with_classes_of(run, read_data(paths, run.options, skip_bad=False))
        clouds, train = _part(everything, options.split, paths), _part(everything, "train", paths)
    return Models(
        name=base_name(spec),
        base=base.eval(),
        full=run.model.cpu(),
        feed=run.inference.feed,
        loss=run.inference.loss,
        segmentation=run.inference.segmentation,
        points=run.options.preparation.num_points or EXAMPLE_POINTS,
        clouds=clouds,
        train=train,
    )


def _of_files(options: argparse.Namespace) -> Models:
    """The model in a checkpoint file, and the backbone that it began as, in another or by name."""
    preparation = Preparation(**given_flags(options, Preparation))
    data = DataOptions(**given_flags(options, DataOptions), preparation=preparation)
    clouds = train = None
    if options.data is not None:
        if not options.data:
            raise PointPeftError("--data names no files: say which clouds the two models are to be compared on")
        everything = read_data(options.data, data, skip_bad=False)
        clouds, train = _part(everything, options.split, options.data), _part(everything, "train", options.data)
    classes = options.num_classes if clouds is None else len(clouds.classes)
    if classes is None or (options.num_classes is not None and options.num_classes != classes):
        there = "" if clouds is None else f" {classes}"
        raise PointPeftError(f"--num-classes N is needed, the number of classes that the model tells apart{there}")
    checkpoint = None if options.base is None else str(options.base)
    spec = ModelSpec(backbone=options.backbone or SMALL, checkpoint=checkpoint, methods=({},))
    base = backbone_for_task(spec, "classification", [str(number) for number in range(classes)], ("",)).eval()
    full = filled(base, options.full)
    return Models(
        name=base_name(spec),
        base=base,
        full=full,
        feed=Feed(to_inputs=to_inputs_of(base, 1)),
        loss=Loss(classes=classes),
        segmentation=False,
        points=preparation.num_points or EXAMPLE_POINTS,
        clouds=clouds,
        train=train,
    )


def _part(clouds: CloudSet, split: Split | str, paths: Any) -> CloudSet:
    part = clouds if split == "all" else clouds.part(split)  # type: ignore[arg-type]
    if not len(part):
        raise PointPeftError(f"{listed(paths)}: no clouds are of the split {split!r}; --split all takes every one")
    return part
