"""One backbone and a folder of adapters behind HTTP, an adapter for each request. `examples/load.py` tries it.

    python -m examples.serve adapters --port 8000
    curl localhost:8000/predict -d '{"adapter": "grasp", "points": [[0.1, 0.2, 0.3], ...]}'
    curl localhost:8000/metrics                                                              # for Prometheus

A thread runs the model. What is asked meanwhile waits, and then goes through it as one batch, each cloud with its own
adapter, which is loaded when it is first asked for and stays beside those most used. "auto" is the adapter whose
routing bank is most like the cloud. Clouds are (n, 3), prepared as they were for training; those of one batch have the
same n. Whoever asks for what cannot be gets a sentence. Ctrl-C ends it, after it has answered what was asked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from examples.serving.batches import Batches
from examples.serving.http import Refusal, Request, Response, listening
from examples.serving.metrics import Metrics
from point_peft import PointPeftError
from point_peft.backbones import default_backbone

ROUTES = {"/predict": "POST", "/metrics": "GET"}
FORM = 'send {"adapter": NAME, "points": [[x, y, z], ...]}'


def parse(body: bytes) -> tuple[str, Tensor]:
    """The adapter and the cloud (n, 3) that a body asks for; raises `Refusal` where it does not."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON; {FORM}") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("adapter"), str):
        raise Refusal(400, f"the body names no adapter; {FORM}")
    try:
        points = torch.tensor(asked.get("points"), dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Refusal(400, f"the points are not rows of three numbers; {FORM}") from error
    if points.ndim != 2 or points.shape[1] != 3:
        raise Refusal(400, f"the points have the shape {tuple(points.shape)}, not (n, 3); {FORM}")
    if not points.isfinite().all():
        raise Refusal(400, "some coordinates are not finite; leave these points out")
    return asked["adapter"], points


class Server:
    """What is asked over HTTP, answered by the adapters of a folder on one backbone, and counted."""

    def __init__(self, backbone: nn.Module, folder: Path, most: int = 16) -> None:
        self.batches = Batches(backbone, folder, most)
        self.metrics = Metrics()

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[int]:
        """Answer within the block; gives the port, which for 0 is one that is free."""
        batches = asyncio.create_task(self.batches.run())
        try:
            async with listening(self.respond, port) as own:
                yield own
        finally:
            batches.cancel()

    async def respond(self, request: Request | Refusal) -> Response:
        """Answer whatever was asked, and count it."""
        begin = time.perf_counter()
        try:
            if isinstance(request, Refusal):
                raise request
            if request.path not in ROUTES:
                raise Refusal(404, f"there is no {request.path[:80]!r}; there are POST /predict and GET /metrics")
            if request.method != (right := ROUTES[request.path]):
                raise Refusal(405, f"{request.path} takes {right}, not {request.method[:80]!r}", allow=right)
            if request.path == "/metrics":
                batches = self.batches
                return Response(200, self.metrics.text(batches.status(), batches.batches, batches.clouds))
            answer = await self.batches.predict(*parse(request.body))
        except Refusal as refusal:
            self.metrics.count(refusal.adapter, refusal.status)
            return Response(refusal.status, {"error": str(refusal)}, refusal.allow)
        self.metrics.count(answer["adapter"], 200)
        self.metrics.took(time.perf_counter() - begin)
        return Response(200, answer)


async def serve(server: Server, port: int) -> None:
    """Answer until Ctrl-C or SIGTERM."""
    end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    async with server.running(port) as own:
        print(f"{len(server.batches.library)} adapters at http://127.0.0.1:{own}; Ctrl-C ends it", flush=True)
        await end.wait()
    print("ended; all that was asked is answered")


def main(argv: list[str] | None = None) -> None:
    """Serve a folder; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, help="a folder with adapters in it, at any depth")
    parser.add_argument("--port", type=int, default=8000, help="of the loopback; 0: one that is free")
    parser.add_argument("--most", type=int, default=16, help="adapters in memory, and clouds in a batch, at most")
    args = parser.parse_args(argv)
    try:
        asyncio.run(serve(Server(default_backbone(cls_dim=10), args.adapters, args.most), args.port))
    except (PointPeftError, OSError) as error:  # no adapters there, a port that is taken
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
