"""Libraries of adapters: what it takes to open one, what a use takes, and whether every answer is the right adapter's.

    python -m benchmarks.library             print the tables (some minutes on two cores)
    python -m benchmarks.library --write     write them into docs/many_adapters.md

Opening: adapters of LoRA in PEFT's format and of Point-PEFT in ours by turns, 100 in a folder, each with its card,
every fourth with the record of a run. Only headers are read, so their tensors are links to one file of each kind. Each
round is a process of its own; its memory is what opening adds to the most that it has held after the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.accuracy.results import spread
from benchmarks.marked import write_between
from point_peft import AdapterLibrary, LoraConfig, PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.files.format import RUN_FILE, TENSOR_FILE
from tests.peak import peak
from tools.methods import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "many_adapters.md"
BEGIN, END = "<!-- library: written by `python -m benchmarks.library` -->", "<!-- library: up to here -->"
CONFIGS = (LoraConfig(r=2, modules_to_save=[]), PointPEFTConfig(modules_to_save=[]))
CLASSES, POINTS = 10, 512
RUN = {"task": "classification", "classes": [f"class {number}" for number in range(CLASSES)], "finished": True}


def make_many(root: Path, count: int) -> None:
    """Write so many adapters, in folders of 100."""
    originals = []
    for number, config in enumerate(CONFIGS):
        originals.append(root.with_name(f"original{number}"))
        get_peft_model(default_backbone(cls_dim=CLASSES), config).save_pretrained(originals[-1])
    texts = [
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != TENSOR_FILE} for folder in originals
    ]
    for number in range(count):
        folder, kind = root / f"{number // 100:03}" / f"{number % 100:02}", number % len(CONFIGS)
        folder.mkdir(parents=True)
        for name, text in texts[kind].items():
            (folder / name).write_bytes(text)
        os.link(originals[kind] / TENSOR_FILE, folder / TENSOR_FILE)
        if number % 4 == 0:
            (folder / RUN_FILE).write_text(json.dumps(RUN), "utf-8")


@dataclass(frozen=True)
class Opening:
    """One opening of a folder, in a process of its own."""

    adapters: int
    seconds: float
    cpu: float
    """Seconds of the processor, which others on the machine change less."""
    imports: int
    """The most bytes that the process had held before."""
    added: int
    """Bytes by which opening raised that."""


def open_here(root: Path) -> Opening:
    """Open a folder in this process."""
    before, start, cpu = 1024 * peak(), time.perf_counter(), time.process_time()
    library = AdapterLibrary(root)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if library.broken:
        raise SystemExit(f"not in order: {next(iter(library.broken.items()))}")
    return Opening(len(library), seconds, cpu, before, 1024 * peak() - before)


def opened(root: Path) -> Opening:
    """The opening of a folder by another process."""
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.library", "--open", str(root)], capture_output=True, text=True, check=True
    )
    return Opening(**json.loads(told.stdout))


def make_tasks(root: Path, count: int) -> None:
    """Write so many adapters of different values, by turns of the two kinds, with heads."""
    for number in range(count):
        torch.manual_seed(number)
        config = (LoraConfig(r=2), PointPEFTConfig())[number % 2]
        model = get_peft_model(default_backbone(cls_dim=CLASSES), config)
        with torch.no_grad():
            for tensor in model.adapters.parameters():
                tensor.add_(0.05 * torch.randn_like(tensor))
        model.save_pretrained(root / f"task{number:03}")


@dataclass(frozen=True)
class Uses:
    """The seconds of uses of adapters by one thread: of the first of each, of a later one, of a forward."""

    first: Sequence[float]
    later: Sequence[float]
    forward: Sequence[float]


def measure_uses(root: Path, clouds: Tensor) -> Uses:
    """Use each adapter twice, with room for all, and answer a cloud with it."""
    library, model = AdapterLibrary(root, most=None), plain()
    first: list[float] = []
    later: list[float] = []
    forward: list[float] = []
    for name in library:
        for taken in (first, later):
            start = time.perf_counter()
            with library.activated(model, name):
                taken.append(time.perf_counter() - start)
                start = time.perf_counter()
                model(clouds)
            forward.append(time.perf_counter() - start)
    return Uses(first, later, forward)


def plain() -> PointPeftModel:
    """The backbone with an adapter of its owner's."""
    return get_peft_model(default_backbone(cls_dim=CLASSES), LoraConfig(r=1), "mine").eval()


@dataclass(frozen=True)
class Answers:
    """The outcome of many requests."""

    hits: int
    loads: int
    evictions: int
    most: int
    """The most adapters of the library that were in the model."""
    furthest: float
    """The largest difference of an answer from that of the adapter alone."""
    wrong: int
    """Answers that are nearer to another adapter's."""


def serve(root: Path, expected: dict[str, Tensor], clouds: Tensor, seed: int, requests: int, most: int) -> Answers:
    """Answer requests in two threads; which adapter is asked for follows 1 / rank, in an order of its own."""
    library, model = AdapterLibrary(root, most=most), plain()
    draw = random.Random(seed)
    names = draw.sample(sorted(library), len(library))
    weights = list(accumulate(1 / rank for rank in range(1, len(names) + 1)))
    asked = draw.choices(names, cum_weights=weights, k=requests)
    everyone = torch.stack([expected[name] for name in sorted(expected)])
    held, furthest, wrong = [], [], []

    def answer(own: Sequence[str]) -> None:
        for name in own:
            with torch.no_grad(), library.activated(model, name):
                logits = model(clouds)[0]
                held.append(len(library.status(model).adapters))
            distances = (everyone - logits).abs().amax(dim=1)
            furthest.append(float(distances[sorted(expected).index(name)]))
            wrong.append(sorted(expected)[int(distances.argmin())] != name)

    threads = [threading.Thread(target=answer, args=(asked[number::2],)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(wrong) != requests:
        raise SystemExit("not every request was answered")
    status = library.status(model)
    return Answers(status.hits, status.loads, status.evictions, max(held), max(furthest), sum(wrong))


def lines(options: argparse.Namespace) -> list[str]:
    """Measure, and write what stands between the marks."""
    torch.set_num_threads(1)
    clouds = torch.rand(1, POINTS, 3, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as held:
        root = Path(held)
        make_many(root / "many", options.adapters)
        openings = [opened(root / "many") for _ in range(options.rounds)]
        make_tasks(root / "tasks", options.tasks)
        with torch.no_grad():
            uses = measure_uses(root / "tasks", clouds)
            expected = {
                path.name: PointPeftModel.from_pretrained(default_backbone(cls_dim=CLASSES), path).eval()(clouds)[0]
                for path in sorted((root / "tasks").iterdir())
            }
        served = [
            serve(root / "tasks", expected, clouds, seed, options.requests, options.most)
            for seed in range(options.seeds)
        ]
    return [*opening_lines(openings), "", *use_lines(uses), "", *serving_lines(served, expected, options)]


def opening_lines(openings: Sequence[Opening]) -> list[str]:
    rows = [
        [
            f"{openings[0].adapters:,} adapters",
            _range([one.seconds for one in openings], 1, 2),
            _range([one.cpu for one in openings], 1, 2),
            f"{median(one.added for one in openings) / 1e6:.0f}",
            f"{median(one.imports for one in openings) / 1e6:.0f}",
        ]
    ]
    header = ["opening", "seconds", "of the processor", "MB more at the peak", "MB at the peak of the imports"]
    return [
        *table(rows, header),
        "",
        f"Medians and quartiles, by one thread; the load of the machine was {os.getloadavg()[2]:.0f} on "
        f"{os.cpu_count()} cores meanwhile, which the seconds of the processor feel least.",
    ]


def use_lines(uses: Uses) -> list[str]:
    rows = [
        ["first use, the adapter is loaded", _range(uses.first, 1e3, 1)],
        ["later use", _range(uses.later, 1e3, 3)],
        [f"a forward of one cloud of {POINTS} points", _range(uses.forward, 1e3, 1)],
    ]
    return table(rows, ["what", "milliseconds"])


def serving_lines(served: Sequence[Answers], expected: dict[str, Tensor], options: argparse.Namespace) -> list[str]:
    outputs = torch.stack(list(expected.values()))
    apart = (outputs[:, None] - outputs[None]).abs().amax(dim=2)
    apart.fill_diagonal_(torch.inf)
    hits, loads = [one.hits for one in served], [one.loads for one in served]
    rows = [
        [
            spread(hits, 0),
            spread(loads, 0),
            str(max(one.most for one in served)),
            str(sum(one.wrong for one in served)),
            f"{max(one.furthest for one in served):.1e}",
            f"{float(apart.min()):.1e}",
        ]
    ]
    header = ["hits", "loads", "most at once", "answers of another's adapter"]
    header += ["furthest from the adapter alone", "nearest two adapters"]
    return [
        f"{options.requests:,} requests over {options.tasks} adapters in two threads, most={options.most}, "
        f"{len(served)} seeds, asked for as 1 / rank; differences are the largest of a logit, each answer beside those "
        "of `from_pretrained`:",
        "",
        *table(rows, header),
    ]


def _range(values: Sequence[float], factor: float, digits: int) -> str:
    """The median, and the quartiles."""
    ordered = sorted(factor * value for value in values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return f"{median(ordered):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000, help="that are opened")
    parser.add_argument("--rounds", type=int, default=5, help="of opening")
    parser.add_argument("--tasks", type=int, default=100, help="adapters that are used")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--most", type=int, default=16, help="adapters in the model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--open", type=Path, help="open this folder here, and print what it took as JSON")
    options = parser.parse_args(argv)
    if options.open:
        print(json.dumps(vars(open_here(options.open))))
        return
    text = lines(options)
    if options.write:
        write_between(PAGE, BEGIN, END, text)
    print("\n".join(text))


if __name__ == "__main__":
    main()
