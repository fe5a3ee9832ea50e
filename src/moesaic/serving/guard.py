"""HTTP connections with limits: time and size of a request's head, time of its body, how many at once.

uvicorn leaves a connection that sends half a request open for ever, and takes heads of any size; this does not.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD = 64 << 10
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"


class Guarded(HttpToolsProtocol):
    """A request must be complete `seconds` after its first byte (or the connection's beginning)."""

    seconds: float
    most: int

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.deadline: asyncio.TimerHandle | None = None
        self.active: RequestResponseCycle | None = None
        self.head = 0  # bytes since the request began, while its headers are not complete; -1 after that

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(TOO_MANY)
            transport.close()
            return
        self.deadline = self.loop.call_later(self.seconds, self.late)

    def connection_lost(self, exc: Exception | None) -> None:
        self.disarm()
        self.tell()  # uvicorn itself tells only the newest request of a pipeline, not the one being answered
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.head >= 0:
            self.head += len(data)
        before = self.head
        super().data_received(data)
        if self.head == before > MAX_HEAD and not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()
            self.tell()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head = max(self.head, 0)
        self.scope["moesaic.connection"] = self  # type: ignore[typeddict-unknown-key]  # ours, to abort it
        if self.deadline is None:
            self.deadline = self.loop.call_later(self.seconds, self.late)

    def on_headers_complete(self) -> None:
        self.head = -1
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.head = 0
        self.disarm()
        super().on_message_complete()

    def late(self) -> None:
        """No complete request in time: there is nobody to be polite to."""
        self.deadline = None
        self.cut()

    def cut(self) -> None:
        self.transport.abort()
        self.tell()

    def send_400_response(self, msg: str) -> None:
        """Bytes that are no HTTP, possibly after a request that is still being answered."""
        super().send_400_response(msg)
        self.tell()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.active = cycle
        super()._start_asgi_task(cycle, app)

    def tell(self) -> None:
        """Who is answering learns now that nothing can be sent any more; writing would fail."""
        if self.active is not None and not self.active.response_complete:
            self.active.disconnected = True
            self.active.message_event.set()

    def disarm(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


def guarded(seconds: float, most: int) -> type[Guarded]:
    """The protocol class with its limits. most: connections at once."""
    return type("Guarded", (Guarded,), {"seconds": seconds, "most": most})
