"""Clouds that wait become batches of mixed adapters, which come from a library when they are first asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from starlette.exceptions import HTTPException
from torch import Tensor, nn

from point_peft import (
    AdapterLibrary,
    LibraryStatus,
    LinearProbeConfig,
    PointPeftError,
    RoutingBankConfig,
    get_peft_model,
)

AUTO = "auto"
"""Instead of a name: the adapter whose routing bank is most like the cloud."""


class Refusal(HTTPException):
    """A request that is not granted: the status, the sentence that says why, the adapter if one was meant."""

    def __init__(self, status: int, sentence: str, adapter: str = "") -> None:
        super().__init__(status, sentence)
        self.adapter = adapter


Answer = dict[str, Any] | Refusal


@dataclass(eq=False)
class Job:
    """A cloud (n, 3) that waits for the answer of an adapter."""

    adapter: str
    points: Tensor
    answer: asyncio.Future[dict[str, Any]]


class Batches:
    """A backbone with the adapters of a folder: at most `most` of them in memory, and so many clouds in a batch."""

    def __init__(self, backbone: nn.Module, folder: Path, most: int) -> None:
        self.model = get_peft_model(backbone, LinearProbeConfig()).eval()
        self.model.delete_adapter("default")  # it shall have those of the library alone
        self.library, self.most = AdapterLibrary(folder, most=most), most
        self.waiting: list[Job] = []
        self.arrived = asyncio.Event()
        self.batches = self.clouds = 0

    def status(self) -> LibraryStatus:
        """The adapters that are in memory."""
        return self.library.status(self.model)

    async def predict(self, adapter: str, points: Tensor) -> dict[str, Any]:
        """The answer for a cloud (n, 3), once a batch had it in it; raises `Refusal` where there is none."""
        if adapter != AUTO:
            try:
                adapter = self.library[adapter].name
            except PointPeftError as error:
                raise Refusal(404, str(error)) from error
        job = Job(adapter, points, asyncio.get_running_loop().create_future())
        self.waiting.append(job)
        self.arrived.set()
        return await job.answer

    async def run(self) -> None:
        """Take the first cloud that waits, with others of as many points, through the model; for ever."""
        while await self.arrived.wait():
            batch = [job for job in self.waiting if len(job.points) == len(self.waiting[0].points)][: self.most]
            self.waiting = [job for job in self.waiting if job not in batch]
            if not self.waiting:
                self.arrived.clear()
            self.batches += 1
            self.clouds += len(batch)
            answers: list[Answer] | BaseException
            answers = (await asyncio.gather(asyncio.to_thread(self.answer, batch), return_exceptions=True))[0]
            if isinstance(answers, BaseException):
                logging.getLogger("examples.serve").error("a batch failed", exc_info=answers)
                answers = [Refusal(500, "the server failed; its log says why")] * len(batch)
            for job, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Refusal):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)

    def answer(self, batch: Sequence[Job]) -> list[Answer]:
        """An answer for each; what one of them is refused for is not the others' loss."""
        try:
            points = torch.stack([job.points for job in batch])
            return [*self.together(self.named([job.adapter for job in batch], points), points)]
        except Refusal as refusal:
            return [refusal] if len(batch) == 1 else [self.answer([job])[0] for job in batch]

    def named(self, names: Sequence[str], points: Tensor) -> list[str]:
        """The adapters for clouds (b, n, 3), with those for `AUTO` chosen."""
        auto = [place for place, name in enumerate(names) if name == AUTO]
        if not auto:
            return list(names)
        banks = [entry.name for entry in self.library.find(method=RoutingBankConfig.method)]
        if not banks:
            raise Refusal(400, "no adapter here has a routing bank, so none can be chosen; name one")
        try:
            with self.library.loaded(self.model, *banks) as own:
                chosen, _ = self.model.route(points[auto], own)
        except PointPeftError as error:
            raise Refusal(400, f"no adapter can be chosen: {error}") from error
        if None in chosen:
            raise Refusal(404, "no adapter's bank is like this cloud; name an adapter")
        found = dict(zip(auto, chosen, strict=True))
        called = dict(zip(own, banks, strict=True))
        return [called[str(found[place])] if place in found else name for place, name in enumerate(names)]

    def together(self, names: Sequence[str], points: Tensor) -> list[dict[str, Any]]:
        """The answers of these adapters for clouds (b, n, 3), an adapter for each; raises `Refusal` if one has none."""
        with ExitStack() as block:
            try:
                own = block.enter_context(self.library.loaded(self.model, *names))
            except PointPeftError as error:
                raise Refusal(500, f"this adapter cannot be used: {error}", names[0]) from error
            try:
                with torch.inference_mode():
                    logits = self.model(points, adapter_names=list(own))
            except PointPeftError as error:
                raise Refusal(400, f"this cloud cannot be answered: {error}", names[0]) from error
        return [self.reply(name, row.flatten().softmax(dim=0)) for name, row in zip(names, logits, strict=True)]

    def reply(self, name: str, probabilities: Tensor) -> dict[str, Any]:
        """The answer of an adapter by its probabilities (c,)."""
        if not probabilities.isfinite().all():
            raise Refusal(400, "the answer is not finite: are the coordinates as large as those of training?", name)
        classes = self.library[name].classes or [str(number) for number in range(len(probabilities))]
        if len(classes) != len(probabilities):
            count = f"gives {len(probabilities)} probabilities, and the run beside it has {len(classes)} classes"
            raise Refusal(500, f"the adapter {name!r} {count}", name)
        best = classes[int(probabilities.argmax())]
        return {"adapter": name, "class": best, "classes": list(classes), "probabilities": probabilities.tolist()}
