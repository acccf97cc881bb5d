"""One script for a machine with a GPU: does everything compute there what it does on a CPU, and how fast?

    python -m tools.gpu                          at most six minutes; DEVICE=cuda:1 chooses another GPU
    DEVICE=cpu python -m tools.gpu --smallest    the same script at its smallest sizes, to know that it works

Every method on a dense backbone in float32, under bfloat16 autocast and with float16 weights; saved and loaded;
compiled; sampling and neighbours; the tables of speed and memory. All of it is written to build/gpu/: report.md,
report.json, and the page of speed. It ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from benchmarks.clock import seconds
from benchmarks.page import page
from benchmarks.plot import plot
from benchmarks.sections import FULL_SETTING, QUICK_SETTING
from benchmarks.speed import measure
from benchmarks.tables import HEADLINE
from point_peft import PointPeftModel, geometry
from point_peft.adapting.adapter import get_adapter
from point_peft.training import fit
from tests.adapting import METHOD_NAMES, ONE_BLOCK, adapt, banks, distance, frozen, gradients, loss_of
from tests.methods import config
from tests.training import QUICK, adapted, losses, shapes
from tests.zoo import BACKBONES
from tools.methods import machine, table

BACKBONE = BACKBONES["point_bert"]
Precision = Literal["no", "bf16", "fp16"]
LIMIT = 330.0
"""Seconds after which no further check begins."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is tried."""

    methods: Sequence[str]
    compiled: Sequence[str]
    """Those of them that are compiled."""
    backend: str
    precisions: Sequence[Precision]
    """In which a training is tried."""
    clouds: Sequence[tuple[int, int]]
    """(clouds, points) for sampling and neighbours."""
    sections: Sequence[str]
    """Of the benchmark of speed."""
    rounds: int


FULL = Sizes(
    methods=METHOD_NAMES,
    compiled=METHOD_NAMES,
    backend="inductor",
    precisions=("no", "bf16", "fp16"),
    clouds=((8, 2048), (8, 16384), (64, 2048)),
    sections=("published", "reference"),
    rounds=5,
)
SMALLEST = Sizes(
    methods=["LORA", "POINT_PEFT"],
    compiled=["LORA"],
    backend="eager",
    precisions=("bf16",),
    clouds=((2, 128),),
    sections=("reference",),
    rounds=1,
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check found."""

    name: str
    passed: bool
    detail: str
    seconds: float


# ---- every method ----------------------------------------------------------------------------------------------------


def agrees_with_cpu(method: str, device: torch.device) -> str:
    """Output and gradients in float32; without the adapter, the backbone bit for bit."""
    here = adapt(BACKBONE, method)
    there = copy.deepcopy(here).to(device)
    expected, found = _step(here, torch.device("cpu")), _step(there, device)
    off = distance(found[0], expected[0])
    assert off < 1e-3, f"the output is off by {off:.1e}"
    worst = max(_relative(found[1][name], gradient) for name, gradient in expected[1].items())
    assert worst < 1e-2, f"a gradient is off by {worst:.1e} of itself"
    base = frozen(BACKBONE).to(device)
    inputs = _inputs(device)
    with torch.no_grad(), there.disable_adapter():
        assert torch.equal(there(*inputs), base(*inputs)), "disabled, it is not the backbone bit for bit"
    return f"output {off:.0e}, gradients {worst:.0e}"


def in_half_precision(method: str, device: torch.device) -> str:
    """Under bfloat16 autocast with gradients, and with all weights in float16, beside float32."""
    model = adapt(BACKBONE, method).to(device)
    exact = _step(model, device)[0]
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16):
        output = model(*_inputs(device))
    torch.autograd.backward(loss_of(output.float().cpu()))
    assert all(g.isfinite().all() for g in gradients(model).values()), "a gradient is not finite under autocast"
    rough = _relative(output.float(), exact)
    # A query that is rounded may retrieve other rows of a bank that are as near.
    tolerance = 0.5 if banks(get_adapter(model, "default")) else 0.1
    assert rough < tolerance, f"under bfloat16 autocast the output is off by {rough:.1e} of itself"
    with torch.no_grad():
        halved = model.half()(*(value.half() for value in _inputs(device)))
    half = _relative(halved.float(), exact)
    assert half < tolerance, f"with float16 weights the output is off by {half:.1e} of itself"
    return f"bfloat16 autocast {rough:.0e}, float16 weights {half:.0e}"


def is_saved_and_loaded(method: str, device: torch.device) -> str:
    """From the device to a file, and into a fresh backbone there."""
    model = adapt(BACKBONE, method).to(device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = PointPeftModel.from_pretrained(BACKBONE.build().to(device), folder).eval()
        assert {tensor.device.type for tensor in again.state_dict().values()} == {device.type}
        assert torch.equal(again(*_inputs(device)), model(*_inputs(device))), "reloaded, it gives another output"
    return "bit for bit"


def is_compiled(method: str, device: torch.device, backend: str) -> str:
    """The same from one graph."""
    torch.compiler.reset()
    model = adapt(ONE_BLOCK, method).to(device)
    with torch.no_grad():
        expected = model(*_inputs(device))
        output = torch.compile(model, fullgraph=True, backend=backend)(*_inputs(device))
    off = distance(output.cpu(), expected.cpu())
    assert off < 1e-3, f"the output is off by {off:.1e}"
    return f"{backend}: {off:.0e}"


def is_trained(precision: Precision, device: torch.device) -> str:
    """Two epochs by `fit`; on a GPU, what it said of memory beside what it took."""
    recipe = replace(QUICK, mixed_precision=precision)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        run = fit(adapted(config("POINT_PEFT")), shapes(15, 1), shapes(9, 2), recipe, out=Path(folder) / "run")
        curve = losses(run.folder)
    assert curve[-1] < curve[0], f"the loss rose from {curve[0]:.2f} to {curve[-1]:.2f}"
    peak = f", {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB" if device.type == "cuda" else ""
    return f"{run.results['val']['accuracy']:.0f} % on validation{peak}"


def _inputs(device: torch.device) -> tuple[Tensor, ...]:
    return tuple(value.to(device) for value in BACKBONE.inputs(3, 5))


def _step(model: PointPeftModel, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients on the CPU; the gradient of the output is the same everywhere."""
    output = model(*_inputs(device))
    torch.autograd.backward(loss_of(output.cpu()))
    return output.detach().cpu(), {name: gradient.cpu() for name, gradient in gradients(model).items()}


def _relative(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float((one.cpu() - other.cpu()).norm() / other.cpu().norm().clamp(min=1e-6))


# ---- geometry and speed ----------------------------------------------------------------------------------------------


def samples_and_searches(clouds: tuple[int, int], device: torch.device) -> str:
    """Farthest point sampling and neighbours: what a CPU chooses, and how long each takes."""
    batch, count = clouds
    points = torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(0))
    chosen: dict[str, tuple[Tensor, Tensor]] = {}
    took: list[str] = []
    for kind in (torch.device("cpu"), device):
        here = points.to(kind)
        sample = partial(geometry.farthest_point_sample, here, min(128, count // 2))
        centres = geometry.gather(here, chosen["cpu"][0].to(kind) if chosen else sample())
        search = partial(geometry.knn, centres, here, 32)
        chosen.setdefault(str(kind), (sample().cpu(), search().cpu()))
        times = [median(seconds(each) for _ in range(3)) for each in (sample, search)]
        took.append(f"{kind} {1e3 * times[0]:.2f} ms and {1e3 * times[1]:.2f} ms")
    pairs = zip(("sampling", "neighbours"), chosen["cpu"], chosen[str(device)], strict=True)
    for name, one, other in pairs:
        same = float((one == other).float().mean())
        assert same > 0.99, f"{name}: {100 * (1 - same):.1f} % of the choices are others than a CPU's"
    return "; ".join(took)


def is_measured(sizes: Sizes, device: torch.device, folder: Path) -> str:
    """Training, inference and memory of Point-PEFT and a few others, on the published class and our encoder."""
    kind = QUICK_SETTING if sizes is SMALLEST else FULL_SETTING
    rows = HEADLINE[:1] if sizes is SMALLEST else HEADLINE
    setting = kind(headline=rows, further=[], rounds=sizes.rounds, device=device)
    if device.type != "cpu":
        setting = replace(setting, batch=32)  # what keeps a GPU busy
    results = measure(setting, sizes.sections, "python -m tools.gpu")
    (folder / "speed.md").write_text(page(results, "speed.png"), encoding="utf-8")
    (folder / "speed.json").write_text(results.to_json(), encoding="utf-8")
    plot(results, folder / "speed.png")
    return "see speed.md"


# ---- the report ------------------------------------------------------------------------------------------------------


def checks(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and check, the most telling first."""
    for method in sizes.methods:
        yield f"{method}: agrees with the CPU", partial(agrees_with_cpu, method, device)
        yield f"{method}: half precision", partial(in_half_precision, method, device)
        yield f"{method}: saved and loaded", partial(is_saved_and_loaded, method, device)
    for precision in sizes.precisions:
        yield f"POINT_PEFT: trained by fit in {precision}", partial(is_trained, precision, device)
    for clouds in sizes.clouds:
        name = "sampling and neighbours: {} clouds of {} points".format(*clouds)
        yield name, partial(samples_and_searches, clouds, device)
    yield "speed and memory", partial(is_measured, sizes, device, folder)
    for method in sizes.compiled:
        yield f"{method}: compiled", partial(is_compiled, method, device, sizes.backend)


def carried_out(name: str, check: Callable[[], str], begun: float) -> Outcome:
    """Run a check, unless it is too late for it."""
    start = time.perf_counter()
    if start - begun > LIMIT:
        return Outcome(name=name, passed=False, detail="left out: no time was left", seconds=0.0)
    try:
        passed, detail = True, check()
    except Exception as error:  # whoever lends a GPU for six minutes gets the rest of the report, whatever fails
        passed, detail = False, f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")[:300]
    return Outcome(name=name, passed=passed, detail=detail, seconds=time.perf_counter() - start)


def report(outcomes: Sequence[Outcome], device: torch.device) -> str:
    """The page."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    failed = [outcome for outcome in outcomes if not outcome.passed]
    cells = [[o.name, "yes" if o.passed else "NO", o.detail, f"{o.seconds:.1f} s"] for o in outcomes]
    lines = [
        "# What a GPU computes",
        "",
        f"Made by `python -m tools.gpu` on {chip}; {machine()}.",
        f"{len(outcomes) - len(failed)} of {len(outcomes)} checks passed.",
        "",
        *table(cells, ["check", "passed", "", "took"]),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", action="store_true", help="the smallest sizes, a try")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder that all is written to")
    options = parser.parse_args(argv)
    device = torch.device(os.environ.get("DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; DEVICE=cpu python -m tools.gpu --smallest tries the script without one")
    options.out.mkdir(parents=True, exist_ok=True)
    begun, outcomes = time.perf_counter(), []
    for name, check in checks(SMALLEST if options.smallest else FULL, device, options.out):
        outcomes.append(carried_out(name, check, begun))
        print("ok  " if outcomes[-1].passed else "FAIL", name, outcomes[-1].detail, flush=True)
        text = json.dumps({"device": str(device), "outcomes": [asdict(o) for o in outcomes]}, indent=1) + "\n"
        (options.out / "report.json").write_text(text, encoding="utf-8")
    (options.out / "report.md").write_text(report(outcomes, device), encoding="utf-8")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
