"""The answers in HTML: each task has its part of it, of which the page shows one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import numpy as np
import numpy.typing as npt

from point_peft.demo.answer import Answer, Refusal
from point_peft.demo.board import Answers
from point_peft.demo.views import class_colour

SHOWN_CLASSES = 10
THUMBNAIL = 64
"""Side of a picture of a cloud, in its own units."""


def alert(sentence: str) -> str:
    """One sentence that cannot be overlooked; nothing for none."""
    return f'<div class="pp-alert" role="alert">{escape(sentence)}</div>' if sentence else ""


def note(sentences: Iterable[str]) -> str:
    """Sentences that are told beside the rest; nothing for none."""
    said = " ".join(map(escape, sentences))
    return f'<p class="pp-note" role="status">{said}</p>' if said else ""


def caption(html: str, side: str) -> str:
    """The key to the colours of a cloud."""
    return f'<p class="pp-caption" data-caption="{side}">{html}</p>'


def answer_panels(answers: Answers, side: str, task: str) -> str:
    """The class and the probabilities that each task gives, of which one is shown."""
    return "".join(
        f'<section class="pp-panel" data-side="{side}" data-task="{escape(name)}" {_hidden(name, task)}'
        f'aria-label="Answer of {escape(name)}">{_answer(answer)}</section>'
        for name, answer in answers.of.items()
    )


def _answer(answer: Answer | Refusal) -> str:
    if isinstance(answer, Refusal):
        head = f'<h2><span class="pp-says">{escape(answer.task.name)} gives for this cloud</span> no answer</h2>'
        return f'{head}<p class="pp-small">{escape(answer.why)}</p>'
    best = escape(answer.task.classes[answer.best])
    share = _percent(float(answer.shares[answer.best]))
    what = "the cloud is" if answer.labels is None else "most points are"
    said = f'{best} <span class="pp-share">{share}</span>'
    agreement = (
        "" if answer.agreement is None else f"{_percent(answer.agreement)} of these points as the file labels them."
    )
    notes = " ".join(filter(None, [escape(answer.task.said), agreement, answer.part]))
    about = f'<p class="pp-small">{notes}</p>' if notes else ""
    name = escape(answer.task.name)
    return f'<h2><span class="pp-says">{name} says {what}</span> {said}</h2>{about}{_bars(answer)}'


def _bars(answer: Answer) -> str:
    count = len(answer.task.classes)
    order = range(count) if count <= SHOWN_CLASSES else answer.shares.argsort(descending=True)[:SHOWN_CLASSES].tolist()
    rows = []
    for number in order:
        share = float(answer.shares[number])
        best = " pp-best" if number == answer.best else ""
        colour = "" if answer.labels is None else f";background:{class_colour(number)}"
        rows.append(
            f'<tr class="{best.strip()}"><th scope="row">{escape(answer.task.classes[number])}</th>'
            f'<td class="pp-bar"><i style="width:{100 * share:.1f}%{colour}"></i></td>'
            f'<td class="pp-number">{_percent(share)}</td></tr>'
        )
    what = "share of the points" if answer.labels is not None else "probability"
    head = f'<tr><th scope="col">class</th><th scope="col" colspan="2">{what}</th></tr>'
    left = f'<p class="pp-small">{count - SHOWN_CLASSES} more classes</p>' if count > SHOWN_CLASSES else ""
    return f'<table class="pp-bars"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>{left}'


def near_panels(answers: Answers, task: str) -> str:
    """The training clouds by which each task answers, of which one task's are shown."""
    return "".join(
        f'<section class="pp-panel pp-near" data-side="a" data-task="{escape(name)}" {_hidden(name, task)}'
        f'aria-label="Nearest training clouds of {escape(name)}">{_near(answer)}</section>'
        for name, answer in answers.of.items()
    )


def _near(answer: Answer | Refusal) -> str:
    name, clouds = escape(answer.task.name), answer.task.clouds
    head = f"<h2>Why {name} answers so</h2>"
    if isinstance(answer, Refusal):
        return f'{head}<p class="pp-small">{name} gives no answer for this cloud.</p>'
    if not answer.near:
        why = "has no memory bank: it looks no training clouds up"
        if answer.task.has_bank:
            why = "looks training clouds up for each piece of a scene"
        return f'{head}<p class="pp-small">{name} {why}.</p>'
    said = "The rows of its memory bank most like this cloud; its prompts are made of them."
    cards = []
    for place, own in enumerate(answer.near, start=1):
        likeness = f'<span class="pp-small">likeness {own.likeness:.2f}</span>'
        if clouds is None:
            cards.append(f"<li><b>row {own.row}</b>{likeness}</li>")
            continue
        label = escape(answer.task.classes[int(clouds.labels[own.row])])
        drawing = thumbnail(clouds.points[own.row], f"training cloud {place}, {label}")
        cards.append(f"<li>{drawing}<b>{label}</b>{likeness}</li>")
    return f'{head}<p class="pp-small">{said}</p><ol class="pp-clouds">{"".join(cards)}</ol>'


def thumbnail(points: npt.NDArray[np.float32], label: str) -> str:
    """A small picture of a cloud (n, 3) seen from the side that shows most of it: along the axis that is shortest."""
    spans = np.ptp(points, axis=0)
    across, up = (0, 1) if spans.argmin() == 2 else (0, 2) if spans.argmin() == 1 else (1, 2)
    flat = points[:, [across, up]]
    centred = flat - (flat.max(axis=0) + flat.min(axis=0)) / 2
    length = max(float(np.abs(centred).max()), 1e-9)
    places = THUMBNAIL / 2 + centred / length * (THUMBNAIL / 2 - 4) * np.array([1, -1])
    # Lines of no length with round ends are dots, all of them in one element.
    dots = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in places.tolist())
    return (
        f'<svg viewBox="0 0 {THUMBNAIL} {THUMBNAIL}" role="img" aria-label="{escape(label)}">'
        f'<path d="{dots}" fill="none" stroke="var(--pp-bar)" stroke-width="2.4" stroke-linecap="round"/></svg>'
    )


def tasks_table(answers: Answers) -> str:
    """All tasks with their answers and times."""
    models: list[int] = []
    rows = []
    for name, answer in answers.of.items():
        if id(answer.task.model) not in models:
            models.append(id(answer.task.model))
        place = models.index(id(answer.task.model))
        said, share, took = "none", "", ""
        if isinstance(answer, Answer):
            said, share = escape(answer.task.classes[answer.best]), _percent(answer.sure)
            took = _milliseconds(answer.seconds)
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td>{said}</td><td class="pp-number">{share}</td>'
            f'<td class="pp-number">{took}</td><td>{"ABCDEFGHIJ"[place % 10]}</td></tr>'
        )
    head = "".join(
        f'<th scope="col"{kind}>{what}</th>'
        for what, kind in (
            ("task", ""),
            ("answer", ""),
            ("probability", ' class="pp-number"'),
            ("forward", ' class="pp-number"'),
            ("backbone", ""),
        )
    )
    swap = "" if answers.swap is None else f" Making another adapter active takes {1e6 * answers.swap:.0f} µs."
    said = (
        f"{len(answers.of)} tasks on {len(models)} backbones in {_milliseconds(answers.seconds)}, with all that is "
        f"shown here.{swap}"
    )
    return (
        f'<section aria-label="All tasks"><h2>All tasks at once</h2><p class="pp-small">{said}</p>'
        f'<table class="pp-tasks"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></section>'
    )


def comparison(first: Answer | Refusal, second: Answer | Refusal) -> str:
    """One line that says where two answers differ."""
    a, b = (escape(own.task.name) for own in (first, second))
    if first.task.name == second.task.name:
        return '<p class="pp-compare">These are the same adapter: choose another to compare it with.</p>'
    if isinstance(first, Refusal) or isinstance(second, Refusal):
        return f'<p class="pp-compare">{a} and {b} do not both answer for this cloud.</p>'
    if first.task.classes != second.task.classes or first.task.segmentation != second.task.segmentation:
        return f'<p class="pp-compare">{a} and {b} answer different questions about the same cloud.</p>'
    if first.labels is not None and second.labels is not None:
        return _compared_points(first, second, a, b)
    ours, theirs = (escape(own.task.classes[own.best]) for own in (first, second))
    gap = (first.shares - second.shares).abs()
    most = int(gap.argmax())
    which, by = escape(first.task.classes[most]), f"{100 * float(gap[most]):.0f} points"
    where = f"their probabilities differ most for {which}, by {by}"
    if ours == theirs:
        return f'<p class="pp-compare">{a} and {b} agree on {ours}; {where}.</p>'
    return f'<p class="pp-compare"><b>They differ:</b> {a} says {ours}, {b} says {theirs}; {where}.</p>'


def _compared_points(first: Answer, second: Answer, a: str, b: str) -> str:
    assert first.labels is not None and second.labels is not None
    if len(first.labels) != len(second.labels):
        return f'<p class="pp-compare">{a} and {b} answer for different points of the cloud.</p>'
    share = _percent(float((first.labels != second.labels).mean()))
    return f'<p class="pp-compare">{a} and {b} differ at {share} of the points.</p>'


def _hidden(name: str, task: str) -> str:
    return "" if name == task else "hidden "


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
