"""One backbone, an adapter for each task, requests of all tasks answered at the same time.

    python -m examples.serve
    python -m examples.serve --requests 60 --workers 4

The tasks have heads of their own shape and methods of their own; one of them is the plain backbone. An asyncio server
hands each request to a worker thread, which chooses the adapter for itself: what is active belongs to the thread or
task, not to the model. While requests are answered, a further task is loaded from its file, and then answered too.
Between two requests, an adapter gets the values of a retrained one in place. Clouds and adapters are random here: see
quickstart.py for real ones.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from point_peft import BitFitConfig, IDPTConfig, LoraConfig, PointPeftModel, TunerConfig, get_peft_model
from point_peft.backbones import PointTransformer, default_backbone

BASE = "the plain backbone"
HEAD = "cls_head_finetune"
TASKS: dict[str, tuple[TunerConfig, int]] = {  # task -> its method and the number of its classes
    "digit": (LoraConfig(r=8, target_modules=["qkv"]), 10),
    "parity": (BitFitConfig(), 2),
    "quality": (IDPTConfig(), 5),
}
LATER = "damage"  # a task that is loaded while the others are served; it is built as TASKS["digit"]


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    task: str
    cloud: int
    logits: Tensor
    seconds: float


def backbone(classes: int = 10) -> PointTransformer:
    """The embedded backbone; the same numbers each time."""
    torch.manual_seed(0)
    return default_backbone(cls_dim=classes).eval()


def write_adapters(folder: Path) -> None:
    """A file for every task, and "digit, retrained": as if they came from training or from the Hub."""
    like = {**TASKS, LATER: TASKS["digit"], "digit, retrained": TASKS["digit"]}
    for seed, (task, (config, classes)) in enumerate(like.items()):
        model = get_peft_model(backbone(), config, heads={HEAD: backbone(classes).cls_head_finetune})
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.adapters.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder / task)


def answer(model: PointPeftModel, task: str, cloud: int, points: Tensor) -> Answer:
    """Answer one request, on whatever thread this is: within the block it works for the task."""
    begin = time.perf_counter()
    with model.disable_adapter() if task == BASE else model.use_adapter(task), torch.inference_mode():
        logits = model(points[cloud : cloud + 1])
    return Answer(task, cloud, logits, time.perf_counter() - begin)


async def serve(
    model: PointPeftModel, folder: Path, requests: Sequence[tuple[str, int]], points: Tensor, workers: int
) -> list[Answer]:
    """Answer all requests, so many at a time; meanwhile load the later task and answer some of it too."""
    free = asyncio.Semaphore(workers)

    async def one(task: str, cloud: int) -> Answer:
        async with free:
            return await asyncio.to_thread(answer, model, task, cloud, points)

    async def later() -> list[Answer]:
        await asyncio.to_thread(model.load_adapter, folder / LATER, LATER)
        return list(await asyncio.gather(*(one(LATER, cloud) for cloud in range(len(points)))))

    answers, more = await asyncio.gather(asyncio.gather(*(one(*request) for request in requests)), later())
    return [*answers, *more]


def check(model: PointPeftModel, answers: Sequence[Answer], points: Tensor) -> None:
    """Every answer must be what its task gives alone; threads may round otherwise."""
    wrong = [
        given
        for given in answers
        if not torch.allclose(given.logits, answer(model, given.task, given.cloud, points).logits, atol=1e-4)
    ]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(answers)} answers are wrong, the first to '{wrong[0].task}'")
    print(f"each of the {len(answers)} answers is what its task gives alone")


def main(argv: list[str] | None = None) -> None:
    """The whole story; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40, help="so many, of all tasks in turn")
    parser.add_argument("--workers", type=int, default=4, help="so many are answered at a time")
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    points = torch.rand(4, 512, 3)
    tasks = [*TASKS, BASE]
    requests = [(tasks[number % len(tasks)], number % 3) for number in range(args.requests)]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(folder)
        first, *others = TASKS
        model = PointPeftModel.from_pretrained(backbone(), folder / first, first).eval()
        for task in others:
            model.load_adapter(folder / task, task)
        print(f"one backbone, {len(model.adapters)} adapters: {', '.join(model.adapters)}")

        begin = time.perf_counter()
        answers = asyncio.run(serve(model, folder, requests, points, args.workers))
        seconds = time.perf_counter() - begin
        print(f"{len(answers)} requests, {args.workers} at a time, in {seconds:.2f} s; '{LATER}' was loaded meanwhile")
        check(model, answers, points)
        for task in dict.fromkeys(given.task for given in answers):
            own = [given for given in answers if given.task == task]
            milliseconds = 1000 * median(given.seconds for given in own)
            classes = own[0].logits.shape[1]
            print(f"  {task:<20} {len(own):>4} requests, {classes:>3} classes, median {milliseconds:.0f} ms")

        before = answer(model, first, 0, points).logits
        begin = time.perf_counter()
        model.swap_adapter_(folder / "digit, retrained", first)
        milliseconds = 1000 * (time.perf_counter() - begin)
        moved = float((answer(model, first, 0, points).logits - before).abs().max())
        print(f"'{first}' got the values of a retrained adapter in {milliseconds:.0f} ms: logits moved {moved:.2f}")


if __name__ == "__main__":
    main()
