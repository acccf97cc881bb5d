"""Load on the server of `serve.py`: many requests at once, each answer compared with that of its adapter alone.

    python -m examples.load                                             # 1,000 requests over 20 adapters
    python -m examples.load --requests 100 --adapters 30 --connections 4

Adapters of three methods, with heads of two widths and random values, are written to a temporary folder. A server is
started on a free port of the loopback; which adapter is asked for follows 1 / rank. An answer is wrong if it is not, to
1e-4 in each probability, what the adapter gives that `from_pretrained` has loaded alone, or nearer to another's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from examples.serve import Server
from examples.serving.loopback import ask, running
from examples.serving.random_adapters import answers_alone, apart, write_adapters
from point_peft.backbones import PointTransformer, default_backbone

TOLERANCE = 1e-4
"""Of a probability: batches round otherwise than single clouds."""


@dataclass(frozen=True)
class Reply:
    """What came of a request for an adapter and one of the clouds."""

    adapter: str
    cloud: int
    status: int
    answer: Mapping[str, Any]
    seconds: float


def embedded(classes: int) -> PointTransformer:
    """The backbone of the server, but for its head."""
    return default_backbone(cls_dim=classes).eval()


async def client(port: int, asked: Iterator[tuple[str, int]], clouds: Sequence[object]) -> list[Reply]:
    """Ask over one connection, one request after another, for what no other client has asked yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    replies = []
    for adapter, cloud in asked:
        begin = time.perf_counter()
        body = json.dumps({"adapter": adapter, "points": clouds[cloud]}).encode()
        status, answer = await ask(reader, writer, "POST /predict", body)
        replies.append(Reply(adapter, cloud, status, json.loads(answer), time.perf_counter() - begin))
    writer.close()
    return replies


async def send(server: Server, asked: Sequence[tuple[str, int]], clouds: Tensor, connections: int) -> list[Reply]:
    """Start a server, ask it over so many connections at once, and end it."""
    left, points = iter(asked), clouds.tolist()
    async with running(server.app) as port:
        replies = await asyncio.gather(*(client(port, left, points) for _ in range(connections)))
    return [reply for own in replies for reply in own]


def requests(names: Sequence[str], clouds: int, count: int) -> list[tuple[str, int]]:
    """So many pairs of an adapter and a cloud; the adapters by 1 / rank."""
    draw = random.Random(0)
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    return [(name, draw.randrange(clouds)) for name in draw.choices(names, weights, k=count)]


def is_right(reply: Reply, expected: Mapping[str, Tensor]) -> bool:
    """True for the answer that the adapter alone gives, if no other adapter's is nearer to it."""
    if reply.status != 200 or reply.answer["adapter"] != reply.adapter:
        return False
    given = torch.tensor(reply.answer["probabilities"])
    alike = {name: each[reply.cloud] for name, each in expected.items() if each.shape[1] == len(given)}
    distances = {name: float((given - each).abs().max()) for name, each in alike.items()}
    return distances.get(reply.adapter, 1.0) <= min(TOLERANCE, *distances.values())


def main(argv: list[str] | None = None) -> None:
    """Make adapters, send the load, compare, print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--connections", type=int, default=10)
    args = parser.parse_args(argv)
    clouds = torch.rand(8, 512, 3, generator=torch.Generator().manual_seed(0))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(embedded, folder, args.adapters)
        expected = answers_alone(embedded, folder, clouds)
        asked = requests(list(expected), len(clouds), args.requests)
        server = Server(embedded(10), folder)
        begin = time.perf_counter()
        replies = asyncio.run(send(server, asked, clouds, args.connections))
        seconds = time.perf_counter() - begin
        batches, loads = server.batches, server.batches.status().loads
    wrong = [reply for reply in replies if not is_right(reply, expected)]
    if wrong or len(replies) != len(asked):
        raise SystemExit(f"{len(wrong)} of {len(replies)} answers to {len(asked)} requests are wrong")
    if apart(expected) < 10 * TOLERANCE:
        raise SystemExit("two adapters are so alike that whose answer it is cannot be told")
    print(
        f"{len(replies)} requests over {len(expected)} adapters, {args.connections} at a time, in {seconds:.1f} s: "
        f"{len(replies) / seconds:.1f} a second; {len(clouds[0])} points a cloud"
    )
    cuts = quantiles([1000 * reply.seconds for reply in replies], n=100)
    print(f"latency in ms: median {cuts[49]:.0f}, 90 % {cuts[89]:.0f}, 99 % {cuts[98]:.0f}")
    print(f"{batches.batches} batches of {batches.clouds / batches.batches:.1f} clouds, {loads} loads of adapters")
    print(f"no answer is wrong or another's: two adapters differ by {apart(expected):.3f} or more in a probability")


if __name__ == "__main__":
    main()
