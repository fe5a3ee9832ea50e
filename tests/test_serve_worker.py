"""Broken steps, aborts, draining and equal answers, also over an engine that runs ahead of itself, as on a GPU.

On a CPU the engine does not run ahead; here it is told to, in this process and in that of a real server.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic import LLM, SamplingParams
from moesaic.commands import _load
from moesaic.engine.runner import Flight, Runner
from moesaic.engine.scheduler import Step
from moesaic.serving.frames import Channel, Unpacker
from moesaic.serving.worker import Worker
from tests.cli_support import SRC
from tests.serve_support import Server, oracle

TOLD = """
import sys
if "moesaic.serving.worker" in sys.orig_argv:
    from moesaic.engine.engine import Engine
    made, ahead = Engine.__init__, Engine.launch_ahead
    def __init__(self, *args, **named):
        made(self, *args, **named)
        self.overlap = True
    def launch_ahead(self, flying):
        found = ahead(self, flying)
        with open({path!r}, "a") as file:
            file.write("-+"[found is not None])
        return found
    Engine.__init__, Engine.launch_ahead = __init__, launch_ahead
"""
"""A `sitecustomize.py` for the engine's process; it notes which steps were launched ahead."""


@pytest.fixture
def llm() -> Iterator[LLM]:
    found = oracle()
    found.engine.overlap = True
    yield found
    found.engine.overlap = False
    while found.engine.has_work:
        found.engine.step()
    found.engine.check()
    assert found.engine.scheduler.blocks.available == found.engine.scheduler.blocks.num_blocks - 1


class Wired:
    """A worker and the server's end of its channel."""

    def __init__(self, llm: LLM, ours: socket.socket, theirs: socket.socket) -> None:
        ours.setblocking(False)
        self.sock, self.unpacker, self.engine = ours, Unpacker(), llm.engine
        self.worker = Worker(llm, Channel(theirs))
        self.found: dict[str, list[Any]] = {}

    def add(self, name: str, prompt: list[int], **sampling: Any) -> None:
        self.worker.handle(["add", [[name, 0]], prompt, {"temperature": 0.0, **sampling}, None])

    def read(self) -> list[Any]:
        """What has come; pieces go to `found`: tokens by request, then how it ended."""
        try:
            messages = list(self.unpacker.feed(self.sock.recv(1 << 20)))
        except BlockingIOError:
            return []
        for message in messages:
            for name, _, tokens, *rest in message[1] if message[0] == "pieces" else []:
                self.found.setdefault(name, []).extend([*tokens, *rest[:1]])
        return [message for message in messages if message[0] != "pieces"]

    def finish(self) -> dict[str, list[Any]]:
        while self.engine.has_work:
            self.worker.step()
            self.read()
        return self.found


@pytest.fixture
def wired(llm: LLM) -> Iterator[Wired]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Wired(llm, ours, theirs)


PROMPTS = {"a": "Hello", "bad": "What", "c": "Count the letter o"}


def alone(wired: Wired, count: int) -> dict[str, list[Any]]:
    """The answers without running ahead, one after another."""
    wired.engine.overlap, found = False, {}
    for name, text in PROMPTS.items():
        wired.add(name, oracle().encode(text), max_tokens=count)
        found[name] = wired.finish()[name]
    wired.engine.overlap, wired.found = True, {}
    return found


def concerns(step: Step, output: int) -> bool:
    return any(chunk.request.id == "bad" and chunk.request.num_output == output for chunk in step.chunks)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["launch", "finish"])
def test_a_request_that_breaks_a_step_fails_alone(wired: Wired, where: str, overlap: bool,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    expected = alone(wired, 8)
    wired.engine.overlap = overlap
    launch, finish = Runner.launch, Flight.finish

    def breaking_launch(self: Runner, step: Step) -> Flight:
        if where == "launch" and concerns(step, 3):
            raise RuntimeError("boom")
        return launch(self, step)

    def breaking_finish(self: Flight) -> Any:
        found = finish(self)
        if where == "finish" and any(c.request.id == "bad" and c.start >= c.request.num_prompt + 2
                                     for c in self.step.chunks):  # fmt: skip
            raise RuntimeError("boom")
        return found

    monkeypatch.setattr(Runner, "launch", breaking_launch)
    monkeypatch.setattr(Flight, "finish", breaking_finish)
    for name, text in PROMPTS.items():
        wired.add(name, oracle().encode(text), max_tokens=8)
    found = wired.finish()
    assert found["bad"] == [*expected["bad"][:3], "error"]
    assert {name: found[name] for name in ("a", "c")} == {name: expected[name] for name in ("a", "c")}
    assert wired.worker.lost_steps == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_that_fails_everybody_is_given_up(wired: Wired, overlap: bool,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Whatever runs when it breaks is told so, one step that flew already included."""
    wired.engine.overlap = overlap
    for i in range(3):
        wired.add(f"r{i}", [5, 6, 7], max_tokens=9)
    wired.worker.step()
    assert (wired.engine.flying is not None) == overlap

    def broken(_: object) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Flight, "finish", broken)
    for i in (3, 4):
        wired.worker.step()
        wired.add(f"r{i}", [5, 6, 7], max_tokens=9)
    with pytest.raises(RuntimeError, match="3 steps failed"):
        wired.worker.step()
    wired.read()
    assert [wired.found[f"r{i}"][-1] for i in range(5)] == ["error"] * 5
    monkeypatch.undo()


@pytest.mark.parametrize("overlap", [False, True])
def test_text_that_cannot_be_made_fails_its_own_request(wired: Wired, overlap: bool,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    expected, delta = alone(wired, 4), wired.engine.delta
    wired.engine.overlap = overlap

    def broken(request: Any, token: int, logprobs: Any) -> Any:
        if request.id == "bad":
            raise ValueError("no text")
        return delta(request, token, logprobs)

    monkeypatch.setattr(wired.engine, "delta", broken)
    for name, text in PROMPTS.items():
        wired.add(name, oracle().encode(text), max_tokens=4)
    assert wired.finish() == {**expected, "bad": ["error"]}


def test_what_is_aborted_in_flight_says_nothing_more(wired: Wired) -> None:
    expected = alone(wired, 8)
    for name, text in PROMPTS.items():
        wired.add(name, oracle().encode(text), max_tokens=8)
    for _ in range(3):
        wired.worker.step()
    wired.read()
    assert wired.engine.flying is not None
    said = len(wired.found["bad"])
    wired.worker.handle(["abort", ["bad"]])
    blocks = wired.engine.scheduler.blocks
    held = sum(len(request.blocks) for request in wired.engine.scheduler._running)
    assert blocks.num_blocks - 1 - blocks.available == held, "its blocks are free at once"
    assert len(wired.finish()["bad"]) == said
    assert {name: wired.found[name] for name in ("a", "c")} == {name: expected[name] for name in ("a", "c")}


def test_the_cache_is_flushed_behind_a_step_that_flies_for_nobody(wired: Wired) -> None:
    prompt = list(range(10, 74))
    wired.engine.overlap = False
    wired.add("x", prompt, max_tokens=6)
    expected = wired.finish()["x"]
    wired.engine.overlap, wired.found = True, {}
    wired.add("y", prompt, max_tokens=6)
    for _ in range(2):
        wired.worker.step()
    wired.worker.handle(["flush", 1])
    kind, token, problem = wired.read()[-1]
    assert (kind, token) == ("flushed", 1)
    assert problem is not None, "a request holds blocks"
    wired.worker.handle(["abort", ["y"]])
    assert wired.engine.has_work, "a step flies"
    wired.worker.handle(["flush", 2])
    assert wired.read()[-1] == ["flushed", 2, None]
    wired.add("z", prompt, max_tokens=6)
    assert wired.finish()["z"] == expected


def test_the_load_of_experts_is_the_same(wired: Wired) -> None:
    loads = []
    for overlap in (False, True):
        wired.engine.overlap = overlap
        wired.worker.meter.start()
        before = wired.engine.stats.steps
        for name, text in PROMPTS.items():
            wired.worker.count_again = 0.0
            wired.add(name, oracle().encode(text), max_tokens=7)
        while wired.engine.has_work:
            wired.worker.count_again = 0.0
            wired.worker.step()
        stats = wired.worker.stats()
        assert stats["counted_steps"] == wired.engine.stats.steps - before
        loads.append(stats["experts"])
    assert loads[0] == loads[1]


# --- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Path]:
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "sitecustomize.py").write_text(TOLD.format(path=str(folder / "launches")))
    return Server("--deterministic", "--served-model-name", "tiny", "--drain-timeout", "20",
                  PYTHONPATH=f"{folder}:{SRC}"), folder / "launches"  # fmt: skip


def test_a_server_that_runs_ahead(ahead: tuple[Server, Path]) -> None:
    """Streams, some of which are left in the middle: those that stay are as without a server and without running ahead;
    then one that takes too long, and SIGTERM under a stream."""
    server, launches = ahead
    load = _load.Load(server.base, "tiny", 40, None, 24, (3, 30), (2, 30), 5)
    plans = _load.plans(load)
    rng = random.Random(0)

    async def leave() -> int:
        count = 0
        async with server.async_client() as client:
            for _ in range(25):
                stream = await client.completions.create(model="tiny", prompt="Hello", max_tokens=400, stream=True,
                                                         temperature=0, extra_body={"ignore_eos": True})  # fmt: skip
                for _ in range(rng.randint(1, 5)):
                    await anext(aiter(stream))
                await stream.close()
                count += 1
        return count

    async def both() -> tuple[list[_load.Sample], int]:
        (samples, _), left = await asyncio.gather(_load.run(load), leave())
        return samples, left

    samples, left = asyncio.run(both())
    params = [SamplingParams(temperature=0, max_tokens=limit) for _, _, limit in plans]
    expected = [result.text for result in oracle().generate([prompt for _, prompt, _ in plans], params)]
    assert [sample.error for sample in samples] == [None] * 40
    assert [sample.text for sample in samples] == expected
    server.until(server.idle, 5)
    assert server.metric("aborts_total", reason="disconnect") == left == 25
    assert Counter(launches.read_text())["+"] > 100, "it did run ahead"
    assert server.post("/flush_cache", None).json() == {"status": "ok"}
    drained(server)


def drained(server: Server) -> None:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.terminate()
        rest = list(lines)
    assert "data: [DONE]" in rest
    began = time.monotonic()
    assert server.process.wait(20) == 0
    assert time.monotonic() - began < 10
