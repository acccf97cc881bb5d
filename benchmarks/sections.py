"""What the benchmark measures, a function a section."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.bases import PUBLISHED, QUICK_PUBLISHED, QUICK_REFERENCE, REFERENCE, learner, torch_pointcloud_is_there
from benchmarks.beside_peft import handling, libraries
from benchmarks.clock import Learner, Timed, seconds, take_turns
from benchmarks.memory import peak_bytes
from benchmarks.results import Measure, Series, Values
from benchmarks.scene_steps import QUICK_SCENE, SCENE, SceneBench
from benchmarks.tables import LORA, PAPER, POINT_PEFT, WITH_BANK, loaded
from point_peft import PointPeftModel, describe, geometry
from point_peft.files.format import TENSOR_FILE
from point_peft.tuners.point_peft.prior import MemoryBank
from tools.methods import FULL, PLAIN, Bench, Row, adapted, heads, rows_of

GROUP = 6
"""Rows that take turns with the backbone: few, so that what is compared is measured within seconds of each other."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """On what is measured, and how often."""

    published: Bench
    reference: Bench
    scene: SceneBench
    headline: Sequence[Row]
    further: Sequence[Row]
    """The other methods: on the reference encoder only, and in half as many rounds."""
    device: torch.device
    rounds: int
    batch: int
    groups: int
    """Patches that the reference encoder makes of a cloud."""
    group_size: int
    points: Sequence[int]
    tokens: Sequence[int]
    adapters: Sequence[int]
    bank_rows: Sequence[int]

    def learner(self, row: Row | None, bench: Bench | None = None) -> Learner:
        """A row, or None for the backbone itself, on this setting's batch."""
        return learner(bench or self.reference, row, self.batch, self.device)

    @property
    def fewer_rounds(self) -> int:
        """For what has no aim."""
        return max(1, self.rounds // 2)


FULL_SETTING = partial(
    Setting,
    published=PUBLISHED,
    reference=REFERENCE,
    scene=SCENE,
    batch=4,
    groups=128,
    group_size=32,
    points=(1024, 2048, 4096, 8192, 16384),
    tokens=(64, 128, 256, 512),
    adapters=(1, 5, 20, 50),
    bank_rows=(1_000, 11_392, 100_000, 1_000_000),
)
QUICK_SETTING = partial(
    Setting,
    published=QUICK_PUBLISHED,
    reference=QUICK_REFERENCE,
    scene=QUICK_SCENE,
    batch=4,
    groups=8,
    group_size=8,
    points=(64, 128),
    tokens=(8, 16),
    adapters=(1, 3),
    bank_rows=(100, 1_000),
)


# ---- methods on a backbone -------------------------------------------------------------------------------------------


def published(setting: Setting) -> Values:
    """A published class, adapted, beside itself."""
    if not torch_pointcloud_is_there():
        print("The published class: left out (pip install torch-pointcloud torch-geometric).", file=sys.stderr)
        return {}
    times = _times("published ", setting.published, [(setting.headline, setting.rounds)], setting)
    return {**times, **_memory("published ", setting.published, setting.headline, setting)}


def reference(setting: Setting) -> Values:
    """The reference encoder with every method."""
    further = [setting.further[i : i + GROUP] for i in range(0, len(setting.further), GROUP)]
    groups = [(setting.headline, setting.rounds), *((rows, setting.fewer_rounds) for rows in further)]
    times = _times("", setting.reference, [group for group in groups if group[0]], setting)
    return {**times, **_memory("", setting.reference, [*setting.headline, *setting.further], setting)}


def _times(prefix: str, bench: Bench, groups: Sequence[tuple[Sequence[Row], int]], setting: Setting) -> Values:
    """Seconds of training and inference; each group of rows takes turns with the backbone itself."""
    training, inference = (partial(Measure, table=f"{prefix}{what}") for what in ("training", "inference"))
    full, plain = training(subject=FULL), inference(subject=PLAIN)
    every: dict[Measure, list[float]] = {full: [], plain: []}
    rows_found: dict[Measure, Series] = {}
    for rows, rounds in groups:
        frozen = setting.learner(None, bench)
        runs: dict[Measure, Timed] = {
            full: setting.learner(None, bench).training_step,
            plain: replace(frozen, model=frozen.model.requires_grad_(False)).inference,
        }
        for row in rows:
            one = setting.learner(row, bench)
            runs[training(subject=row.label)] = one.training_step
            runs[inference(subject=row.label)] = one.inference
        took = take_turns(runs, rounds, f"{prefix}{', '.join(row.label for row in rows)}")
        for measure, values in took.items():
            if measure in every:
                every[measure] += values
            else:
                beside = full if measure.table == full.table else plain
                rows_found[measure] = Series(values=values, reference=took[beside])
    return {**{measure: Series(values=values) for measure, values in every.items()}, **rows_found}


def _memory(prefix: str, bench: Bench, rows: Sequence[Row], setting: Setting) -> Values:
    """The peak of two training steps, weights included; by the second, the optimizer has its state."""

    def train(row: Row | None) -> None:
        one = setting.learner(row, bench)
        one.training_step()
        one.training_step()

    full = [float(peak_bytes(partial(train, None), setting.device))]
    measure = partial(Measure, table=f"{prefix}memory")
    found = {measure(subject=FULL): Series(values=full)}
    for row in rows:
        peak = float(peak_bytes(partial(train, row), setting.device))
        found[measure(subject=row.label)] = Series(values=[peak], reference=full)
    return found


def files(setting: Setting) -> Values:
    """What is saved: of every row with no rows in a bank, of Point-PEFT with a full one too, and the whole backbone."""
    found: dict[Measure, Series] = {}
    backbone = setting.reference.make()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def size(model: PointPeftModel) -> list[float]:
            model.save_pretrained(folder)
            return [(folder / TENSOR_FILE).stat().st_size]

        save_file(backbone.state_dict(), folder / "base.safetensors")
        whole: list[float] = [(folder / "base.safetensors").stat().st_size]
        found[Measure(table="file", subject=PLAIN)] = Series(values=whole)
        for row in (*setting.headline, *setting.further):
            model = adapted(row, backbone)
            found[Measure(table="file", subject=row.label)] = Series(values=size(model), reference=whole)
            model.unload()
            if row == POINT_PEFT:
                banked = adapted(WITH_BANK, backbone)
                setting.reference.fill(banked)
                found[Measure(table="file", subject=WITH_BANK.label)] = Series(values=size(banked), reference=whole)
                banked.unload()
    return found


# ---- scenes ----------------------------------------------------------------------------------------------------------


def scenes(setting: Setting) -> Values:
    """A training step on a scene of each method that adapts a packed encoder, and of all of it, beside LoRA's.

    A step takes seconds: a quarter of the rounds, and the memory of one step.
    """
    bench, device = setting.scene, setting.device
    methods = {LORA.method, *(row.method for row in (*setting.headline, *setting.further))}

    def train(row: Row | None) -> None:
        bench.learner(row, device).training_step()

    with bench.open():
        every: dict[str, Row | None] = {row.method: row for row in bench.rows(methods)}
        every[FULL] = None
        runs = {label: bench.learner(row, device).training_step for label, row in every.items()}
        took = take_turns(runs, max(1, setting.rounds // 4), "scenes")
        runs.clear()
        peaks = {label: [float(peak_bytes(partial(train, row), device))] for label, row in every.items()}
    found: dict[Measure, Series] = {}
    for table, values in (("scene training", took), ("scene memory", peaks)):
        for label, own in values.items():
            beside = () if label == LORA.method else values[LORA.method]
            found[Measure(table=table, subject=label)] = Series(values=own, reference=beside)
    return found


# ---- beside the package PEFT -----------------------------------------------------------------------------------------


def beside_peft(setting: Setting) -> Values:
    """The same LoRA, on the same model, handled by each library in its turn; nothing where PEFT is not installed."""
    compared = libraries()
    if not compared:
        print("Beside PEFT: left out, the package is not installed (pip install peft).", file=sys.stderr)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[tuple[str, str], Timed] = {}
        for library in compared:
            torch.manual_seed(0)
            for operation, run in handling(library, setting.learner(None), Path(folder) / library.name).items():
                runs[library.name, operation] = run
        took = take_turns(runs, setting.rounds, "beside PEFT")
    ours, theirs = (library.name for library in compared)
    return {
        Measure(table="peft", subject=operation): Series(values=values, reference=took[theirs, operation])
        for (name, operation), values in took.items()
        if name == ours
    }


# ---- scale -----------------------------------------------------------------------------------------------------------


def scale(setting: Setting) -> Values:
    """Points in a cloud, tokens of the backbone, adapters that are loaded, rows of a bank."""
    return {**_points(setting), **_tokens(setting), **_adapters(setting), **_bank_rows(setting)}


def _compared(setting: Setting) -> dict[str, Learner]:
    """What is measured at every size: the plain backbone, LoRA, and both kinds of Point-PEFT."""
    plain = {PLAIN: setting.learner(None)}
    return {**plain, **{row.label: setting.learner(row) for row in (LORA, PAPER, POINT_PEFT)}}


def _points(setting: Setting) -> Values:
    measure = partial(Measure, table="points")
    runs: dict[Measure, Timed] = {}
    learners = _compared(setting)
    for count in setting.points:
        points = replace(setting.reference, points=count).clouds(setting.batch).to(setting.device)
        for label, one in learners.items():
            runs[measure(subject=label, at=count)] = replace(one, inputs=(points,)).inference
        sample = partial(geometry.farthest_point_sample, points, setting.groups)
        centres = geometry.gather(points, sample())
        search = partial(geometry.knn, centres, points, setting.group_size)
        runs[measure(subject="farthest point sampling alone", at=count)] = partial(seconds, sample)
        runs[measure(subject="k nearest neighbours alone", at=count)] = partial(seconds, search)
    return _alone(take_turns(runs, setting.fewer_rounds, "points"))


def _tokens(setting: Setting) -> Values:
    runs: dict[Measure, Timed] = {}
    for count in setting.tokens:
        bench = replace(setting.reference, make=partial(setting.reference.make, num_group=count))
        for label, one in _compared(replace(setting, reference=bench)).items():
            runs[Measure(table="tokens", subject=label, at=count)] = one.inference
    return _alone(take_turns(runs, setting.fewer_rounds, "tokens"))


def _adapters(setting: Setting) -> Values:
    """One LoRA is active; the others, of all methods in turn, are only there."""
    others = rows_of()
    runs: dict[Measure, Timed] = {}
    for count in setting.adapters:
        one = setting.learner(LORA)
        model = one.model
        assert isinstance(model, PointPeftModel)
        for number in range(count - 1):
            row = others[number % len(others)]
            model.add_adapter(f"other_{number}", row.config, heads=heads(row, model.base_model))
        model.to(setting.device)
        runs[Measure(table="adapters", subject=loaded(count))] = one.inference
        swap = partial(seconds, partial(model.set_adapter, "default"), repeats=100)
        runs[Measure(table="swap", subject=LORA.label, at=count)] = swap
    took = take_turns(runs, 2 * setting.rounds, "adapters")  # what is looked for is a few percent
    first = took[Measure(table="adapters", subject=loaded(setting.adapters[0]))]
    return {
        measure: Series(values=values, reference=first if measure.table == "adapters" else ())
        for measure, values in took.items()
    }


def _bank_rows(setting: Setting) -> Values:
    channels = describe(setting.reference.make()).stages[-1].width
    peaks: dict[Measure, list[float]] = {}
    runs: dict[Measure, Timed] = {}
    query = torch.randn(setting.batch, channels).to(setting.device)
    for count in setting.bank_rows:
        bank = MemoryBank(
            channels, 8, "backbone", torch.float16, leave_nearest_out=False, standardised=True, temperature=20.0
        )
        bank.eval().to(setting.device)
        bank.fill(torch.randn(count, channels, dtype=torch.float16, device=setting.device))
        own = sum(buffer.nbytes for buffer in bank.buffers())
        retrieve = partial(bank.prior, query)
        runs[Measure(table="retrieval", subject="MemoryBank", at=count)] = partial(seconds, retrieve)
        peak = float(own + peak_bytes(retrieve, setting.device))
        peaks[Measure(table="retrieval memory", subject="MemoryBank", at=count)] = [peak]
    return _alone({**peaks, **take_turns(runs, setting.rounds, "bank rows")})


def _alone(took: Mapping[Measure, list[float]]) -> Values:
    return {measure: Series(values=values) for measure, values in took.items()}


# ---- mixed batches and tasks -----------------------------------------------------------------------------------------

MIXES: Mapping[str, Sequence[Row]] = {
    "three LORA, plain": (LORA, LORA, LORA),
    "LORA, both POINT_PEFT, plain": (LORA, POINT_PEFT, PAPER),
}
"""What the samples of a batch, or the tasks, go through; the plain backbone is always the last of them."""


def tasks(setting: Setting) -> Values:
    """One forward for several adapters, beside a forward for each."""
    runs: dict[tuple[str, bool], Timed] = {}
    for label, rows in MIXES.items():
        for what, (together, alone) in _mix(rows, setting).items():
            for run, is_together in ((together, True), (alone, False)):
                runs[f"{what}: {label}", is_together] = partial(_inferring, run)
    took = take_turns(runs, setting.fewer_rounds, "tasks")
    return {
        Measure(table="tasks", subject=subject): Series(values=values, reference=took[subject, False])
        for (subject, is_together), values in took.items()
        if is_together
    }


def _inferring(run: Callable[[], object]) -> float:
    with torch.no_grad():
        return seconds(run)


def _mix(rows: Sequence[Row], setting: Setting) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What serves a batch with so many adapters: in one forward, and in several."""
    torch.manual_seed(0)
    model = adapted(rows[0], setting.reference.make())
    names: list[str | None] = ["default", *(f"task_{number}" for number in range(1, len(rows))), None]
    for name, row in zip(names, rows, strict=False):
        assert name is not None
        if name != "default":
            model.add_adapter(name, row.config, heads=heads(row, model.base_model))
        setting.reference.fill(model, name)
    model.to(setting.device).eval()
    clouds = setting.reference.clouds(setting.batch).to(setting.device)
    owners = [names[sample * len(names) // setting.batch] for sample in range(setting.batch)]
    shares = {name: clouds[[owner == name for owner in owners]] for name in names}

    def each(inputs: Mapping[str | None, Tensor]) -> None:
        for name, points in inputs.items():
            with model.disable_adapter() if name is None else model.use_adapter(name):
                model(points)

    return {
        "a mixed batch": (lambda: model(clouds, adapter_names=owners), lambda: each(shares)),
        "forward_tasks": (lambda: model.forward_tasks(clouds, names), lambda: each(dict.fromkeys(names, clouds))),
    }


SECTIONS: Mapping[str, Callable[[Setting], Values]] = {
    "published": published,
    "reference": reference,
    "scenes": scenes,
    "files": files,
    "peft": beside_peft,
    "tasks": tasks,
    "scale": scale,
}
"""Name -> what measures it."""
