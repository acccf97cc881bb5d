"""The page's doings, without the page: from what is chosen to what then stands in each of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from point_peft.demo import markup
from point_peft.demo.answer import Answer, Refusal
from point_peft.demo.board import Answers, Board
from point_peft.demo.figure import figure_of
from point_peft.demo.picture import picture_of
from point_peft.demo.views import view_of
from point_peft.errors import DataError, PointPeftError
from point_peft.training.folder import write_file

FIRST = "radar walk"
"""The sample that the page begins with."""
NOTHING = "-"
"""The choice of no adapter to compare with, which is no name of one."""
PICTURE_FILE = "out.png"
Update = dict[str, dict[str, Any]]
"""Part of the page -> its properties, as far as they change."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The choices on the page."""

    cloud: str
    """The name of a sample, or of the file that was uploaded."""
    uploaded: str
    """The path of that file; empty: none was."""
    task: str
    other: str
    view: str
    turn: float
    tilt: float


class Handling:
    """Answers what happens on the page. A bad file or adapter gives one sentence and changes nothing else."""

    def __init__(self, board: Board, samples: Mapping[str, Path], folder: Path) -> None:
        self.board = board
        self.samples = samples
        self.folder = folder
        """Where pictures are written."""

    def begin(self) -> Chosen:
        """The choices that the page begins with."""
        first = Chosen(
            cloud=FIRST, uploaded="", task=self.board.names[0], other=NOTHING, view="attention", turn=0, tilt=0
        )
        return self._facing(first)

    def choose(self, chosen: Chosen) -> Update:
        """Another cloud; for a sample, also the adapter that it is a sample of, and a view that this one has."""

        def found() -> Update:
            task = self._meant(chosen)
            segmentation = self.answers(chosen).of[task].task.segmentation
            view = "label" if segmentation else "attention" if chosen.view == "label" else chosen.view
            return self.whole(self._facing(replace(chosen, task=task, view=view)))

        return self._tried(found)

    def compare(self, chosen: Chosen) -> Update:
        """Another adapter beside the first, or none; the camera stays."""
        return self._tried(lambda: self.whole(chosen))

    def upload(self, path: str, chosen: Chosen) -> Update:
        """A cloud of the user's."""
        own = replace(chosen, cloud=self._free(Path(path).name), uploaded=path)

        def found() -> Update:
            whole = self.whole(self._facing(own))
            return {**whole, "uploaded": {"value": path}, "cloud": {"choices": self.clouds(own), "value": own.cloud}}

        return self._tried(found)

    def load(self, source: str, chosen: Chosen) -> Update:
        """An adapter of a folder or of the Hub."""

        def found() -> Update:
            if not source.strip():
                raise DataError("name a folder that holds an adapter or a run, or a repository of the Hub, owner/name")
            task = self.board.add(source.strip())
            own = replace(chosen, task=task.name)
            names = self.board.names
            choices: Update = {
                "adapter": {"choices": names, "value": own.task},
                "other": {"choices": others(names), "value": own.other},
            }
            return {**self.whole(own, [f"{task.name} is loaded."]), **choices, "source": {"value": ""}}

        return self._tried(found)

    def swap(self, chosen: Chosen) -> Update:
        """Another adapter shown: all but the comparison is in the page already."""
        return self._tried(lambda: self._comparison(self.answers(chosen), chosen))

    def write(self, chosen: Chosen) -> Update:
        """The answer as a picture, in a file."""

        def written() -> Update:
            answers = self.answers(chosen)
            names = dict.fromkeys([chosen.task, *([chosen.other] if chosen.other != NOTHING else [])])
            own = [answer for name in names if isinstance(answer := answers.of[name], Answer)]
            if not own:
                raise DataError(f"{chosen.task} gives no answer for this cloud: choose another adapter")
            path = self.folder / PICTURE_FILE
            try:
                write_file(path, picture_of(answers.shown.name, own, chosen.view, chosen.turn, chosen.tilt))
            except OSError as error:
                raise DataError(f"{path} cannot be written: {error}") from error
            said = f"Written: {path}"
            return {"download": {"value": str(path), "visible": True}, "note": hidden(markup.note([said]))}

        return self._tried(written)

    def whole(self, chosen: Chosen, said: Iterable[str] = ()) -> Update:
        """Everything that depends on the cloud and the tasks; raises `PointPeftError` for a bad cloud."""
        answers = self.answers(chosen)
        turn, tilt = chosen.turn, chosen.tilt
        # Whatever has been chosen in the meantime, the page shows what belongs together.
        kept = {"cloud": chosen.cloud, "adapter": chosen.task, "other": chosen.other, "view": chosen.view}
        return {
            "plot_a": {"value": figure_of(answers, chosen.task, chosen.view, turn, tilt)},
            "caption_a": {"value": markup.caption(view_of(answers.of[chosen.task], chosen.view).caption, "a")},
            "answer_a": {"value": markup.answer_panels(answers, "a", chosen.task)},
            "near": {"value": markup.near_panels(answers, chosen.task)},
            "tasks": {"value": markup.tasks_table(answers)},
            "note": hidden(markup.note([*said, *answers.notes])),
            **{name: {"value": value} for name, value in kept.items()},
            "turn": {"value": turn},
            "tilt": {"value": tilt},
            **self._beside(answers, chosen),
        }

    def _beside(self, answers: Answers, chosen: Chosen) -> Update:
        """The second cloud with its answer, where there is one to compare with."""
        if chosen.other == NOTHING:
            return {"side_b": {"visible": False}, **self._comparison(answers, chosen)}
        other, view = chosen.other, chosen.view
        return {
            "side_b": {"visible": True},
            "plot_b": {"value": figure_of(answers, other, view, chosen.turn, chosen.tilt)},
            "caption_b": {"value": markup.caption(view_of(answers.of[other], view).caption, "b")},
            "answer_b": {"value": markup.answer_panels(answers, "b", other)},
            **self._comparison(answers, chosen),
        }

    def _comparison(self, answers: Answers, chosen: Chosen) -> Update:
        if chosen.other == NOTHING:
            return {"compared": hidden("")}
        return {"compared": hidden(markup.comparison(answers.of[chosen.task], answers.of[chosen.other]))}

    def answers(self, chosen: Chosen) -> Answers:
        """The answers of all tasks for the chosen cloud."""
        path = self.samples[chosen.cloud] if chosen.cloud in self.samples else Path(chosen.uploaded)
        return self.board.answers(path)

    def clouds(self, chosen: Chosen) -> list[str]:
        """The names of the clouds that can be chosen."""
        return [*self.samples, *([chosen.cloud] if chosen.cloud not in self.samples else [])]

    def _meant(self, chosen: Chosen) -> str:
        """The task that a sample is of, by the first word of its name; of other clouds, the one that is chosen."""
        if chosen.cloud not in self.samples:
            return chosen.task
        first = chosen.cloud.split(" ")[0]
        return next((name for name in self.board.names if name.startswith(first)), chosen.task)

    def _free(self, name: str) -> str:
        return f"{name} (uploaded)" if name in self.samples else name

    def _facing(self, chosen: Chosen) -> Chosen:
        """The same, with the camera where it sees most of the cloud: above what is flat, else in front of it."""
        turn, tilt = facing(self.answers(chosen).of[chosen.task])
        return replace(chosen, turn=turn, tilt=tilt)

    def _tried(self, make: Any) -> Update:
        try:
            update: Update = make()
        except PointPeftError as error:
            return {"alert": hidden(markup.alert(" ".join(str(error).split())))}
        return {"alert": hidden(""), **update}


def hidden(html: str) -> dict[str, Any]:
    """The properties of a part that is not there as long as it says nothing."""
    return {"value": html, "visible": bool(html)}


def facing(answer: Answer | Refusal) -> tuple[float, float]:
    """Angles (turn, tilt) of a camera that sees most of a cloud; of a scene, from above and aside."""
    if answer.task.segmentation:
        return -60.0, 45.0
    across, deep, high = np.ptp(answer.points, axis=0).tolist()
    return (-80.0, 65.0) if high < 0.6 * max(across, deep) else (-60.0, 20.0)


def others(names: Iterable[str]) -> list[tuple[str, str]]:
    """The choices of what to compare with: (label, name)."""
    return [("nothing", NOTHING), *((name, name) for name in names)]
