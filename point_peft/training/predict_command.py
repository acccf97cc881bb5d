"""The command predict: the classes of files, or of their points, and pictures of them."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from point_peft.data.cloud import Cloud
from point_peft.data.reading import read_cloud
from point_peft.errors import PointPeftError, nearest_names, quoted
from point_peft.training.folder import SAMPLES_FILE, write_file
from point_peft.training.opening import OpenedRun, open_run
from point_peft.training.pictures import Shown, samples
from point_peft.training.predicting import labelled_file, table
from point_peft.training.progress import say
from point_peft.training.report import SHOWN_CLOUDS

PREDICTIONS_FILE = "predictions.csv"


def predict(options: argparse.Namespace) -> int:
    """Predict as the command line asks; returns the exit code."""
    files, out = options.files, options.out
    _check_files(files, out)
    run = open_run(options.folder)
    category = _category(run, options.category)
    data = run.options
    clouds = [
        read_cloud(file, num_samples=data.num_samples, seed=data.seed, label_field=data.label_field) for file in files
    ]
    made = _segmented(run, files, clouds, category) if run.inference.segmentation else _classified(run, files, clouds)
    for name, content in made:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / name, content)
        say(str(out / name))
    return 0


def _check_files(files: Sequence[Path], out: Path) -> None:
    """Raise `PointPeftError` for files that are not there, or that predictions might be written over."""
    for file in files:
        if not file.is_file():
            raise PointPeftError(f"{file} {'is no file' if file.exists() else 'does not exist'}: name files of clouds")
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        raise PointPeftError("two of the files have one name, and so would their predictions: predict them apart")
    if out.exists() and not out.is_dir():
        raise PointPeftError(f"--out {quoted(str(out))} is a file: name a folder")
    if out.resolve() in {file.resolve().parent for file in files}:
        raise PointPeftError(
            f"--out {quoted(str(out))} is where the files lie, which might be overwritten: name another"
        )


def _classified(run: OpenedRun, files: Sequence[Path], clouds: Sequence[Cloud]) -> Iterable[tuple[str, bytes]]:
    shares = run.predictor.classify(clouds).cpu()
    yield PREDICTIONS_FILE, table(files, shares, run.classes).encode()
    unknown = torch.tensor(-1)
    shown = [
        Shown(_drawn(cloud), unknown, own.argmax())
        for cloud, own in zip(clouds[:SHOWN_CLOUDS], shares[:SHOWN_CLOUDS], strict=True)
    ]
    yield SAMPLES_FILE, samples(shown, run.classes, f"predictions of {run.folder}")


def _segmented(
    run: OpenedRun, files: Sequence[Path], clouds: Sequence[Cloud], category: int
) -> Iterable[tuple[str, bytes]]:
    predictor = run.predictor
    tile = run.options.tile if run.record["data"]["codes"] else math.inf
    for file, cloud in zip(files, clouds, strict=True):
        labels = predictor.segment(cloud, file.stem, tile, category)
        yield labelled_file(file, cloud, labels, run.classes, predictor.codes)
        true = predictor.numbered(cloud)
        known = torch.full((len(labels),), -1) if true is None else torch.from_numpy(true)
        shown = Shown(_drawn(cloud), known, torch.from_numpy(labels))
        yield f"{file.stem}.png", samples([shown], run.classes, f"{file.name}, by {run.folder}")


def _category(run: OpenedRun, name: str | None) -> int:
    if name is None and len(run.categories) > 1:
        raise PointPeftError(f"the run knows parts of several kinds: say --category {'|'.join(run.categories)}")
    if name is not None and len(run.categories) == 1:
        raise PointPeftError("the run does not know kinds of objects: leave --category out")
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
