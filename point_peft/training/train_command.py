"""The command train: from data, a backbone and methods by name to the folder of a run, or those of several trials."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as launch

from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.errors import PointPeftError, quoted
from point_peft.schema import to_json
from point_peft.training.fitting import fit
from point_peft.training.flags import given_flags
from point_peft.training.folder import RECIPE_FILE, RunFolder, read_record, write_file
from point_peft.training.models import ModelSpec, adapted, backbone_for_task, method_configs, to_inputs_of, with_columns
from point_peft.training.progress import in_words, say
from point_peft.training.recipe import Recipe, fields_of_file
from point_peft.training.tasks import FewShot, is_main, listed, name_of_data, read_data

SUMMARY_FILE = "summary.json"
MEASURE = "accuracy"
SHOWN_CLASSES = 8
ERROR = 2


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A command, checked as far as it can be without reading the data."""

    paths: tuple[Path, ...]
    recipe: Recipe
    spec: ModelSpec
    options: DataOptions
    few_shot: FewShot | None
    skip_bad: bool
    resume: bool
    log_with: Sequence[str] | None

    @property
    def name(self) -> str:
        """A name for the data, and for what is drawn from them."""
        name, task = name_of_data(self.paths), self.few_shot
        return name if task is None else f"{name}, {task.ways}-way {task.shots}-shot, trial {task.trial}"

    @property
    def data(self) -> dict[str, Any]:
        """The entries of a run's folder on how the data were opened, as JSON."""
        return {
            "paths": [str(path.resolve()) for path in self.paths],
            "options": to_json(self.options),
            "few_shot": None if self.few_shot is None else to_json(self.few_shot),
            "skip_bad": self.skip_bad,
        }

    def about(self, clouds: CloudSet) -> dict[str, Any]:
        """The entries of a run's folder on the model and the data."""
        codes = {name: list(own) for name, own in zip(clouds.classes, clouds.codes, strict=False)}
        data = {**self.data, "categories": list(clouds.categories), "codes": codes}
        return {"name": self.name, "model": self.spec.to_json(), "data": data}


def train(options: argparse.Namespace) -> int:
    """Train as the command line asks; returns the exit code."""
    asked = _asked(options)
    few_shot, out = asked.few_shot, options.out
    if options.trials is None and _phase(out, asked) == "end":
        _tell_finished(out)
        return 0
    if options.trials is not None:
        _check_trials(out, asked.resume)
    if options.processes > 1:
        return _launched(options.processes, options.arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    clouds = read_data(asked.paths, asked.options, asked.skip_bad)
    if options.trials is None:
        _train(asked, clouds if few_shot is None else few_shot.drawn(clouds), out)
        if is_main():
            say(f"next: point-peft evaluate {out}; point-peft predict {out} FILE … --out FOLDER")
        return 0
    assert few_shot is not None  # `_asked` has seen to that
    numbers = range(few_shot.trial, few_shot.trial + options.trials)
    _train_trials([replace(asked, few_shot=replace(few_shot, trial=number)) for number in numbers], clouds, out)
    return 0


def _train_trials(trials: Sequence[_Asked], clouds: CloudSet, out: Path) -> None:
    """Several runs in folders of a folder, and what came out on the whole; nothing begins if one cannot be drawn."""
    tasks = [asked.few_shot for asked in trials if asked.few_shot is not None]
    drawn = [task.drawn(clouds) for task in tasks]
    places = [out / f"trial-{task.trial}" for task in tasks]
    for asked, place in zip(trials, places, strict=True):
        _phase(place, asked)
    found = [_train(*each)["test"][MEASURE] for each in zip(trials, drawn, places, strict=True)]
    _summarize(out, tasks, found)


def _asked(options: argparse.Namespace) -> _Asked:
    stated = {} if options.recipe is None else fields_of_file(options.recipe)
    source = f"the recipe {quoted(str(options.recipe))}"
    recipe = Recipe.from_json({**stated, **given_flags(options, Recipe)}, source)
    method = options.method or ["point_peft"]
    origin, colon, name = options.backbone.rpartition(":")
    # The run can then be opened from any folder.
    backbone = f"{Path(origin).resolve()}:{name}" if colon and origin.endswith(".py") else options.backbone
    checkpoint = None if options.checkpoint is None else str(Path(options.checkpoint).resolve())
    preparation = Preparation(**given_flags(options, Preparation))
    methods = with_columns(method_configs(method, options.set), preparation.channels, options.backbone_channels)
    spec = ModelSpec(backbone=backbone, checkpoint=checkpoint, methods=methods)
    given = given_flags(options, DataOptions)
    given.pop("seed", None)  # --seed is the recipe's
    if "task" in stated:
        given = {"task": stated["task"], **given}
    few_shot = options.few_shot
    if few_shot is None and (options.trial is not None or options.trials is not None):
        raise PointPeftError("--trial and --trials are draws of a few-shot task: say which, as by --few-shot 5x10")
    if few_shot is not None:
        few_shot = replace(few_shot, trial=options.trial or 0)
        given = {"val_share": 0.0, **given}  # a task has no validation, so nothing is held out for one
    return _Asked(
        paths=tuple(options.data),
        recipe=recipe,
        spec=spec,
        options=DataOptions(**given, preparation=preparation, seed=options.data_seed),
        few_shot=few_shot,
        skip_bad=options.skip_bad,
        resume=options.resume,
        log_with=options.log_with,
    )


def _tell_finished(out: Path) -> None:
    if is_main():
        for split, own in read_record(out)["results"].items():
            say(f"{split}: {in_words(own)}")
        say(f"{out} holds this run, and it is finished")


def _phase(out: Path, asked: _Asked) -> str:
    """The phase of the run in a folder, as `RunFolder.check` says it; raises `PointPeftError` if it is another run."""
    phase = RunFolder(out).check(asked.resume)
    if phase == "begin":
        return phase
    record = read_record(out)
    there, wanted = Recipe.from_yaml(out / RECIPE_FILE).to_json(), asked.recipe.to_json()
    differing = [
        f"{name} {there[name]}, not {wanted[name]}"
        for name in there
        if name not in ("task", "num_workers") and there[name] != wanted[name]
    ]
    if record.get("model") != asked.spec.to_json():
        differing.append("another backbone or method")
    # Data may have moved.
    told = {**record.get("data", {}), "name": record.get("name"), "paths": None}
    if any(told.get(name) != value for name, value in {**asked.data, "name": asked.name, "paths": None}.items()):
        differing.append("other data or another preparation of them")
    if differing:
        raise PointPeftError(
            f"{quoted(str(out))} holds a run with {differing[0]}: say the same again, or name another folder"
        )
    return phase


def _train(asked: _Asked, clouds: CloudSet, out: Path) -> dict[str, dict[str, float]]:
    """One run in a folder; returns its results by split."""
    recipe = Recipe.from_json({**asked.recipe.to_json(), "task": clouds.task})
    parts = {split: clouds.part(split) for split in ("train", "val", "test")}
    _check_parts(asked.paths, clouds, parts)
    if clouds.preparation.num_points is None and recipe.batch_size > 1:
        _check_sizes(parts)
    if is_main():
        classes = ", ".join(clouds.classes[:SHOWN_CLASSES]) + (", …" if len(clouds.classes) > SHOWN_CLASSES else "")
        sizes = ", ".join(f"{len(part):,} {split}" for split, part in parts.items())
        say(f"{listed(asked.paths)}: {clouds.task}, {len(clouds.classes)} classes ({classes}); clouds: {sizes}")
    model = backbone_for_task(asked.spec, clouds.task, clouds.classes, clouds.categories, recipe.seed)
    to_inputs = to_inputs_of(model, len(clouds.categories))
    run = fit(
        adapted(model, asked.spec),
        parts["train"],
        parts["val"] if len(parts["val"]) else None,
        recipe,
        out=out,
        test=parts["test"] if len(parts["test"]) else None,
        to_inputs=to_inputs,
        resume=asked.resume,
        log_with=asked.log_with,
        about=asked.about(clouds),
    )
    return {split: dict(own) for split, own in run.results.items()}


def _check_parts(paths: Sequence[Path], clouds: CloudSet, parts: dict[str, CloudSet]) -> None:
    if not clouds.classes:
        raise PointPeftError(f"{listed(paths)}: no cloud and no point has a label, so there is nothing to learn")
    if not len(parts["train"]):
        there = [split for split, part in parts.items() if len(part)]
        how = f"there are only {' and '.join(there)}" if there else "say how to split, as by --split-along x"
        raise PointPeftError(f"{listed(paths)}: no cloud is for training; {how}")


def _check_sizes(parts: Mapping[str, CloudSet]) -> None:
    """Raise `PointPeftError` if clouds of one split cannot be a batch."""
    for split, part in parts.items():
        sizes = [len(part[index].points) for index in range(len(part))]
        if len(set(sizes)) > 1:
            raise PointPeftError(
                f"clouds of {split} have {min(sizes)} to {max(sizes)} points, and those of a batch must have equally "
                "many: give --num-points"
            )


def _check_trials(out: Path, resume: bool) -> None:
    """Raise `PointPeftError` if trials cannot go into a folder."""
    path = quoted(str(out))
    if out.exists() and not out.is_dir():
        raise PointPeftError(f"the run folder {path} is a file: name another")
    there = [entry.name for entry in out.iterdir()] if out.exists() else []
    if there and not resume:
        raise PointPeftError(f"the run folder {path} is not empty: name another, or go on with its trials by --resume")
    if any(not name.startswith(("trial-", ".")) and name != SUMMARY_FILE for name in there):
        raise PointPeftError(f"the run folder {path} holds other things than trials: name another")


def _summarize(out: Path, tasks: Sequence[FewShot], found: Sequence[float]) -> None:
    """Write and say the mean and the standard deviation (of these trials, not of a sample) of the accuracies."""
    mean, deviation, task = statistics.fmean(found), statistics.pstdev(found), tasks[0]
    summary = {
        "ways": task.ways,
        "shots": task.shots,
        "trials": {str(own.trial): value for own, value in zip(tasks, found, strict=True)},
        "mean": mean,
        "standard_deviation": deviation,
    }
    if is_main():
        write_file(out / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        say(
            f"{task.ways}-way {task.shots}-shot, {len(found)} trials: test {MEASURE} {mean:.1f} ± {deviation:.1f} % "
            f"({out / SUMMARY_FILE})"
        )


def without_processes(arguments: Sequence[str]) -> list[str]:
    """The words of a command line without --processes and its number."""
    number = [before == "--processes" for before in ("", *arguments[:-1])]
    kept = zip(arguments, number, strict=True)
    return [text for text, is_number in kept if not is_number and text.partition("=")[0] != "--processes"]


def _launched(processes: int, arguments: Sequence[str]) -> int:
    """Start this command again in several processes, as torchrun does."""
    try:
        again = without_processes(arguments)
        launch(["--nproc_per_node", str(processes), "--standalone", "-m", "point_peft", *again])
    except ChildFailedError:
        return ERROR  # each process has said what was wrong
    return 0
