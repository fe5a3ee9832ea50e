"""One HTTP request while it is computed: watched for a client that leaves, held to its deadline, streamed or whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from moesaic.serving.errors import HTTPError
from moesaic.serving.session import Job
from moesaic.serving.wire import Piece

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]  # fmt: skip
LAST_WORDS = 1.0
"""Seconds that a client has to take an error at the end of a stream."""


class Disconnected(HTTPError):
    """The client has left: there is nobody to answer."""

    def __init__(self) -> None:
        super().__init__(499, "the client has closed the connection")


class Writer(Protocol):
    """How answers of one endpoint look."""

    def chunk(self, piece: Piece) -> str:
        """Server-sent events for a piece; may be empty."""
        ...

    def tail(self) -> str:
        """Events after the last piece."""
        ...

    def take(self, piece: Piece) -> None:
        """Keeps a piece for `whole`."""
        ...

    def whole(self) -> dict[str, Any]: ...

    def usage(self) -> dict[str, Any]: ...


@asynccontextmanager
async def watched(job: Job, receive: Receive, seconds: float) -> AsyncIterator[None]:
    """Frees the job when the client leaves, when time is up, or when the block ends for whatever reason."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        job.fail(Disconnected(), "disconnect")

    watcher = asyncio.create_task(watch())
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        late = HTTPError(504, f"the request took longer than {seconds:g} s", code="timeout")
        job.fail(late, "timeout")
        raise late from None
    finally:
        watcher.cancel()
        job.close("error")


async def whole(job: Job, writer: Writer) -> dict[str, Any]:
    while pieces := await job.next():
        for piece in pieces:
            writer.take(piece)
    return writer.whole()


async def stream(job: Job, writer: Writer, scope: Scope, send: Send, headers: Mapping[str, str]) -> None:
    """Sends the answer as it comes. The status is sent with the first piece: until then a failure is a plain answer."""
    job.behind = lambda: abandon(scope)
    pieces = await job.next()
    more = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS, *more]})
    while pieces:
        text = "".join([writer.chunk(piece) for piece in pieces])
        if text:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        pieces = await job.next()
    await send({"type": "http.response.body", "body": f"{writer.tail()}data: [DONE]\n\n".encode(), "more_body": False})


async def fail_stream(error: HTTPError, scope: Scope, send: Send) -> None:
    """The end of a stream that has begun and cannot be finished: an error event, without [DONE]."""
    body = f"data: {json.dumps(error.body())}\n\n".encode()
    try:
        async with asyncio.timeout(LAST_WORDS):
            await send({"type": "http.response.body", "body": body, "more_body": False})
    except TimeoutError:  # it does not even read
        abandon(scope)


def abandon(scope: Scope) -> None:
    """Closes the connection without waiting for what could not be sent."""
    connection = scope.get("moesaic.connection")
    if connection is not None:
        connection.cut()
