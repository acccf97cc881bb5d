"""The page: what the program writes stands between two marks, what people write around them stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.accuracy import tables
from benchmarks.accuracy.jobs import FEW_SHOT, PEOPLE_OUT, SETS, TRANSFER
from benchmarks.accuracy.measuring import SEVERITIES
from benchmarks.accuracy.picture import draw
from benchmarks.accuracy.results import Results
from benchmarks.accuracy.sets import SHOTS
from benchmarks.marked import write_between
from point_peft.training.calibration import BINS

NAME = "accuracy"
BEGIN = "<!-- from here on written by `python -m benchmarks.accuracy page` -->"
END = "<!-- up to here -->"
FRESH = f"""# Accuracy

## Which method to take

(Five sentences, written by hand: the program keeps what stands outside its marks.)

{BEGIN}
{END}
"""
HOW = """A value is the mean ± standard deviation over the seeds, in percent of the test clouds. A seed draws
the training clouds, the head, the adapter and the order of the batches, the same for everything that is
compared. The last epoch counts; the test clouds are not used before. Each entry has one learning rate, the best on
the validation clouds of all sets with seed 0. A difference is in
points, with the interval that holds 95 % of 4,000 paired bootstrap draws, of seeds and of test clouds; it is
called better or worse only where the interval excludes zero. It holds for these sets, this backbone and this
recipe. CONVERGED_PROBE is logistic regression by L-BFGS on the standardised frozen features that the head
reads, its C chosen on validation; RETRIEVAL weighs the classes of the training clouds by softmax(20 cos) of
these features and trains nothing. METHOD:field=value is a variant; PPT and POINT_LORA group a cloud further times,
here as finely as this backbone does, as their authors did with theirs."""
COLUMNS = """Trained: parameters without the head. File: with the head, and with the bank where there is one.
Time: that of a few training steps, of those of full fine-tuning. Memory: the most that tensors of a step
take at once."""

PICTURE = f"""![accuracy over parameters and over time]({NAME}.png)

Means over the seeds, with the least and the greatest of them; a grey line joins what nothing cheaper beats.
Variants of an entry are in the tables alone."""


def write(results: Results, folder: Path, stale: int = 0) -> Path:
    """Write page, record and picture into a folder; text outside the marks of a page that is there is kept."""
    path = folder / f"{NAME}.md"
    if not path.exists():
        path.write_text(FRESH, "utf-8")
    write_between(path, BEGIN, END, lines(results, stale))
    (folder / f"{NAME}.json").write_text(results.to_json(), "utf-8")
    if results.tasks(SETS):
        draw(results, folder / f"{NAME}.png")
    return path


def lines(results: Results, stale: int) -> Iterator[str]:
    """What stands between the marks."""
    protocol = results.about["protocol"]
    recipe = protocol["recipe"]
    yield from (HOW, "")
    yield (
        f"- training: {recipe['epochs']} epochs of at most {protocol['train_clouds']} clouds, batches of "
        f"{recipe['batch_size']}, augmentation {', '.join(recipe['augment']) or 'none'} "
        f"({protocol['views']} versions of each cloud, which the epochs go round), label smoothing "
        f"{recipe['label_smoothing']}, AdamW with a cosine, weight decay {recipe['weight_decay']}"
    )
    yield f"- validation: at most {protocol['val_clouds']} clouds, test: at most {protocol['test_clouds']} (0: all)"
    tokens = protocol["groups"] or "its own number of"
    yield f"- backbone: {protocol['backbone']}, {tokens} tokens, tensors `{protocol['weights']}`"
    if stale:
        yield f"- {stale} runs are left out, as their method's defaults were others"
    yield from ("", "Made by", "", "```sh", *results.about["commands"], "```")
    for task in results.tasks(SETS):
        yield from ("", f"## {task}", "", _clouds(results, task), "", *tables.of_set(results, task))
    if results.tasks(SETS):
        yield from ("", COLUMNS)
        yield from ("", PICTURE)
    yield from _chapters(results)


def _clouds(results: Results, task: str) -> str:
    runs = [run for own in results.of(SETS, task).values() for run in own.values()]
    train, val, test = runs[0]["clouds"]
    seeds = sorted({run["seed"] for run in runs})
    return f"{train} training, {val} validation and {test} test clouds; seeds {', '.join(map(str, seeds))}."


def _chapters(results: Results) -> Iterator[str]:
    severities, protocol = ", ".join(map(str, SEVERITIES)), results.about["protocol"]
    for method, found in tables.variants(results).items():
        yield from ("", f"## {method} and its variants", "", *found)
    if results.tasks(FEW_SHOT):
        text = f"{SHOTS} training clouds of each class, no validation, the last epoch; a seed is an episode."
        yield from ("", "## Few-shot", "", text, "", *tables.few_shot(results))
    if results.tasks(PEOPLE_OUT):
        text = "Mars, tested on one person, validated on the next one, trained on the other two."
        yield from ("", "## One person left out", "", text, "", *tables.people(results))
    if results.tasks(TRANSFER):
        text = (
            "A model of the tables above, trained on one radar, is frozen; a converged probe learns the other radar "
            f"from its features, {SHOTS} clouds of each class. CONVERGED_PROBE: the backbone's features as they are."
        )
        yield from ("", "## From one radar to the other", "", text, "", *tables.transfer(results))
    for task in results.tasks(SETS):
        found = tables.robustness(results, task)
        if found:
            text = f"Accuracy on corrupted test clouds, severities {severities} of five (`point_peft.data.corrupting`)."
            yield from ("", f"## Robustness: {task}", "", text, "", *found)
    if results.tasks(SETS):
        text = f"Expected calibration error in points, {BINS} bins; less is better."
        yield from ("", "## Calibration", "", text, "", *tables.calibration(results))
        text = (
            f"Accuracy on {protocol['curve_clouds']} validation clouds in the last quarter of the epochs "
            "less that in the quarter before, in points."
        )
        yield from ("", "## Is the training at its end?", "", text, "", *tables.flatness(results))
    if results.rates:
        epochs = protocol["rate_epochs"] or protocol["recipe"]["epochs"]
        text = (
            f"Accuracy on validation after {epochs} epochs with seed 0; the chosen rate is bold."
            " Where the best was on the edge of the grid, more was tried; ! says that it still is."
        )
        yield from ("", "## Learning rates that were tried", "", text, "", *tables.rates(results))
