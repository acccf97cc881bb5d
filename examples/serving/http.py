"""As much of an HTTP/1.1 server in asyncio as `serve.py` needs: bodies of a known length in, JSON or text out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

MAX_BODY = 4_000_000
"""Bytes of a body: some 60,000 points in JSON."""
PATIENCE = 60.0
"""Seconds that a client may take to send a request, to take its answer, to go."""


class Refusal(Exception):
    """A request that is not granted: the status, the sentence that says why, the adapter if one was meant."""

    def __init__(self, status: int, sentence: str, adapter: str = "", allow: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.adapter, self.allow = status, adapter, allow


@dataclass(frozen=True)
class Request:
    """What a client asks, and whether more may come over this connection."""

    method: str
    path: str
    body: bytes
    more: bool


@dataclass(frozen=True)
class Response:
    """An answer: JSON of a dict, or plain text; `allow` is the method that would have been right."""

    status: int
    content: dict[str, Any] | str
    allow: str | None = None

    def encoded(self, more: bool) -> bytes:
        """The bytes to send; `more`: the connection stays open."""
        if isinstance(self.content, str):
            body, kind = self.content.encode(), "text/plain; version=0.0.4; charset=utf-8"
        else:
            body, kind = json.dumps(self.content).encode(), "application/json"
        head = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            f"Connection: {'keep-alive' if more else 'close'}",
            *([f"Allow: {self.allow}"] if self.allow else []),
        ]
        return "\r\n".join([*head, "", ""]).encode() + body


Respond = Callable[[Request | Refusal], Awaitable[Response]]
"""Answers a request, or one that could not be read."""


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    """The next request; raises `Refusal` where it cannot be told where it ends, or where that is too far."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as error:
        raise Refusal(400, "the head of the request is too long") from error
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise Refusal(400, "this is not a request of HTTP/1.1")
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
        raise Refusal(400, "the length of the body is not told; send it as Content-Length")
    if len(length) > 20 or int(length) > MAX_BODY:
        raise Refusal(413, f"the body has {length[:20]} bytes; at most {MAX_BODY} are read")
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(length))
    more = words[2] == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return Request(words[0], words[1].partition("?")[0], body, more)


async def skip(reader: asyncio.StreamReader) -> None:
    """Read what comes until the end, and let go of it."""
    while await reader.read(1 << 16):
        pass


@dataclass(eq=False)
class Connections:
    """The connections of a server, each answered by a task of its own."""

    respond: Respond
    tasks: dict[asyncio.Task[Any] | None, asyncio.StreamWriter] = field(default_factory=dict)
    answering: set[asyncio.StreamWriter] = field(default_factory=set)
    """The others may be closed at any time."""
    ending: bool = False

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes over one connection, until either side ends it."""
        task = asyncio.current_task()
        self.tasks[task] = writer
        try:
            while not self.ending and await self.exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            pass  # the client has gone, or does nothing
        finally:
            writer.close()
            del self.tasks[task]

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read a request and answer it; False: it was the last."""
        try:
            request: Request | Refusal = await asyncio.wait_for(read_request(reader, writer), PATIENCE)
        except Refusal as refusal:  # where the next one would begin is not known
            request = refusal
        self.answering.add(writer)
        try:
            response = await self.respond(request)
            more = isinstance(request, Request) and request.more and not self.ending
            writer.write(response.encoded(more))
            await asyncio.wait_for(writer.drain(), PATIENCE)
        finally:
            self.answering.discard(writer)
        if isinstance(request, Refusal):  # closed before all has come, a connection may take the answer with it
            writer.write_eof()
            await asyncio.wait_for(skip(reader), PATIENCE)
        return more


@asynccontextmanager
async def listening(respond: Respond, port: int = 0) -> AsyncIterator[int]:
    """Serve on a port of the loopback, 0: on a free one, and give it; at the end, first answer what was asked."""
    connections = Connections(respond)
    server = await asyncio.start_server(connections.converse, "127.0.0.1", port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        connections.ending = True
        server.close()
        for writer in set(connections.tasks.values()) - connections.answering:
            writer.close()
        if tasks := [task for task in connections.tasks if task is not None]:
            await asyncio.wait(tasks, timeout=PATIENCE)
