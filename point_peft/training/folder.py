"""The folder of a run: what it was told, how it went, what came out; every file is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from point_peft.errors import PointPeftError, quoted
from point_peft.files.format import RUN_FILE
from point_peft.training.recipe import Recipe
from point_peft.training.state import Position, read_checkpoint, write_checkpoint
from point_peft.version import __version__

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"
MODEL_FILE = "model.safetensors"
"""The trained tensors of a plain model; an adapted one has its adapter's files instead."""
CURVES_FILE, CONFUSION_FILE, SAMPLES_FILE = "curves.png", "confusion.png", "samples.png"
PICTURES = {CURVES_FILE: "loss and validation by epoch", CONFUSION_FILE: "confusions", SAMPLES_FILE: "samples"}
"""Picture -> what it shows."""
FORMAT_VERSION = 1


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in the place of the present one, at once or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class RunFolder:
    """The folder of one run; only one process of several writes to it."""

    path: Path
    writes: bool = True
    identity: dict[str, Any] = field(default_factory=dict)
    """Facts that must be the same when a training is resumed."""

    @property
    def record(self) -> dict[str, Any] | None:
        """The contents of `run.json`; None where there is none."""
        file = self.path / RUN_FILE
        return read_record(self.path) if file.exists() else None

    def check(self, resume: bool) -> str:
        """Say whether this is the "begin", the middle ("resume") or the "end" of a run, or raise `PointPeftError`."""
        path = quoted(str(self.path))
        if self.path.exists() and not self.path.is_dir():
            raise PointPeftError(f"the run folder {path} is a file: name another")
        record = self.record
        if record is None:
            if self.path.exists() and any(self.path.iterdir()):
                raise PointPeftError(f"the run folder {path} is not empty and holds no run: name another")
            return "begin"
        if not resume:
            how = (
                "a finished run:" if record["finished"] else "an unfinished run: go on with --resume (resume=True), or"
            )
            raise PointPeftError(f"{path} holds {how} name another folder")
        if record["finished"]:
            return "end"
        return "resume" if (self.path / CHECKPOINT_FILE).exists() else "begin"

    def begin(self, recipe: Recipe, about: Mapping[str, Any]) -> None:
        """Make the folder, with what the run is told, at once or not at all."""
        if not self.writes:
            return
        files = {RECIPE_FILE: recipe.to_yaml(), METRICS_FILE: "", RUN_FILE: _record_text({**about, "finished": False})}
        if self.record is not None:  # one that was interrupted before its first checkpoint
            for name, text in files.items():
                write_file(self.path / name, text)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, text in files.items():
            (temporary / name).write_text(text, "utf-8")
        if self.path.exists():
            self.path.rmdir()  # it is empty
        os.replace(temporary, self.path)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write `run.json`."""
        if self.writes:
            write_file(self.path / RUN_FILE, _record_text(record))

    def log(self, **values: float) -> None:
        """Append a line to the metrics."""
        if self.writes:
            with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """The lines of the metrics; a last one that was cut off by a crash does not count."""
        lines = (self.path / METRICS_FILE).read_text("utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def epochs(self) -> list[dict[str, float]]:
        """The lines of whole epochs."""
        return [line for line in self.metrics() if "epoch" in line]

    def checkpoint(self, place: Position, parts: Mapping[str, Any]) -> None:
        """Write the state of the training."""
        if self.writes:
            write_checkpoint(self.path / CHECKPOINT_FILE, place, parts, self.identity)

    def resume(self) -> tuple[Position, dict[str, Any]]:
        """The state of the training; what the metrics say of later steps is taken back."""
        place, parts = read_checkpoint(self.path / CHECKPOINT_FILE, self.identity)
        if self.writes:
            kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= place.step]
            write_file(self.path / METRICS_FILE, "".join(kept))
        return place, parts

    def finish(self, record: Mapping[str, Any]) -> None:
        """Say that the run is at its end, and drop what only a resumed one needs."""
        self.write_record({**record, "finished": True})
        if self.writes:
            (self.path / CHECKPOINT_FILE).unlink(missing_ok=True)


def _record_text(record: Mapping[str, Any]) -> str:
    versions = {"format_version": FORMAT_VERSION, "point_peft_version": __version__}
    return json.dumps({**versions, **record}, indent=2, ensure_ascii=False) + "\n"


def read_record(folder: Path) -> dict[str, Any]:
    """The contents of a run's `run.json`; raises `PointPeftError` where the folder holds no run."""
    path = folder / RUN_FILE
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PointPeftError(f"{quoted(str(folder))} holds no run: '{RUN_FILE}' cannot be read") from error
    except ValueError as error:
        raise PointPeftError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise PointPeftError(f"'{path}' is not of this version of point_peft")
    if not isinstance(record.get("finished"), bool):
        raise PointPeftError(f"'{path}' does not say if the run is finished: it is not as point_peft wrote it")
    return record
