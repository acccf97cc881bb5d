"""The commands train, evaluate and predict of the command line."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.run import main as launch
from tqdm import tqdm

from point_peft.data.cloud import Cloud, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.corrupting import CORRUPTIONS, SEVERITIES
from point_peft.data.opening import open_data
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.data.reading import read_cloud
from point_peft.errors import PointPeftError, nearest_names, quoted
from point_peft.schema import to_json
from point_peft.training.fitting import fit
from point_peft.training.flags import add_flags, given_flags
from point_peft.training.folder import SAMPLES_FILE, RunFolder, write_file
from point_peft.training.models import (
    FULL,
    SMALL,
    SPEC,
    ModelSpec,
    adapted,
    backbone_for_task,
    method_configs,
    to_inputs_of,
)
from point_peft.training.opening import Corrupted, OpenedRun, open_run, with_classes_of
from point_peft.training.pictures import Shown, samples
from point_peft.training.predicting import labelled_file, table
from point_peft.training.progress import in_words
from point_peft.training.recipe import Recipe
from point_peft.training.report import SHOWN_CLOUDS

DATA = "a folder of classes, a manifest, a file of arrays, scenes, or one of the field's sets"
Commands = Any  # argparse does not say the type of what add_subparsers gives


def add_commands(commands: Commands) -> None:
    """Give a command line these commands."""
    command = commands.add_parser("train", help="train an adapter on your own clouds")
    command.add_argument("data", metavar="DATA", nargs="+", type=Path, help=DATA)
    command.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the folder of the run")
    command.add_argument("--backbone", default=SMALL, help=f"a name, or {SPEC} (default: {SMALL})")
    command.add_argument("--checkpoint", metavar="FILE", help="published weights of the backbone")
    command.add_argument(
        "--method", metavar="NAME", action="append", help=f"several are one adapter; {FULL}: none (default: point_peft)"
    )
    command.add_argument("--set", metavar="FIELD=VALUE", action="append", default=[], help="of a method")
    command.add_argument("--recipe", metavar="FILE", type=Path, help="a YAML file; flags go before it")
    command.add_argument("--resume", action="store_true", help="go on where the run was interrupted, or begin it")
    command.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, naming them")
    command.add_argument("--log-with", metavar="TRACKER", action="append", help="of accelerate, such as tensorboard")
    command.add_argument("--processes", metavar="N", type=int, default=1, help="of this machine (default: 1)")
    add_flags(command, Recipe, "recipe", without=("task",))
    _add_data_flags(command)
    command.set_defaults(run=_train)

    command = commands.add_parser("evaluate", help="measure a run on a split, as it is and corrupted")
    command.add_argument("folder", metavar="RUN", type=Path)
    command.add_argument("data", metavar="DATA", nargs="*", type=Path, help=f"{DATA} (default: the run's)")
    command.add_argument("--split", default="test", choices=("train", "val", "test", "all"))
    command.add_argument("--corruptions", metavar="KINDS", help=f"all, or some of {','.join(CORRUPTIONS)}")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("predict", help="predict classes of files, or of their points")
    command.add_argument("folder", metavar="RUN", type=Path)
    command.add_argument("files", metavar="FILE", nargs="+", type=Path)
    command.add_argument("--out", metavar="FOLDER", type=Path, required=True)
    command.add_argument("--category", help="the kind of object, for parts of several kinds")
    command.set_defaults(run=_predict)


def _add_data_flags(command: argparse.ArgumentParser) -> None:
    add_flags(command, Preparation, "preparation")
    add_flags(command, DataOptions, "data", without=("preparation", "seed"))
    command.add_argument("--data-seed", metavar="VALUE", type=int, default=0, help="of splits and draws (default: 0)")


def say(text: str) -> None:
    """Write a line for the user."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _train(options: argparse.Namespace) -> int:
    if options.processes > 1:
        return _launched(options.processes)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    values = {} if options.recipe is None else Recipe.from_yaml(options.recipe).to_json()
    # Everything that can be wrong without reading the data is found first.
    recipe = Recipe.from_json({**values, **given_flags(options, Recipe)})
    RunFolder(options.out).check(options.resume)
    spec = ModelSpec(
        backbone=options.backbone,
        checkpoint=options.checkpoint,
        methods=method_configs(options.method or ["point_peft"], options.set),
    )
    data_options = _data_options(options)
    clouds = _read(options.data, data_options, options.skip_bad)
    recipe = Recipe.from_json({**recipe.to_json(), "task": clouds.task})
    parts = {split: clouds.part(split) for split in ("train", "val", "test")}
    if not len(parts["train"]):
        raise PointPeftError(f"{_names(options.data)}: no cloud is for training; say how to split, as by --split-along")
    sizes = ", ".join(f"{len(part):,} {split}" for split, part in parts.items())
    if _is_main():
        say(f"{_names(options.data)}: {clouds.task}, {len(clouds.classes)} classes; clouds: {sizes}")
    model = backbone_for_task(spec, clouds.task, clouds.classes, clouds.categories, recipe.seed)
    to_inputs = to_inputs_of(model, len(clouds.categories))
    model = adapted(model, spec)
    fit(
        model,
        parts["train"],
        parts["val"] if len(parts["val"]) else None,
        recipe,
        out=options.out,
        test=parts["test"] if len(parts["test"]) else None,
        to_inputs=to_inputs,
        resume=options.resume,
        log_with=options.log_with,
        about=_about(spec, clouds, options.data, data_options),
    )
    return 0


def _launched(processes: int) -> int:
    """Start this command again in several processes, as torchrun does."""
    arguments = [text for text in sys.argv[1:] if text != "--processes"]
    position = sys.argv[1:].index("--processes") if "--processes" in sys.argv[1:] else None
    if position is not None:
        del arguments[position]  # the number that followed it
    arguments = [text for text in arguments if not text.startswith("--processes=")]
    launch(["--nproc_per_node", str(processes), "--standalone", "-m", "point_peft", *arguments])
    return 0


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _data_options(options: argparse.Namespace) -> DataOptions:
    preparation = Preparation(**given_flags(options, Preparation))
    return DataOptions(**given_flags(options, DataOptions), preparation=preparation, seed=options.data_seed)


def _read(paths: Sequence[Path], options: DataOptions, skip_bad: bool) -> CloudSet:
    return open_data(paths, options).checked(skip_bad, _bar)


def _bar(places: Sequence[int]) -> Iterable[int]:
    bar: Iterable[int] = tqdm(places, desc="reading", unit="cloud", disable=None if _is_main() else True, leave=False)
    return bar


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _about(spec: ModelSpec, clouds: CloudSet, paths: Sequence[Path], options: DataOptions) -> dict[str, Any]:
    return {
        "name": paths[0].stem,
        "model": spec.to_json(),
        "data": {
            "paths": [str(path) for path in paths],
            "options": to_json(options),
            "categories": list(clouds.categories),
            "codes": {name: list(codes) for name, codes in zip(clouds.classes, clouds.codes, strict=False)},
        },
    }


def _evaluate(options: argparse.Namespace) -> int:
    kinds = _kinds(options.corruptions)
    run = open_run(options.folder)
    paths = options.data or [Path(path) for path in run.record["data"]["paths"]]
    clouds = with_classes_of(run, _read(paths, run.options, False))
    split: Split = options.split
    part = clouds if options.split == "all" else clouds.part(split)
    if not len(part):
        there = sorted({entry.split or "none" for entry in clouds.entries})
        raise PointPeftError(f"{_names(paths)} has no clouds of the split {split!r}; there are {', '.join(there)}, all")
    measured = {"as they are": run.inference.measure(part)[0]}
    for kind in kinds:
        for severity in SEVERITIES:
            measured[f"{kind} {severity}"] = run.inference.measure(Corrupted(part, kind, severity))[0]
    if options.json:
        say(json.dumps({"split": options.split, "clouds": len(part), "results": measured}, indent=2))
        return 0
    say(f"{options.folder} on {options.split}, {len(part):,} clouds")
    for name, own in measured.items():
        say(f"  {name:<14} {in_words(own)}")
    return 0


def _kinds(text: str | None) -> list[str]:
    kinds = list(CORRUPTIONS) if text == "all" else [kind for kind in (text or "").split(",") if kind]
    for kind in kinds:
        if kind not in CORRUPTIONS:
            near = nearest_names(kind, list(CORRUPTIONS), what="corruption")
            raise PointPeftError(f"no corruption is called {quoted(kind)}; nearest: {near}; or all")
    return kinds


def _predict(options: argparse.Namespace) -> int:
    run = open_run(options.folder)
    data = run.options
    clouds = [
        read_cloud(file, num_samples=data.num_samples, seed=data.seed, label_field=data.label_field)
        for file in options.files
    ]
    stems = [file.stem for file in options.files]
    if len(set(stems)) < len(stems):
        raise PointPeftError("two of the files have one name, and so would their predictions: predict them apart")
    write = _write_segmentations if run.inference.segmentation else _write_classes
    for name, content in write(run, options, clouds):
        options.out.mkdir(parents=True, exist_ok=True)
        write_file(options.out / name, content)
        say(str(options.out / name))
    return 0


def _write_classes(run: OpenedRun, options: argparse.Namespace, clouds: Sequence[Cloud]) -> Iterable[tuple[str, bytes]]:
    shares = run.predictor.classify(clouds).cpu()
    yield "predictions.csv", table(options.files, shares, run.classes).encode()
    unknown = torch.tensor(-1)
    shown = [
        Shown(_drawn(cloud), unknown, own.argmax())
        for cloud, own in zip(clouds[:SHOWN_CLOUDS], shares[:SHOWN_CLOUDS], strict=True)
    ]
    yield SAMPLES_FILE, samples(shown, run.classes, f"predictions of {options.folder}")


def _write_segmentations(
    run: OpenedRun, options: argparse.Namespace, clouds: Sequence[Cloud]
) -> Iterable[tuple[str, bytes]]:
    category = _category(run, options.category)
    predictor = run.predictor
    tile = run.options.tile if run.record["data"]["codes"] else math.inf
    for file, cloud in zip(options.files, clouds, strict=True):
        labels = predictor.segment(cloud, file.stem, tile, category)
        yield labelled_file(file, cloud, labels, run.classes, predictor.codes)
        true = predictor.numbered(cloud)
        known = torch.full((len(labels),), -1) if true is None else torch.from_numpy(true)
        shown = Shown(_drawn(cloud), known, torch.from_numpy(labels))
        yield f"{file.stem}.png", samples([shown], run.classes, f"{file.name}, by {options.folder}")


def _category(run: OpenedRun, name: str | None) -> int:
    if name is None and len(run.categories) > 1:
        raise PointPeftError(f"the run knows parts of several kinds: say --category {'|'.join(run.categories)}")
    if name is not None and name not in run.categories:
        near = nearest_names(name, run.categories, what="kind")
        raise PointPeftError(f"no kind of object is called {quoted(name)}; nearest: {near}")
    return 0 if name is None else run.categories.index(name)


def _drawn(cloud: Cloud) -> torch.Tensor:
    """Coordinates (n, 3) near the origin, for a picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an empty mean, where nothing is finite
        centre = np.nanmean(np.where(np.isfinite(cloud.coordinates), cloud.coordinates, np.nan), axis=0)
    return torch.from_numpy((cloud.coordinates - centre).astype(np.float32))
