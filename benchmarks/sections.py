"""What the benchmark measures, a function a section."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.as_published import as_published
from benchmarks.beside_peft import Library, libraries
from benchmarks.clock import Learner, Timed, seconds, take_turns
from benchmarks.memory import peak_bytes
from benchmarks.results import Measure, Values
from point_peft import PointPeftModel, describe, geometry
from point_peft.adapting.adapter import get_adapter
from point_peft.files.format import TENSOR_FILE
from point_peft.tuners.point_peft.prior import MemoryBank
from tools.methods import BASE, FULL, INFERENCE, PLAIN, QUICK, TRAINING, Bench, Row, adapted, heads, rows_of, timed

LORA = Row(method="LORA", variant="qkv")
POINT_PEFT = Row(method="POINT_PEFT")
STEM = Row(method="POINT_PEFT", variant="prior of the stem", fields={"prior": "stem"})

PUBLISHED_PLAIN, PUBLISHED_FULL = f"{PLAIN}, as published", f"{FULL}, as published"
PEAK = "peak memory of training"
GROUPING, EMBEDDING, BLOCKS = "grouping", "patch embedding", "blocks"
WITHOUT_BANK, WITH_BANK = "adapter file", "adapter file with a bank"
WITHOUT_HEAD = "adapter file without the tensors of its head"
SAMPLING, NEIGHBOURS = "farthest point sampling", "k nearest neighbours"
RETRIEVAL, RETRIEVAL_PEAK = "retrieval", "peak memory of retrieval, bank included"
SWAP = "set_adapter"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """On what is measured, and how often."""

    bench: Bench
    rows: Sequence[Row]
    device: torch.device
    rounds: int
    batch: int
    groups: int
    """Patches that the backbone makes of a cloud."""
    group_size: int
    points: Sequence[int]
    tokens: Sequence[int]
    adapters: Sequence[int]
    bank_rows: Sequence[int]

    def learner(self, row: Row | None) -> Learner:
        """A row, or None for the backbone itself, on this setting's batch."""
        return self.bench.learner(row, self.batch, self.device)

    @property
    def published(self) -> Setting:
        """The same with the backbone in its published form."""
        return replace(self, bench=replace(self.bench, make=partial(as_published, self.bench.make)))


FULL_SETTING = partial(
    Setting,
    bench=BASE,
    batch=8,
    groups=128,
    group_size=32,
    points=(1024, 2048, 4096, 8192, 16384),
    tokens=(64, 128, 256, 512),
    adapters=(1, 5, 20, 50),
    bank_rows=(1_000, 11_392, 100_000, 1_000_000),
)
QUICK_SETTING = partial(
    Setting,
    bench=replace(QUICK, make=partial(QUICK.make, depth=2, num_group=8), points=32),
    batch=4,
    groups=8,
    group_size=8,
    points=(64, 128),
    tokens=(8, 16),
    adapters=(1, 3),
    bank_rows=(100, 1_000),
)


# ---- methods ---------------------------------------------------------------------------------------------------------


def methods(setting: Setting) -> Values:
    """A training step and inference of every row, of full fine-tuning and of the plain backbone."""
    return _turns("methods", setting, setting.rows, setting.rounds)


def point_peft(setting: Setting) -> Values:
    """The same of both kinds of Point-PEFT alone: next to what they are compared with, and more often."""
    times = _turns("point_peft", setting, (STEM, POINT_PEFT), 3 * setting.rounds)
    return {**times, **_parts_of_backbone(setting)}


def _parts_of_backbone(setting: Setting) -> Values:
    """Where the time of the plain backbone's inference goes, in both its forms."""
    runs: dict[Measure, Timed] = {}
    for label, form in ((PLAIN, setting), (PUBLISHED_PLAIN, setting.published)):
        backbone = form.bench.make().eval().to(form.device)
        clouds = form.bench.clouds(form.batch).to(form.device)
        neighborhood, _ = backbone.group_divider(clouds)
        tokens, pos = torch.randn(2, form.batch, 1 + form.groups, backbone.trans_dim, device=form.device)
        for quantity, run in {
            GROUPING: partial(backbone.group_divider, clouds),
            EMBEDDING: partial(backbone.encoder, neighborhood),
            BLOCKS: partial(backbone.blocks, tokens, pos, (backbone.depth - 1,)),
        }.items():
            runs[Measure(section="point_peft", subject=label, quantity=quantity)] = partial(_inferring, run)
    return take_turns(runs, 3 * setting.rounds, "parts")


def _turns(section: str, setting: Setting, rows: Sequence[Row], rounds: int) -> Values:
    published = setting.published.learner(None)
    runs = {
        (PUBLISHED_PLAIN, INFERENCE): published.inference,
        (PUBLISHED_FULL, TRAINING): published.training_step,
        **timed(rows, setting.bench, batch=setting.batch, device=setting.device),
    }
    took = take_turns(runs, rounds, section)
    return {Measure(section=section, subject=label, quantity=what): values for (label, what), values in took.items()}


def memory(setting: Setting) -> Values:
    """The peak of two training steps, weights included; by the second, the optimizer has its state."""

    def train(setting: Setting, row: Row | None) -> None:
        learner = setting.learner(row)
        learner.training_step()
        learner.training_step()

    runs = {PUBLISHED_FULL: partial(train, setting.published, None), FULL: partial(train, setting, None)}
    runs |= {row.label: partial(train, setting, row) for row in setting.rows}
    return {
        Measure(section="memory", subject=label, quantity=PEAK, unit="bytes"): [peak_bytes(run, setting.device)]
        for label, run in runs.items()
    }


def files(setting: Setting) -> Values:
    """What is saved: of every row without and, where it has one, with a bank, and of the backbone as a whole."""
    found: dict[Measure, list[float]] = {}
    measure = partial(Measure, section="files", unit="bytes")
    backbone = setting.bench.make()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def size(model: PointPeftModel) -> list[float]:
            model.save_pretrained(folder)
            return [(folder / TENSOR_FILE).stat().st_size]

        save_file(backbone.state_dict(), folder / "base.safetensors")
        found[measure(subject=PLAIN, quantity="file")] = [(folder / "base.safetensors").stat().st_size]
        for row in setting.rows:
            model = adapted(row, backbone)
            whole = size(model)
            found[measure(subject=row.label, quantity=WITHOUT_BANK)] = whole
            found[measure(subject=row.label, quantity=WITHOUT_HEAD)] = [whole[0] - head_bytes(model)]
            if setting.bench.fill(model):
                found[measure(subject=row.label, quantity=WITH_BANK)] = size(model)
            model.unload()
    return found


def head_bytes(model: PointPeftModel) -> int:
    """What the tensors of an adapter's own heads take."""
    heads = describe(model.base_model).heads
    own = [module for path, module in get_adapter(model, "default").own_modules() if path in heads]
    return sum(tensor.nbytes for module in own for tensor in module.state_dict().values())


# ---- beside the package PEFT -----------------------------------------------------------------------------------------


def beside_peft(setting: Setting) -> Values:
    """The same LoRA, on the same model, handled by each library in its turn; nothing where PEFT is not installed."""
    compared = libraries()
    if not compared:
        print("Beside PEFT: left out, the package is not installed (pip install peft).", file=sys.stderr)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[Measure, Timed] = {}
        for library in compared:
            for quantity, run in _handling(library, setting, Path(folder) / library.name).items():
                runs[Measure(section="peft", subject=library.name, quantity=quantity)] = run
        return take_turns(runs, setting.rounds, "beside PEFT")


def _handling(library: Library, setting: Setting, folder: Path) -> dict[str, Timed]:
    """What one does with adapters, each with a clock."""
    torch.manual_seed(0)
    backbone = setting.bench.make().to(setting.device)
    model = library.get_peft_model(copy.deepcopy(backbone), library.config)
    two = library.get_peft_model(copy.deepcopy(backbone), library.config)
    two.add_adapter("second", library.config)
    model.save_pretrained(folder / "loaded")
    learner = Learner(
        library.get_peft_model(copy.deepcopy(backbone), library.config),
        setting.bench.clouds(setting.batch).to(setting.device),
        torch.arange(setting.batch, device=setting.device),
    )

    def inject() -> float:
        fresh = copy.deepcopy(backbone)
        return seconds(lambda: library.get_peft_model(fresh, library.config))

    def load_fresh() -> float:
        fresh = copy.deepcopy(backbone)
        return seconds(lambda: library.from_pretrained(fresh, folder / "loaded"))

    def add() -> float:
        took = seconds(lambda: model.add_adapter("further", library.config))
        model.delete_adapter("further")
        return took

    def load() -> float:
        took = seconds(lambda: model.load_adapter(folder / "loaded", "further"))
        model.delete_adapter("further")
        return took

    def swap() -> None:
        two.set_adapter("second")
        two.set_adapter("default")

    def disable() -> None:
        with two.disable_adapter():
            pass

    return {
        "get_peft_model": inject,
        "from_pretrained": load_fresh,
        "add_adapter": add,
        "load_adapter": load,
        "save_pretrained": lambda: seconds(lambda: model.save_pretrained(folder / "saved")),
        SWAP: lambda: seconds(swap, repeats=20) / 2,
        "disable_adapter": lambda: seconds(disable, repeats=20),
        TRAINING: learner.training_step,
        INFERENCE: learner.inference,
    }


# ---- scale -----------------------------------------------------------------------------------------------------------


def scale(setting: Setting) -> Values:
    """Points in a cloud, tokens of the backbone, adapters that are loaded, rows of a bank."""
    return {**_points(setting), **_tokens(setting), **_adapters(setting), **_bank_rows(setting)}


def _compared(setting: Setting) -> dict[str, Learner]:
    """What is measured at every size: the plain backbone, LoRA, and both kinds of Point-PEFT."""
    plain = {PLAIN: setting.learner(None)}
    return {**plain, **{row.label: setting.learner(row) for row in (LORA, STEM, POINT_PEFT)}}


def _points(setting: Setting) -> Values:
    measure = partial(Measure, section="points")
    runs: dict[Measure, Timed] = {}
    learners = _compared(setting)
    for count in setting.points:
        points = replace(setting.bench, points=count).clouds(setting.batch).to(setting.device)
        for label, learner in learners.items():
            runs[measure(subject=label, quantity=INFERENCE, at=count)] = replace(learner, points=points).inference
        sample = partial(geometry.farthest_point_sample, points, setting.groups)
        centres = geometry.gather(points, sample())
        search = partial(geometry.knn, centres, points, setting.group_size)
        runs[measure(subject=SAMPLING, quantity="alone", at=count)] = partial(seconds, sample)
        runs[measure(subject=NEIGHBOURS, quantity="alone", at=count)] = partial(seconds, search)
    return take_turns(runs, setting.rounds, "points")


def _tokens(setting: Setting) -> Values:
    runs: dict[Measure, Timed] = {}
    for count in setting.tokens:
        bench = replace(setting.bench, make=partial(setting.bench.make, num_group=count))
        for label, learner in _compared(replace(setting, bench=bench)).items():
            runs[Measure(section="tokens", subject=label, quantity=INFERENCE, at=count)] = learner.inference
    return take_turns(runs, setting.rounds, "tokens")


def _adapters(setting: Setting) -> Values:
    """One LoRA is active; the others, of all methods in turn, are only there."""
    measure = partial(Measure, section="adapters", subject=LORA.label)
    others = rows_of()
    runs: dict[Measure, Timed] = {}
    for count in setting.adapters:
        learner = setting.learner(LORA)
        model = learner.model
        assert isinstance(model, PointPeftModel)
        for number in range(count - 1):
            row = others[number % len(others)]
            model.add_adapter(f"other_{number}", row.config, heads=heads(row, model.base_model))
        model.to(setting.device)
        runs[measure(quantity=INFERENCE, at=count)] = learner.inference
        runs[measure(quantity=SWAP, at=count)] = partial(seconds, partial(model.set_adapter, "default"), repeats=100)
    # What is looked for is a few percent: more rounds.
    return take_turns(runs, 3 * setting.rounds, "adapters")


def _bank_rows(setting: Setting) -> Values:
    measure = partial(Measure, section="bank rows", subject="MemoryBank")
    channels = setting.bench.make().trans_dim
    found: dict[Measure, list[float]] = {}
    runs: dict[Measure, Timed] = {}
    query = torch.randn(setting.batch, channels).to(setting.device)
    for count in setting.bank_rows:
        bank = MemoryBank(channels, 8, "backbone", torch.float16, leave_nearest_out=False).eval().to(setting.device)
        bank.fill(torch.randn(count, channels, dtype=torch.float16, device=setting.device))
        own = sum(buffer.nbytes for buffer in bank.buffers())
        retrieve = partial(bank.prior, query)
        runs[measure(quantity=RETRIEVAL, at=count)] = partial(seconds, retrieve)
        peak = own + peak_bytes(retrieve, setting.device)
        found[measure(quantity=RETRIEVAL_PEAK, at=count, unit="bytes")] = [peak]
    return {**found, **take_turns(runs, setting.rounds, "bank rows")}


# ---- mixed batches and tasks -----------------------------------------------------------------------------------------

MIXES: Mapping[str, Sequence[Row]] = {
    "three LORA, plain": (LORA, LORA, LORA),
    "LORA, both POINT_PEFT, plain": (LORA, POINT_PEFT, STEM),
}
"""What the samples of a batch, or the tasks, go through; the plain backbone is always the last of them."""
MIXED, APART = "mixed batch", "a batch an adapter"
TASKS, ONE_BY_ONE = "forward_tasks", "a forward a task"


def tasks(setting: Setting) -> Values:
    """One forward for several adapters, beside a forward for each."""
    runs: dict[Measure, Timed] = {}
    for label, rows in MIXES.items():
        for quantity, run in _mix(rows, setting).items():
            runs[Measure(section="tasks", subject=label, quantity=quantity)] = partial(_inferring, run)
    return take_turns(runs, setting.rounds, "tasks")


def _inferring(run: Callable[[], object]) -> float:
    with torch.no_grad():
        return seconds(run)


def _mix(rows: Sequence[Row], setting: Setting) -> dict[str, Callable[[], object]]:
    """What serves a batch with so many adapters."""
    torch.manual_seed(0)
    model = adapted(rows[0], setting.bench.make())
    names: list[str | None] = ["default", *(f"task_{number}" for number in range(1, len(rows))), None]
    for name, row in zip(names, rows, strict=False):
        assert name is not None
        if name != "default":
            model.add_adapter(name, row.config, heads=heads(row, model.base_model))
        setting.bench.fill(model, name)
    model.to(setting.device).eval()
    clouds = setting.bench.clouds(setting.batch).to(setting.device)
    owners = [names[sample * len(names) // setting.batch] for sample in range(setting.batch)]
    shares = {name: clouds[[owner == name for owner in owners]] for name in names}

    def each(inputs: Mapping[str | None, Tensor]) -> None:
        for name, points in inputs.items():
            with model.disable_adapter() if name is None else model.use_adapter(name):
                model(points)

    return {
        MIXED: lambda: model(clouds, adapter_names=owners),
        APART: lambda: each(shares),
        TASKS: lambda: model.forward_tasks(clouds, names),
        ONE_BY_ONE: lambda: each(dict.fromkeys(names, clouds)),
    }


SCALES = {
    "points": "points in a cloud",
    "tokens": "tokens",
    "adapters": "adapters loaded",
    "bank rows": "rows of the bank",
}
"""Where the measures of `scale` are -> what their sizes are of."""

SECTIONS: Mapping[str, Callable[[Setting], Values]] = {
    "point_peft": point_peft,
    "methods": methods,
    "memory": memory,
    "files": files,
    "peft": beside_peft,
    "scale": scale,
    "tasks": tasks,
}
"""Name -> what measures it."""
