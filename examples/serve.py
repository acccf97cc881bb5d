"""One backbone and a folder of adapters behind HTTP, an adapter for each request. `examples/load.py` tries it.

    python -m examples.serve adapters --port 8000
    curl localhost:8000/predict -d '{"adapter": "grasp", "points": [[0.1, 0.2, 0.3], ...]}'
    curl localhost:8000/metrics                                                              # for Prometheus

A thread runs the model. What is asked meanwhile waits, and then goes through it as one batch, each cloud with its own
adapter, which is loaded when it is first asked for and stays beside those most used. "auto" is the adapter whose
routing bank is most like the cloud. Clouds are (n, 3), prepared as they were for training; those of one batch have the
same n. Whoever asks for what cannot be gets a sentence. Ctrl-C or SIGTERM ends it, after what was asked is answered.
Starlette and uvicorn carry the HTTP, prometheus-client counts; serving/batches.py is what is particular to adapters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from examples.serving.batches import Batches, Refusal
from examples.serving.metrics import Metrics
from point_peft import PointPeftError
from point_peft.backbones import default_backbone

MAX_BODY = 4_000_000
"""Bytes of a body: some 60,000 points in JSON."""
FORM = 'send {"adapter": NAME, "points": [[x, y, z], ...]}'


async def read(request: Request) -> bytes:
    """The body of a request; raises `Refusal` as soon as it is too long, or where its end never comes."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise Refusal(413, f"the body has more than {MAX_BODY} bytes, which is all that is read")
    except ClientDisconnect as error:
        raise Refusal(400, "the client went before it had sent all") from error
    return bytes(body)


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
    """The adapters of a folder on one backbone, asked over HTTP; `app` is for any server of ASGI."""

    def __init__(self, backbone: nn.Module, folder: Path, most: int = 16) -> None:
        self.batches = Batches(backbone, folder, most)
        self.metrics = Metrics(self.batches)
        routes = [Route("/predict", self.predict, methods=["POST"]), Route("/metrics", self.count)]
        self.app = Starlette(routes=routes, lifespan=self.life, exception_handlers={HTTPException: self.refuse})

    @asynccontextmanager
    async def life(self, app: Starlette) -> AsyncIterator[None]:
        """Run the batches as long as the application is there."""
        batches = asyncio.create_task(self.batches.run())
        yield
        batches.cancel()

    async def predict(self, request: Request) -> Response:
        """Answer POST /predict: the classes and probabilities of an adapter for a cloud."""
        begin = time.perf_counter()
        answer = await self.batches.predict(*parse(await read(request)))
        self.metrics.requests.labels(answer["adapter"], 200).inc()
        self.metrics.seconds.observe(time.perf_counter() - begin)
        return JSONResponse(answer)

    async def count(self, request: Request) -> Response:
        """Answer GET /metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Say in a sentence why there is no answer, and count that."""
        assert isinstance(error, HTTPException)
        adapter, sentence = "", f"there is no {request.method} {request.url.path[:80]}, but POST /predict, GET /metrics"
        if isinstance(error, Refusal):
            adapter, sentence = error.adapter, error.detail
        self.metrics.requests.labels(adapter, error.status_code).inc()
        return JSONResponse({"error": sentence}, error.status_code, error.headers)


def main(argv: list[str] | None = None) -> None:
    """Serve a folder; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, help="a folder with adapters in it, at any depth")
    parser.add_argument("--port", type=int, default=8000, help="of the loopback; 0: one that is free")
    parser.add_argument("--most", type=int, default=16, help="adapters in memory, and clouds in a batch, at most")
    args = parser.parse_args(argv)
    try:
        server = Server(default_backbone(cls_dim=10), args.adapters, args.most)
    except PointPeftError as error:  # no adapters there
        raise SystemExit(str(error)) from error
    uvicorn.run(server.app, port=args.port, access_log=False)


if __name__ == "__main__":
    main()
