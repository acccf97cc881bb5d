"""A server on a free port of the loopback, and a client that takes next to nothing of the processor, to measure it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette


@asynccontextmanager
async def running(app: Starlette) -> AsyncIterator[int]:
    """A server at work on a free port of the loopback, which is given; at the end all that was asked is answered."""
    listener = socket.create_server(("127.0.0.1", 0))
    carrier = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    serving = asyncio.create_task(carrier.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        carrier.should_exit = True
        await serving


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: str, body: bytes = b""
) -> tuple[int, bytes]:
    """Status and body that come for "POST /predict" or "GET /metrics" over an open connection."""
    writer.write(f"{what} HTTP/1.1\r\nHost: loopback\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = next(line.partition(":")[2] for line in head.split("\r\n") if line.startswith("content-length:"))
    return int(head.split()[1]), await reader.readexactly(int(length))
