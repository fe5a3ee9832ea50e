"""Running ahead: the next step is scheduled and launched before the last one's tokens are known. Nobody may notice.

The scheduler and the cache run ahead under random use with a naive device, which computes each step when it is
launched, from what it has computed itself; the real engine is held against itself without running ahead.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.config import EngineConfig
from moesaic.engine import draw
from moesaic.engine.blocks import BlockManager
from moesaic.engine.engine import Engine
from moesaic.engine.launch import launch
from moesaic.engine.output import Delta
from moesaic.engine.params import SamplingParams
from moesaic.engine.request import FinishReason, Request, Status
from moesaic.engine.runner import Flight, Runner
from moesaic.engine.scheduler import PENDING, Scheduler, SchedulerConfig, Step
from moesaic.models.checkpoint import Checkpoint
from tests.checkpoints import random_model, save
from tests.request_streams import answers, summary
from tests.test_scheduler_fuzz import EOS, expected, toy_model

COUNTS: Counter[str] = Counter()


class Device:
    """Computes steps as they are launched, in order; knows nothing of what the host decides afterwards."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.newest: dict[Request, int] = {}  # the last step's choices

    def run(self, step: Step, lies: dict[Request, int]) -> dict[Request, int]:
        """The tokens that the step chose. lies: what the next step will be told instead."""
        read = {}
        for request, start, count, _ in step.chunks:
            tokens = list(request.tokens[: start + count])
            if tokens[-1] == PENDING:
                tokens[-1] = self.newest[request]
            assert PENDING not in tokens
            for position in range(start, start + count):
                at = request.blocks[position // self.size], position % self.size
                self.slots[at] = tuple(tokens[: position + 1])
            read[request] = tokens
        for request, tokens in read.items():
            for position in range(len(tokens)):
                at = request.blocks[position // self.size], position % self.size
                assert self.slots[at] == tuple(tokens[: position + 1]), "someone else's context"
        chosen = {c.request: toy_model(read[c.request]) for c in step.chunks if c.sample}
        self.newest = chosen | {request: token for request, token in lies.items() if request in chosen}
        return chosen


class AheadEngine:
    """The engine's loop in short, with a naive device and everything that must hold."""

    def __init__(self, config: SchedulerConfig, blocks: int, size: int, rng: random.Random) -> None:
        self.scheduler = Scheduler(config, BlockManager(blocks, size))
        self.device, self.rng, self.blocks = Device(size), rng, blocks
        self.limit = min(config.max_model_len, (blocks - 1) * size)
        self.flying: tuple[Step, dict[Request, int], dict[Request, int]] | None = None
        self.alive: list[Request] = []
        self.names = 0

    def add(self, prompt: list[int], params: SamplingParams) -> None:
        request = Request(f"r{self.names}", prompt, params, EOS)
        self.names += 1
        if len(prompt) + max(1, params.max_tokens or 0) <= self.limit:
            self.scheduler.add(request)
            self.alive.append(request)
            COUNTS["requests"] += 1

    def launch(self) -> bool:
        step = self.scheduler.schedule()
        self.scheduler.check()
        if step is None:
            self.flying = None
            return False
        assert all(c.start + c.count < c.request.max_total for c in step.chunks), "a token behind the last one"
        lies = {c.request: 1 for c in step.chunks if c.sample and self.rng.random() < 0.1}
        self.flying = step, self.device.run(step, lies), lies
        COUNTS["steps"] += 1
        COUNTS["preemptions"] += len(step.preempted)
        return True

    def step(self) -> None:
        if self.flying is None and not self.launch():
            assert not self.alive, "work and no step"
            return
        assert self.flying is not None
        (step, chosen, lies), self.flying = self.flying, None
        if self.rng.random() < 0.8:
            self.scheduler.advance(step)
            ahead = self.launch()
            COUNTS["steps ahead"] += ahead
            COUNTS["nothing ahead"] += not ahead
            if ahead and self.rng.random() < 0.05:
                return self.fail(step)
        elif self.rng.random() < 0.05:
            self.scheduler.discard(step)
            COUNTS["discarded"] += 1
            return None
        self.land(step, chosen, lies)
        return None

    def fail(self, step: Step) -> None:
        """Neither step ran."""
        assert self.flying is not None
        self.scheduler.discard(self.flying[0])
        self.scheduler.discard(step)
        self.flying = None
        self.scheduler.check()
        assert all(PENDING not in request.tokens for request in self.alive)
        COUNTS["discarded in pairs"] += 1

    def land(self, step: Step, chosen: dict[Request, int], lies: dict[Request, int]) -> None:
        counted = {c.request: self.scheduler.counts(step, c.request) for c in step.chunks}
        before = {request: len(request.output) for request in counted}
        finished = self.scheduler.commit(step, [chosen[c.request] for c in step.chunks if c.sample])
        for request in lies.keys() & chosen.keys():
            if lies[request] != chosen[request]:
                self.scheduler.void(request)
                COUNTS["late tokens"] += 1
        self.scheduler.check()
        for request in finished:
            wanted = expected(request.prompt, request.params, self.limit)
            assert (request.output, request.finish_reason, request.stop_reason) == wanted
            self.alive.remove(request)
            COUNTS["finished"] += 1
        for request, count in before.items():
            if request.status is not Status.FINISHED:
                assert PENDING not in request.tokens
                assert counted[request] or len(request.output) <= count
        surplus = [c for c in step.chunks if c.request.status is Status.FINISHED and c.request not in finished]
        COUNTS["tokens for nobody"] += len(surplus)

    def end_early(self, request: Request) -> None:
        if self.rng.random() < 0.5:
            self.scheduler.abort(request.id)
        else:
            self.scheduler.finish(request, FinishReason.STOP, "###")
        self.alive.remove(request)
        self.scheduler.check()
        COUNTS["ended early"] += 1


@pytest.mark.parametrize("seed", range(40))
def test_the_scheduler_runs_ahead_under_memory_pressure(seed: int) -> None:
    rng = random.Random(seed)
    chunk, size = rng.choice([None, None, 4, 6]), rng.choice([1, 2, 4])
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=24, max_model_len=40, chunk_size=chunk)
    engine = AheadEngine(config, 2 + -(-rng.randint(40, 100) // size), size, rng)
    heads = [[rng.randrange(3) for _ in range(20)] for _ in range(3)]
    for _ in range(200):
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            prompt = rng.choice(heads)[: rng.randint(0, 20)] + [rng.randrange(3) for _ in range(rng.randint(1, 4))]
            engine.add(prompt, SamplingParams(max_tokens=rng.randint(1, 16), ignore_eos=rng.random() < 0.5))
        if engine.alive and rng.random() < 0.1:
            engine.end_early(rng.choice(engine.alive))
        engine.step()
    bound = 5000
    while engine.alive or engine.flying is not None:
        engine.step()
        bound -= 1
        assert bound, "the requests do not end"
    assert not engine.scheduler.has_work
    assert engine.scheduler.blocks.available == engine.blocks - 1, "blocks leaked"
    engine.scheduler.blocks.check([])


def test_everything_was_met() -> None:
    """The last of these runs: each thing that can happen happened often enough to be tested."""
    print("\nrunning ahead:", dict(COUNTS))
    for name in ("steps ahead", "nothing ahead", "late tokens", "tokens for nobody", "discarded in pairs", "finished",
                 "preemptions", "ended early"):  # fmt: skip
        assert COUNTS[name] > 20, name


def test_steps_go_in_order() -> None:
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=9)
    scheduler = Scheduler(config, BlockManager(9, 2))
    scheduler.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=4)))
    first = scheduler.schedule()
    assert first is not None
    with pytest.raises(RuntimeError, match="advance it"):
        scheduler.schedule()
    scheduler.advance(first)
    second = scheduler.schedule()
    assert second is not None
    with pytest.raises(RuntimeError, match="another is ahead"):
        scheduler.advance(second)
    with pytest.raises(RuntimeError, match="one before it is"):
        scheduler.commit(second, [1])
    with pytest.raises(RuntimeError, match="a later one is"):
        scheduler.discard(first)
    scheduler.commit(first, [7])
    scheduler.advance(second)
    scheduler.commit(second, [8])
    assert scheduler.abort("a").output == [7, 8]  # type: ignore[union-attr]


# --- the real engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 256, "max_position_embeddings": 256}
    more = {"n_group": 2, "topk_group": 1} if request.param == "deepseek_v3" else {}
    return save(random_model(request.param, **(sizes | more)), tmp_path_factory.mktemp("ahead"))


def engine_of(folder: Path, *, overlap: bool, **options: Any) -> Engine:
    usual = {"progress": False, "deterministic": True, "block_size": 4, "max_num_batched_tokens": 256}
    with Checkpoint.open(folder) as checkpoint:
        engine = launch(checkpoint, EngineConfig(**(usual | options)), None).engine
    engine.overlap = overlap
    return engine


def test_the_engine_answers_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few candidates for a nucleus, so that tokens come late and what was launched behind them is void."""
    monkeypatch.setattr(draw, "NARROW", 4)
    voided = Counter[str]()
    real = Scheduler.void
    monkeypatch.setattr(Scheduler, "void", lambda self, request: (voided.update(["void"]), real(self, request))[1])
    plain = engine_of(folder, overlap=False)
    ahead = engine_of(folder, overlap=True)
    launched = watch(ahead, monkeypatch)
    expected_answers = summary(answers(plain, random.Random(1)))
    assert not plain.flying
    voided.clear()
    assert summary(answers(ahead, random.Random(1))) == expected_answers
    assert summary(answers(ahead, random.Random(2))) == expected_answers, "over a filled cache, in another order"
    assert launched["ahead"] > 40
    assert voided["void"] > 5
    assert ahead.stats.generated_tokens == 2 * plain.stats.generated_tokens
    assert ahead.scheduler.blocks.available == ahead.scheduler.blocks.num_blocks - 1


def test_tokens_that_come_late_one_after_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was launched behind a late token is void. If it comes late itself, that says nothing of what was launched
    behind it, which was made when the first token was known: else a request alone would never get on."""
    monkeypatch.setattr(draw, "NARROW", 1)
    params = SamplingParams(temperature=3.0, top_p=0.999, seed=1, max_tokens=12, ignore_eos=True)
    found = []
    for overlap in (False, True):
        engine, tokens, steps = engine_of(folder, overlap=overlap), [], 0
        engine.add("alone", [5, 6, 7], params)
        while engine.has_work and steps < 50:
            tokens += [token for delta in engine.step() for token in delta.tokens]
            steps += 1
        found.append(tokens)
    assert found[0] == found[1]
    assert len(found[0]) == 12


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the steps launched while another was flying."""
    counts, real = Counter[str](), engine.launch

    def launch_and_count() -> Flight | None:
        flight = real()
        counts["ahead"] += flight is not None and engine.flying is not None
        return flight

    monkeypatch.setattr(engine, "launch", launch_and_count)
    return counts


def test_the_engine_answers_the_same_when_pressed(folder: Path) -> None:
    """A cache so small that requests are preempted, and some are aborted in flight: those that end are the same."""
    plain = summary(answers(engine_of(folder, overlap=False), random.Random(3)))
    pool = engine_of(folder, overlap=False, max_num_seqs=1).runner.pool
    row = pool.nbytes // len(pool.layers[0])
    ahead = engine_of(folder, overlap=True, max_model_len=84, kv_memory=row * 4 * 26, max_num_seqs=8)
    found = {name: deltas for name, deltas in answers(ahead, random.Random(4), aborts=True).items() if deltas}
    whole = {name: each for name, each in summary(found).items() if found[name][-1].finish_reason is not None}
    assert len(whole) > 15
    assert whole == {name: plain[name] for name in whole}
    assert ahead.stats.preemptions > 0
    assert not ahead.states
    assert not ahead.has_work
    assert ahead.scheduler.blocks.available == ahead.scheduler.blocks.num_blocks - 1


def test_an_id_that_comes_again_gets_only_its_own_tokens(folder: Path) -> None:
    """A request is aborted while the step with its next token flies; another comes under its name."""
    engine = engine_of(folder, overlap=True)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine.add("x", [5, 6, 7], params)
    for _ in range(3):
        engine.step()
    assert engine.flying is not None
    engine.abort("x")
    engine.add("x", [9, 8], params)
    got = [t for _ in iter(lambda: engine.has_work, False) for d in engine.step() for t in d.tokens]
    other = engine_of(folder, overlap=False)
    other.add("x", [9, 8], params)
    assert got == [t for _ in iter(lambda: other.has_work, False) for d in other.step() for t in d.tokens]


@pytest.mark.parametrize("where", ["launch", "finish"])
def test_a_step_that_fails_leaves_nothing_behind(folder: Path, where: str, monkeypatch: pytest.MonkeyPatch,
                                                 caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """Ahead, a failed launch is logged and tried again by itself; a failed landing is raised, both steps are undone."""
    engine, params = engine_of(folder, overlap=True), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for name in "abc":
        engine.add(name, [5, 6, ord(name)], params)
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(Runner if where == "launch" else Flight, where, refuse)
        if where == "launch":
            with caplog.at_level(logging.ERROR):
                assert len(engine.step()) == 3, "the step before it is read all the same"
            assert "could not be launched ahead" in caplog.text
        with pytest.raises(ZeroDivisionError):
            engine.step()
        assert engine.flying is None
        engine.check()
    counts = Counter(d.request_id for _ in iter(lambda: engine.has_work, False) for d in engine.step())
    assert sum(counts.values()) + (3 if where == "launch" else 0) + 3 == 27
    engine.check()


def refuse(*_: object) -> Any:
    raise ZeroDivisionError


def test_grammars_are_waited_for(folder: Path) -> None:
    """What may come next depends on the token that was chosen, so nothing is launched before it is known."""
    import numpy as np

    class OnlyEven:
        """Allows the even tokens after an odd number of accepted ones, else the odd ones."""

        accepted = 0

        def allowed_W(self) -> Any:
            return np.full(8, 0x55555555 if self.accepted % 2 else 0xAAAAAAAA, np.uint32).view(np.int32)

        def accept(self, token: int) -> None:
            assert token % 2 == (self.accepted + 1) % 2
            self.accepted += 1

    engine = engine_of(folder, overlap=True)
    params = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=(255,), ignore_eos=True)
    engine.add("g", [5, 6], params, guide=lambda stops: OnlyEven())  # type: ignore[arg-type,return-value]
    tokens: list[int] = []
    for deltas in iter_steps(engine):
        assert engine.flying is None
        tokens += [t for d in deltas for t in d.tokens]
    assert [t % 2 for t in tokens] == [1, 0] * (len(tokens) // 2) + [1] * (len(tokens) % 2)


def iter_steps(engine: Engine) -> Iterator[list[Delta]]:
    while engine.has_work:
        yield engine.step()
