"""The command compare: two runs, or two adapters, on the same clouds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.errors import PointPeftError, quoted
from point_peft.hub.pulling import Place, folder_of
from point_peft.schema import to_json
from point_peft.training.answers import Answered, Comparison
from point_peft.training.compare_picture import picture
from point_peft.training.comparing import compared
from point_peft.training.contenders import Pair, Question, open_pair
from point_peft.training.flags import given_flags
from point_peft.training.folder import write_file
from point_peft.training.models import ModelSpec
from point_peft.training.pictures import check_matplotlib
from point_peft.training.progress import say

COMPARISON_FILE, PICTURE_FILE = "compare.json", "compare.png"
SHOWN_CLASSES, SHOWN_NAMES = 5, 10
MEASURES = {
    "miou": ("mIoU", "{:.1f} %"),
    "accuracy": ("accuracy", "{:.1f} %"),
    "class_accuracy": ("mean of classes", "{:.1f} %"),
    "confidence": ("confidence", "{:.1f} %"),
    "calibration_error": ("calibration error", "{:.1f} %"),
    "loss": ("-log p(true)", "{:.3f}"),
}
"""Field of `Answered` -> its name and its form in the table."""


def compare_sources(options: argparse.Namespace) -> int:
    """Compare as the command line asks; returns the exit code, which tells nothing of the two."""
    out: Path | None = options.out
    if out is not None:
        check_matplotlib()
        if out.exists() and not out.is_dir():
            raise PointPeftError(f"--out {quoted(str(out))} is a file: name a folder")
    pair = open_pair(*_folders(options), _question(options))
    found = compared(
        pair.first, pair.second, pair.clouds.classes, pair.task, pair.batch_size, together=options.together
    )
    record = {"a": options.first, "b": options.second, "data": pair.data, "split": options.split, **to_json(found)}
    text = json.dumps(record, indent=2)
    if out is not None:
        drawn = picture(found, pair)
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / COMPARISON_FILE, text + "\n")
        write_file(out / PICTURE_FILE, drawn)
    say(text if options.json else "\n".join(_readable(found, pair, options)))
    return 0


def _folders(options: argparse.Namespace) -> tuple[Path, Path]:
    return folder_of(options.first, Place()), folder_of(options.second, Place())


def _question(options: argparse.Namespace) -> Question:
    given, preparation = given_flags(options, DataOptions), given_flags(options, Preparation)
    if options.backbone is None:
        own = [*given, *preparation, *(["checkpoint"] if options.checkpoint is not None else [])]
        if own:
            flag = own[0].replace("_", "-")
            raise PointPeftError(f"--{flag} is for adapters on a --backbone; a run says itself what it was trained on")
        return Question(paths=options.data, split=options.split, skip_bad=options.skip_bad)
    checkpoint = None if options.checkpoint is None else str(Path(options.checkpoint).resolve())
    return Question(
        paths=options.data,
        split=options.split,
        skip_bad=options.skip_bad,
        backbone=ModelSpec(backbone=options.backbone, checkpoint=checkpoint),
        options=DataOptions(**given, preparation=Preparation(**preparation)),
    )


def _readable(found: Comparison, pair: Pair, options: argparse.Namespace) -> Iterator[str]:
    unit = "points" if found.task == "segmentation" else "clouds"
    points = f" with {found.answers:,} points" if found.task == "segmentation" else ""
    yield from (f"A: {options.first}", f"B: {options.second}")
    yield f"on {pair.data} ({options.split}): {found.clouds:,} clouds{points} in {len(found.classes)} classes"
    if found.labelled < found.answers:
        yield f"labels are known of {found.labelled:,} of {found.answers:,} {unit}"
    yield from ("", *_table(found), "")
    yield f"agreement: {found.agreement:.1f} % of the {unit} get the same answer, Cohen's kappa {found.kappa:.2f}"
    yield from _who_is_right(found, unit)
    differing = [own for own in found.of_classes if own.a != own.b][:SHOWN_CLASSES]
    if differing:
        width = max(len(own.name) for own in differing)
        yield from ("", "right by class, where the two differ most:")
        yield f"  {'':<{width}}{'labels':>10}{'A':>9}{'B':>9}"
        for own in differing:
            yield f"  {own.name:<{width}}{own.labels:>10,}{own.a:>7.1f} %{own.b:>7.1f} %"
    yield from _where(found)
    if options.out is not None:
        yield from ("", f"{options.out / COMPARISON_FILE} and {options.out / PICTURE_FILE} have all of it")


def _table(found: Comparison) -> Iterator[str]:
    columns: dict[str, Answered] = {"A": found.a, "B": found.b}
    if found.together is not None:
        columns["A with B"] = found.together
    yield f"{'':<18}" + "".join(f"{name:>10}" for name in columns) + f"{'B - A':>10}"
    for field, (name, form) in MEASURES.items():
        values = [getattr(own, field) for own in columns.values()]
        if values[0] is not None:
            gain = form.removesuffix(" %").replace(":", ":+").format(values[1] - values[0])
            yield f"{name:<18}" + "".join(f"{form.format(value):>10}" for value in values) + f"{gain:>10}"


def _who_is_right(found: Comparison, unit: str) -> Iterator[str]:
    if found.right is None or found.lead is None:
        yield f"no {unit[:-1]} has a label that is known, so nothing tells who is right"
        return
    right, lead = found.right, found.lead
    yield f"right: both {right.both:,}, only A {right.only_a:,}, only B {right.only_b:,}, neither {right.neither:,}"
    if lead.share is None:
        yield "there is no cloud on which one is better than the other"
        return
    what = "on which one has more points right" if unit == "points" else "that only one has right"
    yield (
        f"of the {lead.a + lead.b:,} clouds {what}, B leads on {lead.b:,}: {lead.share:.0f} % "
        f"(95 % interval {lead.low:.0f} to {lead.high:.0f}); between equals p = {lead.p:.2g}"
    )


def _where(found: Comparison) -> Iterator[str]:
    if not found.differing:
        return
    yield from ("", f"they differ on {len(found.differing):,} of {found.clouds:,} clouds:")
    for own in found.differing[:SHOWN_NAMES]:
        if found.task == "segmentation":
            yield f"  {own.cloud}: {own.share:.1f} % of its points"
        else:
            true = "" if own.true is None else f", is {own.true}"
            yield f"  {own.cloud}: A {own.a}, B {own.b}{true}"
    left = len(found.differing) - SHOWN_NAMES
    if left > 0:
        yield f"  and {left:,} more, which --json lists"
