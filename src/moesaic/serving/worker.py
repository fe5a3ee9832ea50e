"""The engine's process: reads messages between steps, computes, writes one message per step.

Started by `process.py` as `python -m moesaic.serving.worker FD PARENT`: its end of a socket pair, and the process that
has the other. It leaves when the other side does; signals are the server's business, so that a whole group can be told
to stop and still drain.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from moesaic.contracts.spec import MoESpec
from moesaic.engine.engine import Engine, Stats
from moesaic.engine.params import SamplingParams
from moesaic.errors import MoesaicError
from moesaic.serving.faults import MAX_LOST_STEPS, isolate
from moesaic.serving.frames import Channel, Message
from moesaic.serving.guides import Guides, Guiding, Ids
from moesaic.serving.parent import die_with_parent, give_back_memory, resident_bytes, settle
from moesaic.serving.wire import params_to_wire, piece_to_wire

if TYPE_CHECKING:
    from moesaic.contracts.plan import ModelPlan
    from moesaic.engine.output import Delta
    from moesaic.llm import LLM

log = logging.getLogger("moesaic.engine")
COUNT_PART = 0.01
"""The part of the time that goes, at most, into steps that are made to count the experts' choices. On a CPU such a step
is made kernel by kernel, without tape, and may take several times as long as its neighbours: so it is time that is
rationed, not steps, and what a step costs extra cannot exceed the whole of it. CUDA graphs count by themselves."""

TIDY_IDLE, TIDY_BUSY = 1.0, 30.0
"""Seconds between two times that freed memory is given back: some milliseconds, best where nobody waits."""


class Worker:
    """An engine behind a channel. experts: sample the load of the experts."""

    def __init__(self, llm: LLM, channel: Channel, *, experts: bool = True) -> None:
        self.llm, self.engine, self.channel, self.experts = llm, llm.engine, channel, experts
        self.guides = Guides(llm.path, self.engine.vocab)
        self.lost_steps = 0
        self.meter = self.engine.runner.model.meter
        self.meter.start()
        self.count_again = 0.0  # when the next step may be counted
        self.tidied = time.perf_counter()
        layers = self.engine.runner.model.spec.layers  # draft layers are metered after them, and do not run
        self.mixtures = [layer.index for layer in layers if isinstance(layer.mlp, MoESpec)]

    def run(self) -> None:
        """Until the other side leaves (EOFError)."""
        while True:
            self.tidy()
            limit = 1.0 if self.guides.pending else None
            wait = not self.engine.has_work
            for message in self.channel.receive(wait=wait, also=self.guides.sources, seconds=limit):
                self.handle(message)
            for ids, prompt, sampling, guide in self.guides.ready():
                self.queue(ids, prompt, sampling, guide)
            if self.engine.has_work:
                self.step()

    def tidy(self) -> None:
        now = time.perf_counter()
        if now - self.tidied > (TIDY_BUSY if self.engine.has_work else TIDY_IDLE):
            give_back_memory()
            self.tidied = time.perf_counter()

    def handle(self, message: Message) -> None:
        kind, *rest = message
        if kind == "add":
            self.add(*rest)
        elif kind == "abort":
            self.guides.forget(rest[0])
            for request_id in rest[0]:
                self.engine.abort(request_id)
        elif kind == "stats":
            self.channel.send(["stats", rest[0], self.stats()])
        elif kind == "flush":
            self.channel.send(["flushed", rest[0], self.flush()])
        else:
            raise ValueError(f"unknown message {kind!r}")

    def add(self, ids: Ids, prompt: list[int], sampling: dict[str, Any], grammar: list[str] | None) -> None:
        """Queues all completions of a prompt, at once or when their grammar is compiled."""
        if grammar is None:
            self.queue(ids, prompt, sampling)
        else:
            self.guides.start(ids, prompt, sampling, grammar)

    def queue(self, ids: Ids, prompt: list[int], sampling: dict[str, Any], guide: Guiding | None = None) -> None:
        """If one completion is refused, none stays."""
        try:
            params = SamplingParams(**sampling)
            make = None if guide is None else guide()
            for request_id, index in ids:
                self.engine.add(request_id, prompt, params, index, make)
        except Exception as error:
            for request_id, _ in ids:
                self.engine.abort(request_id)
            self.channel.send(["refused", [request_id for request_id, _ in ids], problem(error)])

    def step(self) -> None:
        """One step. An exception ends the requests that cause it; an engine that fails everybody is given up."""
        began = time.perf_counter()
        self.meter.on = self.experts and began >= self.count_again
        try:
            deltas = self.engine.step()
            self.lost_steps = 0
        except Exception as error:
            if not isinstance(error, MoesaicError):
                log.exception("a step failed")
            deltas, spared = isolate(self.engine)
            self.lost_steps = 0 if spared else self.lost_steps + 1
            if self.lost_steps >= MAX_LOST_STEPS:
                self.say(deltas)
                raise RuntimeError(f"{self.lost_steps} steps failed one after another") from error
        if self.meter.on:
            ended = time.perf_counter()
            self.count_again = ended + (ended - began) * (1 / COUNT_PART - 1)
        self.say(deltas)

    def say(self, deltas: list[Delta]) -> None:
        if deltas:
            self.channel.send(["pieces", [piece_to_wire(delta) for delta in deltas]])

    def stats(self) -> dict[str, Any]:
        """The engine's counts and gauges; `experts`: sampled choices of each expert, by layer."""
        scheduler, stats = self.engine.scheduler, self.engine.stats
        blocks = scheduler.blocks
        return {
            "waiting": scheduler.num_waiting, "running": scheduler.num_running, "steps": stats.steps,
            "preemptions": stats.preemptions, "near_ties": stats.near_ties,
            "prefix_queried": blocks.queried, "prefix_hits": blocks.hits,
            "kv_blocks": blocks.num_blocks - 1, "kv_blocks_used": blocks.num_blocks - 1 - blocks.available,
            "resident": resident_bytes(), "counted_steps": self.meter.steps if self.experts else 0,
            "experts": self.loads() if self.experts else [],
        }  # fmt: skip

    def loads(self) -> list[list[Any]]:
        """[layer, choices of each expert] of every mixture layer."""
        return [[at, list(load.counts)] for at, load in zip(self.mixtures, self.meter.loads(), strict=False)]

    def flush(self) -> str | None:
        """Forgets the prefix cache; why not, if it cannot."""
        try:
            self.engine.scheduler.blocks.reset()
        except MoesaicError as error:
            return error.one_line()
        return None


def problem(error: Exception) -> dict[str, Any]:
    """What to tell the client of a request that was refused."""
    if isinstance(error, MoesaicError):
        return {"status": error.http_status, "what": error.what, "where": error.where, "remedy": error.remedy}
    log.error("a request could not be queued", exc_info=error)
    return {"status": 500, "what": "the request could not be queued", "where": None, "remedy": None}


class Told(logging.Handler):
    """Log records go to the server, which knows where and how they are to be written."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(logging.WARNING)
        self.channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self.channel.send(["log", record.levelno, self.format(record)])


def warm_up(engine: Engine) -> None:
    """A few tokens for nobody: what is made on first use is made before the first client waits for it."""
    for prompt in ([0], [0] * 40):  # the second decode of a shape may do more for the first time than the first
        room = min(engine.scheduler.config.max_model_len, engine.scheduler.blocks.capacity)
        if len(prompt) + 8 <= room:
            engine.add("warm-up", prompt, SamplingParams(max_tokens=8, ignore_eos=True, seed=0))
        while engine.has_work:
            engine.step()
    engine.scheduler.blocks.reset()
    engine.scheduler.blocks.queried = engine.scheduler.blocks.hits = 0
    engine.stats = Stats()


def describe(llm: LLM) -> dict[str, Any]:
    """What the server needs to know of the model; `path` is where its tokenizer lies."""
    launched = llm.launched
    return {
        "path": str(llm.path), "summary": launched.summary(), "notes": list(launched.built.plan.notes),
        "architecture": launched.built.model.spec.architecture, "vocab": llm.engine.vocab,
        "max_model_len": llm.max_model_len, "max_num_seqs": llm.config.max_num_seqs,
        "defaults": params_to_wire(llm.defaults), "plan": plan_json(launched.built.plan),
        "kv_blocks": launched.blocks - 1, "block_size": llm.config.block_size,
    }  # fmt: skip


def plan_json(plan: ModelPlan) -> dict[str, Any]:
    """The plan that the model was built from; its table of ops as a list, for its keys are no strings."""
    ops = [{"need": plain(need), "choices": plain(choices)} for need, choices in plan.ops.items()]
    found: dict[str, Any] = plain(replace(plan, ops={}))
    return found | {"ops": ops}


def plain(value: Any) -> Any:
    """Dataclasses, enums, sets and tuples as JSON values; sets sorted."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (frozenset, set)):
        return sorted(plain(each) for each in value)
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): plain(each) for key, each in value.items()}
    return value


def main(descriptor: int, parent: int) -> int:
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="moesaic engine: %(message)s")
    try:
        with socket.socket(fileno=descriptor) as sock:
            channel = Channel(sock)
            logging.getLogger("moesaic").addHandler(Told(channel))
            logging.getLogger("moesaic").propagate = False
            kind, start = channel.receive(wait=True)[0]
            if kind != "start":
                raise ValueError(f"unknown message {kind!r}")
            return serve(channel, start)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the server is gone: nobody waits for an answer


def serve(channel: Channel, start: dict[str, Any]) -> int:
    from moesaic.llm import LLM

    try:
        llm = LLM(start["model"], **start["options"])
    except MoesaicError as error:
        channel.send(["failed", error.exit_code, error.one_line()])
        channel.drain()
        return error.exit_code
    warm_up(llm.engine)
    channel.send(["ready", describe(llm)])
    settle()
    Worker(llm, channel, experts=start["experts"]).run()
    raise AssertionError("run ends by an exception")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
