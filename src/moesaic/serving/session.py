"""Between HTTP handlers and the engine's process: admission, jobs, aborts, and what happens when the engine dies.

Everything here runs on one event loop; nothing waits for a step but those who asked for its result.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from moesaic.engine.params import SamplingParams
from moesaic.serving.errors import HTTPError, busy, invalid, unavailable
from moesaic.serving.frames import Message, Unpacker, packer
from moesaic.serving.logs import log
from moesaic.serving.metrics import Metrics
from moesaic.serving.parent import give_back_memory
from moesaic.serving.process import EngineFailed, EngineProcess
from moesaic.serving.wire import Piece, params_to_wire, piece_from_wire


class Ask(NamedTuple):
    """A prompt's token ids, and what is asked of it: `params.n` completions, held to a grammar (kind, text) if any."""

    prompt: Sequence[int]
    params: SamplingParams
    grammar: tuple[str, str] | None = None


MOST_UNREAD = 8192
"""Tokens, log-probs counted as such, that the reader of a stream may lag behind what its connection buffers."""


class Job:
    """All completions of one HTTP request: completion i of prompt p has index p * n + i.

    behind: called when its reader lags too far behind; None: it collects all, and lags by design.
    """

    def __init__(self, session: Session, ids: Sequence[str]) -> None:
        self.session, self.index = session, {request_id: i for i, request_id in enumerate(ids)}
        self.live = set(ids)
        self.pieces: list[Piece] = []
        self.unread = 0
        self.behind: Callable[[], None] | None = None
        self.failure: HTTPError | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.arrived = time.perf_counter()
        self.latest: dict[str, float] = {}

    async def next(self) -> list[Piece]:
        """What has come since the last call; waits if nothing has. Empty once all is said. Raises HTTPError."""
        while not self.pieces and self.live and self.failure is None:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        if self.failure is not None:
            raise self.failure
        pieces, self.pieces, self.unread = self.pieces, [], 0
        return pieces

    def put(self, piece: Piece) -> None:
        """Takes what the engine says. The time of every piece is that of its arrival here."""
        now = time.perf_counter()
        metrics, before = self.session.metrics, self.latest.get(piece.id)
        if before is None:
            metrics.first_token.observe(now - self.arrived)
        else:
            metrics.between_tokens.observe(now - before)
        self.latest[piece.id] = now
        metrics.generated.inc(len(piece.tokens))
        if piece.finish is not None:
            self.live.discard(piece.id)
            self.session.forget(piece.id)
            metrics.finished(piece.finish, now - self.arrived)
            self.session.took(now - self.arrived)
        if piece.error is not None:
            self.fail(HTTPError(piece.status, piece.error, code="request_failed"), None)
        self.pieces.append(piece)
        self.unread += len(piece.tokens) + sum(len(each.top) for each in piece.logprobs)
        self.wake()
        if self.behind is not None and self.unread > MOST_UNREAD:
            self.pieces = []
            self.fail(HTTPError(408, "the stream was not read fast enough", code="slow_reader"), "slow_reader")
            self.behind()

    def fail(self, failure: HTTPError, reason: str | None) -> None:
        """Ends the job: its reader gets the failure, the engine is told to free what runs. reason: for the metrics."""
        self.failure = self.failure or failure
        self.close(reason)
        self.wake()

    def close(self, reason: str | None = "disconnect") -> None:
        """Frees what is still running, at once. Safe to call again."""
        if self.live:
            if reason is not None:
                self.session.metrics.aborted.labels(reason).inc(len(self.live))
            self.session.abort(self.live)
            self.live = set()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Session(asyncio.Protocol):
    """The one connection to the engine. state: loading, ready, draining or dead."""

    def __init__(self, metrics: Metrics, max_queue: int) -> None:
        self.metrics, self.max_queue = metrics, max_queue
        self.state = "loading"
        self.info: dict[str, Any] = {}
        self.jobs: dict[str, Job] = {}
        self.numbers = itertools.count()
        self.pack, self.unpacker = packer(), Unpacker()
        self.answers: dict[int, asyncio.Future[Any]] = {}
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.died: asyncio.Future[EngineFailed] = asyncio.get_running_loop().create_future()
        self.heard = time.monotonic()  # from the engine
        self.verdict: str | None = None  # why it was ended by us
        self.seconds_each = 1.0  # of one completion, a moving average, for Retry-After
        self.process: EngineProcess | None = None
        self.transport: asyncio.Transport | None = None

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self, model: str, options: Mapping[str, Any], *, experts: bool = True) -> None:
        """Starts the process and loads the model. Raises EngineFailed with the engine's own exit code and words."""
        self.process = await EngineProcess.start()
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, sock=self.process.sock)
        self.send(["start", {"model": model, "options": dict(options), "experts": experts}])
        waiting: set[asyncio.Future[Any]] = {self.ready, self.died}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not self.ready.done():
            raise self.died.result()

    def open(self) -> None:
        """From now on requests are taken."""
        if self.state == "loading":
            self.state = "ready"

    async def stop(self) -> None:
        """Closes the connection, upon which the engine leaves."""
        self.state = "dead" if self.state == "dead" else "draining"
        if self.transport is not None:
            self.transport.close()
        if self.process is not None:
            await self.process.stop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # other loops' transports are of their own types

    async def watch(self, seconds: float) -> None:
        """Ends an engine that says nothing for so long, although it is asked: one that hangs is as good as dead.

        Keeps this process tidy, too.
        """
        strikes, pause = 0, min(5.0, seconds / 4)
        self.heard = time.monotonic()
        while self.state in ("ready", "draining"):
            self.send(["stats", next(self.numbers)])
            gc.collect()  # connections end in circles, some with a URL of 64 KiB; there is little else to look at
            give_back_memory()
            await asyncio.sleep(pause)
            # Twice, since it may be this loop that was held up, with the answer lying in the socket.
            strikes = strikes + 1 if time.monotonic() - self.heard > seconds else 0
            if strikes > 1 and self.process is not None:
                self.verdict = f"has not answered for {seconds:g} s"
                self.process.process.kill()
                return

    def data_received(self, data: bytes) -> None:
        self.heard = time.monotonic()
        for message in self.unpacker.feed(data):
            self.handle(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.state = "dead"
        self.reaper = asyncio.get_running_loop().create_task(self.reap())
        gone = unavailable("the engine has died", 10)
        for job in set(self.jobs.values()):
            job.live = set()
            job.failure = job.failure or gone
            job.wake()
        self.jobs.clear()
        for answer in self.answers.values():
            if not answer.done():
                answer.set_exception(gone)

    async def reap(self) -> None:
        """After the connection broke: how did the process end?"""
        assert self.process is not None
        try:
            how = await asyncio.wait_for(self.process.ended(), 5.0)
        except TimeoutError:
            how = "closed its connection"
        how = self.verdict or how
        if not self.died.done():
            self.died.set_result(EngineFailed(f"the engine process {how}"))

    # --- messages -----------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(self.pack(message))

    def handle(self, message: Message) -> None:
        kind, *rest = message
        if kind == "pieces":
            for values in rest[0]:
                job = self.jobs.get(values[0])
                if job is not None:
                    job.put(piece_from_wire(values))
        elif kind == "refused":
            self.refused(*rest)
        elif kind in ("stats", "flushed"):
            answer = self.answers.pop(rest[0], None)
            if answer is not None and not answer.done():
                answer.set_result(rest[1])
        elif kind == "log":
            log.log(rest[0], "engine: %s", rest[1])
        elif kind == "ready":
            self.info = rest[0]
            self.ready.set_result(None)
        elif kind == "failed":
            self.died.set_result(EngineFailed(rest[1], rest[0]))

    def refused(self, ids: Sequence[str], why: Mapping[str, Any]) -> None:
        job = self.jobs.get(ids[0])
        if job is not None:
            self.metrics.rejected.labels("invalid").inc()
            job.live -= set(ids)
            for request_id in ids:
                self.forget(request_id)
            job.fail(HTTPError.problem(why["status"], why["what"], why["where"], why["remedy"]), None)

    async def ask(self, kind: str, patience: float) -> Any:
        """A question to the engine, answered between two steps. Raises TimeoutError, HTTPError."""
        self.check_open()
        token = next(self.numbers)
        answer = self.answers[token] = asyncio.get_running_loop().create_future()
        self.send([kind, token])
        try:
            return await asyncio.wait_for(answer, patience)
        finally:
            self.answers.pop(token, None)

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Completions that may be alive, running ones included."""
        return int(self.info["max_num_seqs"]) + self.max_queue

    def check_open(self) -> None:
        """Raises HTTPError 503 unless requests can be taken."""
        if self.state == "loading":
            raise unavailable("the model is being loaded", 5)
        if self.state == "draining":
            raise unavailable("the server is shutting down", 10)
        if self.state == "dead":
            raise unavailable("the engine has died", 10)

    def submit(self, asks: Sequence[Ask]) -> Job:
        """Queues all completions of a request, or none. Raises HTTPError: 503 not open, 429 full, 400 far too many."""
        self.check_open()
        count = sum(ask.params.n for ask in asks)
        if count > self.capacity:
            raise invalid("n", f"{count} completions in one request, of at most {self.capacity}")
        if len(self.jobs) + count > self.capacity:
            self.metrics.rejected.labels("queue_full").inc()
            raise busy(f"{len(self.jobs)} completions are running or waiting already", self.retry_after())
        number = next(self.numbers)
        ids = [f"{number}.{i}" for i in range(count)]
        job = Job(self, ids)
        self.jobs.update(dict.fromkeys(ids, job))
        at = 0
        for prompt, params, grammar in asks:
            part = [[ids[at + i], i] for i in range(params.n)]
            at += params.n
            self.metrics.prompt.inc(len(prompt))
            self.send(["add", part, list(prompt), params_to_wire(params), grammar])
        return job

    def abort(self, ids: set[str]) -> None:
        self.send(["abort", list(ids)])
        for request_id in ids:
            self.forget(request_id)

    def forget(self, request_id: str) -> None:
        self.jobs.pop(request_id, None)

    def took(self, seconds: float) -> None:
        self.seconds_each += 0.1 * (seconds - self.seconds_each)

    def retry_after(self) -> int:
        """Seconds until about as many completions as run now have ended."""
        return max(1, min(60, math.ceil(self.seconds_each)))
