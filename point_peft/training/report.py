"""The end of a run: trained values, pictures, figures and a model card go into its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from point_peft.adapting.adapter import Adapter, get_adapter
from point_peft.adapting.adding import backbone_for
from point_peft.data.preparing import Preparation
from point_peft.errors import PointPeftError
from point_peft.files.format import CARD_FILE, Card, read_folder
from point_peft.files.saving import save_adapters
from point_peft.files.tensors import copy_tensors, unshared
from point_peft.hub.card import card_of, markdown
from point_peft.schema import from_json
from point_peft.training import pictures
from point_peft.training.folder import (
    CONFUSION_FILE,
    CURVES_FILE,
    MODEL_FILE,
    PICTURES,
    RECIPE_FILE,
    SAMPLES_FILE,
    write_file,
)
from point_peft.training.inference import Inference
from point_peft.training.loop import Loop
from point_peft.training.objective import class_report, monitored
from point_peft.training.pictures import Shown
from point_peft.training.progress import in_unit, in_words
from point_peft.training.state import adapters_of, snapshot, unsharded, write_values

SHOWN_CLOUDS, SHOWN_SCENES = 12, 3
SECTION = "## Training"


def finish(
    loop: Loop, classes: Sequence[str], evaluated: Mapping[str, Dataset[Any]], about: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Measure, draw and save the end of a training; returns what `run.json` says and the results by split."""
    results: dict[str, dict[str, float]] = {}
    counts = {}
    for split, clouds in evaluated.items():
        results[split], counts[split] = loop.inference.measure(clouds)
    last = list(evaluated)[-1] if evaluated else None
    shown = shown_clouds(loop.inference, evaluated[last]) if last else []
    record = {
        "task": loop.recipe.task,
        "classes": list(classes),
        **about,
        "best_epoch": loop.place.best_epoch or loop.place.step // loop.per_epoch,
        "epochs": loop.place.step // loop.per_epoch,
        "processes": loop.ranks,
        "results": results,
    }
    with unsharded(loop.model):
        if loop.folder.writes:
            if last:
                _draw(loop.folder.path, counts[last], shown, classes, last)
            measure = monitored(loop.inference.segmentation)
            write_file(loop.folder.path / CURVES_FILE, pictures.curves(loop.folder.epochs(), measure))
            _save(loop, record, class_report(counts[last], classes) if last else [])
    for split, own in results.items():
        loop.progress.say(f"{split}: {in_words(own)}")
    loop.progress.say(f"the run is in {loop.folder.path}")
    return record, results


def shown_clouds(inference: Inference, clouds: Dataset[Any]) -> list[Shown]:
    """Clouds of a data set, evenly spread over it, with what the model makes of them."""
    sized: Any = clouds
    most = SHOWN_SCENES if inference.segmentation else SHOWN_CLOUDS
    places = torch.linspace(0, len(sized) - 1, min(len(sized), most)).round().long().tolist()
    found = []
    for place in places:
        ((labels, scores),) = inference.predicted(clouds, [[place]])
        points = _coordinates(inference.feed.batch([clouds[place]]))
        predicted = scores.argmax(dim=1).cpu()
        labels = labels.cpu().reshape(-1)
        if points is None or (inference.segmentation and len(points) != len(labels)):
            return []  # packed or otherwise not one cloud (1, n, c): there is nothing to draw it from
        whole = not inference.segmentation
        found.append(Shown(points, labels[0] if whole else labels, predicted[0] if whole else predicted))
    return found


def _coordinates(batch: Any) -> Tensor | None:
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    if isinstance(first, Tensor) and first.ndim == 3 and first.shape[2] >= 3:
        return first[0, :, :3].float().cpu()
    return None


def _draw(folder: Path, counts: Tensor, shown: Sequence[Shown], classes: Sequence[str], split: str) -> None:
    write_file(folder / CONFUSION_FILE, pictures.confusions(counts, classes, f"{split}: {int(counts.sum()):,} labels"))
    if shown:
        write_file(folder / SAMPLES_FILE, pictures.samples(shown, classes, f"{split}: what the model sees"))


def _save(loop: Loop, record: Mapping[str, Any], report: Sequence[tuple[str, int, float]]) -> None:
    folder, held = loop.folder, adapters_of(loop.model)
    section = "\n".join(_section(loop, record, report))
    if held is None:
        # Only what was trained: a head alone is not written with the backbone that it stands on.
        tensors = {name: value.contiguous() for name, value in snapshot(loop.model).items()}
        write_file(folder.path / MODEL_FILE, safetensors.torch.save(unshared(tensors), metadata={"format": "pt"}))
        kind = type(loop.model).__name__
        write_file(folder.path / CARD_FILE, f"# {kind}, trained with point_peft\n\n{section}")
        return
    names = held.active_adapters
    results = {
        _named(record, split): {name: round(value, 2) for name, value in own.items() if name != "loss"}
        for split, own in record["results"].items()
    }
    said = {"results": results, "tags": (record["task"],)}
    adapters = {name: get_adapter(held, name) for name in names}
    card = partial(_card, partial(card_of, held.base_model, said), section)
    save_adapters(folder.path, adapters, backbone_for(held), "auto", card)


def _card(card: Callable[[Adapter], Card], section: str, adapter: Adapter) -> Card:
    """The card of an adapter with the run's section behind what is said of the adapter."""
    own = card(adapter)

    def over(existing: str | None, size: int) -> str:
        text = own(existing, size)
        kept = text if SECTION not in text else text[: text.index(SECTION)].rstrip("\n") + "\n"
        return f"{kept}\n{section}"

    return over


def _named(record: Mapping[str, Any], split: str) -> str:
    """A split with the name of its data, such as "mars (test)", where that is known."""
    return f"{record['name']} ({split})" if "name" in record else split


def _section(loop: Loop, record: Mapping[str, Any], report: Sequence[tuple[str, int, float]]) -> Iterator[str]:
    yield from (SECTION, "")
    epochs = f"{record['epochs']} of {loop.recipe.epochs} epochs"
    chosen = "the best on validation" if loop.place.best is not None else "the last"
    data = f" of {markdown(record['name'])}" if "name" in record else ""
    yield f"{record['task'].capitalize()} of {loop.count:,} training clouds{data} in {len(record['classes'])} classes;"
    yield f"{epochs}, of which epoch {record['best_epoch']} is kept, {chosen}."
    yield f"Everything that was chosen is in `{RECIPE_FILE}`."
    yield from ("", f"The classes, from 0 on: {', '.join(map(markdown, record['classes']))}.")
    if "data" in record:
        preparation = from_json(record["data"]["options"]["preparation"], Preparation)
        yield from ("", "Clouds go in as `point_peft.data.preparing.prepare` makes them with", "")
        yield from ("```python", repr(preparation), "```")
    if record["results"]:
        names = list(next(iter(record["results"].values())))
        yield from ("", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|")
        for split, own in record["results"].items():
            yield f"| {markdown(_named(record, split))} | {' | '.join(in_unit(name, own[name]) for name in names)} |"
    if report:
        last = _named(record, list(record["results"])[-1])
        yield from ("", f"The classes of {markdown(last)}:", "", "| class | labels | right |", "|---|---|---|")
        yield from (f"| {markdown(name)} | {count:,} | {share:.1f} % |" for name, count, share in report)
    for name, what in PICTURES.items():
        if (loop.folder.path / name).exists():
            yield from ("", f"![{what}]({name})")
    yield ""


def load_values(model: nn.Module, folder: Path) -> None:
    """Give a model, built as that of a run, the values that the run left.

    Raises `PointPeftError` if they do not fit.
    """
    held = adapters_of(model)
    if held is not None:
        names = held.active_adapters
        for name in names:
            place = folder if len(names) == 1 or name == "default" else folder / name
            _make_room(get_adapter(held, name), place)
            held.swap_adapter_(place, name)
        return
    try:
        tensors = safetensors.torch.load_file(folder / MODEL_FILE)
    except (OSError, SafetensorError) as error:
        raise PointPeftError(f"'{folder / MODEL_FILE}' cannot be read: {error}") from error
    own = model.state_dict()
    wrong = [name for name, value in tensors.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        raise PointPeftError(f"'{folder / MODEL_FILE}' is of another model: this one has no such tensor {wrong[0]!r}")
    write_values(model, tensors)


def _make_room(adapter: Adapter, folder: Path) -> None:
    """Make the memory banks of an adapter as long as those of a folder's, whose rows they are about to get."""
    rows, there = read_folder(folder).tensors, adapter.tensors()
    longer = {
        name: rows[name]
        for name in adapter.free_rows() & rows.keys()
        if rows[name].shape[1:] == there[name].shape[1:] and len(rows[name]) != len(there[name])
    }
    for name, value in longer.items():
        copy_tensors({name: value}, adapter, there, there[name].device, {name: there[name].dtype})
