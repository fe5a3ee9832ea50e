"""The process that compiles grammars and walks along answers (`guides.py` says why it is one of its own).

In:  ["start", path, vocab]  once, first     ["compile", number, kind, text]    ["forget", number]
     ["open", guide, number, stops]          ["accept", guide, token]           ["close", guide]
Out: ["ready"]                               ["compiled", number, None or {what, where, remedy}]
     ["mask", guide, words] after open and accept, unless the answer has ended; ["broken", guide, why] if there is none
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moesaic.engine.grammar import Grammars, Matcher
from moesaic.errors import RequestError
from moesaic.serving.frames import Channel, Message
from moesaic.serving.parent import die_with_parent
from moesaic.text.tokenizer import Tokenizer

MEMORY = 4 << 30
"""Bytes that grammars may take before it is this process that ends."""


class Walker:
    """Compiles in a thread, so that a large schema does not hold up the answers that are being followed."""

    def __init__(self, channel: Channel, grammars: Grammars) -> None:
        self.channel, self.grammars = channel, grammars
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self.wake, self.ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.done: deque[tuple[int, Future[Any]]] = deque()
        self.compiled: dict[int, Any] = {}
        self.walks: dict[int, Matcher] = {}

    def run(self) -> None:
        """Until the engine leaves (EOFError)."""
        while True:
            for message in self.channel.receive(wait=True, also=[self.wake]):
                self.handle(message)
            self.tell()

    def handle(self, message: Message) -> None:
        kind, number, *rest = message
        if kind == "compile":
            future = self.pool.submit(self.grammars.compile, *rest)
            future.add_done_callback(lambda ended: self.ended(number, ended))
        elif kind == "forget":
            self.compiled.pop(number, None)
        elif kind == "open":
            self.walks[number] = self.grammars.guide(self.compiled[rest[0]], rest[1])
            self.say(number)
        elif kind == "accept" and number in self.walks:
            self.say(number, rest[0])
        elif kind == "close":
            self.walks.pop(number, None)

    def ended(self, number: int, future: Future[Any]) -> None:
        """In the compiling thread."""
        self.done.append((number, future))
        os.write(self.ring, b"!")

    def tell(self) -> None:
        try:
            os.read(self.wake, 4096)
        except BlockingIOError:
            return  # the bell rings after the entry is made, never before
        while self.done:
            number, future = self.done.popleft()
            try:
                self.compiled[number], problem = future.result(), None
            except RequestError as error:
                problem = {"what": error.what, "where": error.where, "remedy": error.remedy}
            self.channel.send(["compiled", number, problem])

    def say(self, number: int, token: int | None = None) -> None:
        walk = self.walks[number]
        try:
            if token is not None:
                walk.accept(token)
            if not walk.ended:
                self.channel.send(["mask", number, walk.allowed_W().tobytes()])
        except (RuntimeError, ValueError) as error:  # xgrammar's
            self.channel.send(["broken", number, str(error)])


def main(descriptor: int, parent: int) -> int:
    die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        with socket.socket(fileno=descriptor) as sock:
            channel = Channel(sock)
            (_, path, vocab), *more = channel.receive(wait=True)
            walker = Walker(channel, Grammars(Tokenizer.from_directory(path), vocab))
            channel.send(["ready"])
            for message in more:
                walker.handle(message)
            walker.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the engine is gone; a thread may still be compiling, and nobody waits for it
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
