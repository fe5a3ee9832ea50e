"""Messages between our processes: msgpack, one after another on a stream socket. Plain values only; nothing is pickled.

A message is a list that begins with its kind; `wire` says which there are. Only this file knows the package.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_MESSAGE = 256 << 20
"""Bytes of one message: both ends are ours, so more than this is a defect, not a client."""
HIGH_WATER = 64 << 20
"""Bytes that a reader may lag behind before the writer waits for it."""

ROOM = 64 << 10
"""Bytes that a reader has room for from the beginning; a longer message makes more. The package would take a mebibyte,
fill it from one end to the other before it begins anew, and look like a leak for tens of thousands of requests."""

Message = list[Any]


class Unpacker:
    """Bytes in, complete messages out."""

    def __init__(self) -> None:
        import msgpack

        self._unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, read_size=ROOM,
                                          max_buffer_size=MAX_MESSAGE)  # fmt: skip

    def feed(self, data: bytes) -> Iterator[Message]:
        self._unpacker.feed(data)
        yield from self._unpacker


def packer() -> Callable[[Message], bytes]:
    import msgpack

    pack: Callable[[Message], bytes] = msgpack.Packer(use_bin_type=True).pack
    return pack


class Channel:
    """The engine's end: never waits for the other side while there is something to compute."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock, self.pack, self.unpacker = sock, packer(), Unpacker()
        self.unsent = bytearray()

    def send(self, message: Message) -> None:
        """Queues a message and sends what can be sent now."""
        self.unsent += self.pack(message)
        self.flush()
        while len(self.unsent) > HIGH_WATER:
            select.select([], [self.sock], [])
            self.flush()

    def flush(self) -> None:
        while self.unsent:
            try:
                sent = self.sock.send(self.unsent)
            except BlockingIOError:
                return
            del self.unsent[:sent]

    def receive(self, *, wait: bool, also: Sequence[Any] = (), seconds: float | None = None) -> list[Message]:
        """What has arrived; if nothing and `wait`, until something does. Raises EOFError where the other side left.

        also: what else ends the waiting when it can be read.  seconds: the longest wait.
        """
        messages: list[Message] = []
        while True:
            try:
                data = self.sock.recv(1 << 20)
            except BlockingIOError:
                if messages or not wait:
                    return messages
                readable, _, _ = select.select([self.sock, *also], [self.sock] if self.unsent else [], [], seconds)
                self.flush()
                if self.sock not in readable and (readable or seconds is not None):
                    return messages
                continue
            if not data:
                raise EOFError
            messages += self.unpacker.feed(data)

    def drain(self) -> None:
        """Sends everything, waiting for it: the last words before leaving."""
        while self.unsent:
            select.select([], [self.sock], [])
            self.flush()
