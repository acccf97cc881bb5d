"""The page of the benchmark, from nothing but its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.beside_peft import OURS, THEIRS
from benchmarks.results import Measure, Results
from benchmarks.sections import (
    APART,
    BLOCKS,
    EMBEDDING,
    GROUPING,
    MIXED,
    ONE_BY_ONE,
    PEAK,
    SCALES,
    TASKS,
    WITH_BANK,
    WITHOUT_BANK,
    WITHOUT_HEAD,
)
from benchmarks.targets import TARGETS
from tools.methods import FULL, INFERENCE, PLAIN, TRAINING, table

NOT_MEASURED = "Not measured in this run."


def page(results: Results, picture: str) -> str:
    """The page in Markdown; `picture` is the name of the file with the plot."""
    lines = [
        "# Speed, memory and file sizes",
        "",
        f"Made by `{results.about['command']}`; nothing here is written by hand.",
    ]
    lines += ["", *(f"- {name}: {text}" for name, text in results.about.items() if name != "command")]
    lines += ["", f"![ratios of methods, and times over sizes]({picture})"]
    for title, text, section in PARTS:
        lines += ["", f"## {title}", "", text, "", *(section(results) or [NOT_MEASURED])]
    return "\n".join(lines) + "\n"


def spelled(measure: Measure, value: float) -> str:
    """A value with its unit, in three digits."""
    if measure.unit == "bytes":
        return f"{value / 1e6:,.2f} MB" if value < 1e8 else f"{value / 1e6:,.0f} MB"
    unit, factor = next((pair for pair in UNITS if value * pair[1] >= 1), UNITS[-1])
    scaled = value * factor
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"


UNITS = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))


def _ratio(of: float | None, by: float | None) -> str:
    return "-" if of is None or by is None else f"{of / by:.2f}"


# ---- the sections ----------------------------------------------------------------------------------------------------


def _targets(results: Results) -> list[str]:
    cells = []
    for target in TARGETS:
        value = target.measured(results)
        shown, met = ("-", "not measured") if value is None else (target.spelled(value), "no")
        if value is not None and target.met(value):
            met = "yes"
        cells.append([target.text, f"{target.bound} {target.spelled(target.limit)}", shown, met])
    return table(cells, ["target", "aim", "measured", "met"])


def _methods(results: Results) -> list[str]:
    return _compared(results, "methods", "memory")


def _point_peft(results: Results) -> list[str]:
    return [*_compared(results, "point_peft"), *_parts_of_backbone(results)]


def _parts_of_backbone(results: Results) -> list[str]:
    """What the parts of the backbone take of its inference."""
    cells = []
    for subject, whole in ((m.subject, value) for m, value in results.medians("point_peft", INFERENCE).items()):
        parts = [results.median("point_peft", subject, part) for part in (GROUPING, EMBEDDING, BLOCKS)]
        if None not in parts:
            cells.append([subject, *(_percent(part, whole) for part in parts if part is not None)])
    return ["", *table(cells, ["share of inference", GROUPING, EMBEDDING, BLOCKS])] if cells else []


def _compared(results: Results, *sections: str) -> list[str]:
    """A line a method, with what it takes and how much that is of the backbone's."""
    found = [
        (quantity, {m.subject: (m, value) for m, value in medians.items()}, reference)
        for section in sections
        for quantity, reference in ((TRAINING, FULL), (INFERENCE, PLAIN), (PEAK, FULL))
        if (medians := results.medians(section, quantity))
    ]
    cells = []
    for subject in results.subjects(*sections):
        cell = [subject]
        for _, values, reference in found:
            if subject in values:
                measure, value = values[subject]
                cell += [spelled(measure, value), _ratio(value, values[reference][1])]
            else:
                cell += ["-", "-"]
        cells.append(cell)
    header = ["method", *(text for title, _, reference in found for text in (title, f"of the {reference}'s"))]
    return table(cells, header) if found else []


def _files(results: Results) -> list[str]:
    base = results.median("files", PLAIN, "file")
    with_bank = {m.subject: (m, value) for m, value in results.medians("files", WITH_BANK).items()}
    headless = {m.subject: value for m, value in results.medians("files", WITHOUT_HEAD).items()}
    cells = []
    for measure, value in results.medians("files", WITHOUT_BANK).items():
        cell = [measure.subject, _percent(headless[measure.subject], base), spelled(measure, value)]
        cell.append(_percent(value, base))
        banked = with_bank.get(measure.subject)
        cells.append([*cell, *(("-", "-") if banked is None else (spelled(*banked), _percent(banked[1], base)))])
    header = ["method", "without the head", "with it", "of the backbone's", "with a bank", "of the backbone's"]
    return table(cells, header) if cells else []


def _percent(of: float, by: float | None) -> str:
    return "-" if by is None else f"{100 * of / by:.2f} %"


def _side_by_side(section: str, first: str, second: str, header: Sequence[str]) -> Callable[[Results], list[str]]:
    """A table of two subjects, and of how many times the first's value the second's is."""

    def lines(results: Results) -> list[str]:
        theirs = {m.quantity: (m, value) for m, value in results.medians(section).items() if m.subject == second}
        cells = [
            [m.quantity, spelled(m, value), spelled(*theirs[m.quantity]), _ratio(theirs[m.quantity][1], value)]
            for m, value in results.medians(section).items()
            if m.subject == first
        ]
        return table(cells, header) if cells else []

    return lines


def _tasks(results: Results) -> list[str]:
    cells = []
    for measure, value in results.medians("tasks").items():
        alone = {MIXED: APART, TASKS: ONE_BY_ONE}.get(measure.quantity)
        if alone is not None:
            other = results.median("tasks", measure.subject, alone)
            assert other is not None
            cell = [measure.subject, measure.quantity, spelled(measure, value), alone, spelled(measure, other)]
            cells.append([*cell, _ratio(value, other)])
    return table(cells, ["adapters", "together", "", "each alone", "", "together, of alone"]) if cells else []


def _scale(results: Results) -> list[str]:
    lines: list[str] = []
    for section, title in SCALES.items():
        found = results.medians(section)
        sizes = sorted({m.at for m in found if m.at is not None})
        rows: dict[tuple[str, str], dict[int | None, str]] = {}
        for measure, value in found.items():
            rows.setdefault((measure.subject, measure.quantity), {})[measure.at] = spelled(measure, value)
        cells = [
            [f"{subject}: {what}", *(row.get(size, "-") for size in sizes)] for (subject, what), row in rows.items()
        ]
        if cells:
            lines += ["", *table(cells, [title, *(f"{size:,}" for size in sizes)])]
    return lines[1:]


PARTS: Sequence[tuple[str, str, Callable[[Results], list[str]]]] = (
    ("Targets", "Computed from the numbers of this page; the aims are for the base backbone on two cores.", _targets),
    (
        "Point-PEFT",
        "A training step is forward, backward and update by AdamW; inference is a forward in eval mode, not merged. "
        "*As published* is the same backbone with the same output, computed as Point-MAE was published: our reference "
        "backbone does less for it, in its patch embedding and its attention. These rows alone take turns, three times "
        "as often as those below, so that what is compared is measured within seconds of each other. The targets for "
        "times are of this table. They were set for a base whose inference is 57 % patch embedding, 39 % blocks and "
        "3 % grouping; the last table says what these are here, each run by itself.",
        _point_peft,
    ),
    (
        "Methods",
        "The same of every method. Both ratios are of medians, and all rows take turns in each round. Memory is the "
        "most that torch's allocator had handed out at once in two training steps of a model on its own, from its "
        "making on: weights, gradients, the optimizer's state, activations and what an operation needs for itself. It "
        "is counted, not sampled: on a CPU by `torch.profiler`, on a GPU by `torch.cuda.max_memory_allocated`.",
        _methods,
    ),
    (
        "Beside PEFT",
        "LoRA of rank 8 on the `qkv` of every block of the same backbone, without a head, in both libraries; they take "
        "turns. `get_peft_model` and `from_pretrained` get a fresh backbone each time, the others a model that has "
        "adapters. `disable_adapter` is entered and left.",
        _side_by_side("peft", OURS, THEIRS, ["", OURS, THEIRS, f"{THEIRS}'s, of {OURS}'s"]),
    ),
    (
        "Mixed batches and tasks",
        "`model(x, adapter_names=[...])` gives the samples of a batch to several adapters in equal shares; alone, each "
        "share is a batch of its own. `model.forward_tasks(x, [...])` gives every sample to all of them; alone, that "
        "takes a forward of the whole batch each.",
        _tasks,
    ),
    (
        "Scale",
        "Inference on a batch, and its parts by themselves. Of the adapters, one LoRA is active, the others, of all "
        "methods in turn, are only loaded. Retrieval is for a batch of queries.",
        _scale,
    ),
    (
        "Files",
        "The size of `adapter_model.safetensors`, without and with the tensors of the adapter's head, beside that of a "
        "safetensors file of the whole backbone.",
        _files,
    ),
)
"""Title, what is measured and how, and the lines that show it; no lines: it was not measured."""
