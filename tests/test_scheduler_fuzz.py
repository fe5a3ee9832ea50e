"""The scheduler, the allocator and the prefix cache under random use, against a naive model.

The model knows nothing of references, keys or queues. `NaiveEngine` writes, for each token a step computes, the whole
prefix that ends there into a dictionary keyed by cache slot, as a runner writes keys and values; then each chunk reads
its context back through the block table of its request and must find its own prefix and nothing else. What a request
should generate comes from a plain loop over the same toy "language model", a checksum of the prefix.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moesaic.engine.blocks import BlockManager
from moesaic.engine.params import SamplingParams
from moesaic.engine.request import FinishReason, Request, Status
from moesaic.engine.scheduler import Scheduler, SchedulerConfig, Step
from moesaic.errors import RequestError

EOS = frozenset({8})
COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what was covered, also when pytest captures output."""
    COUNTS.clear()
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\nscheduler fuzz:", ", ".join(f"{value} {name}" for name, value in sorted(COUNTS.items())))


def toy_model(tokens: Sequence[int]) -> int:
    """The next token: 0 to 2, or the end token once in a while."""
    checksum = zlib.crc32(bytes(tokens))
    return 8 if checksum % 13 == 0 else checksum // 13 % 3


def expected(prompt: Sequence[int], params: SamplingParams, limit: int) -> tuple[list[int], str, int | None]:
    """(output, finish reason, stop reason) of a request served alone."""
    output: list[int] = []
    most = params.max_tokens if params.max_tokens is not None else limit - len(prompt)
    while True:
        token = toy_model([*prompt, *output])
        output.append(token)
        if len(output) >= params.min_tokens:
            if token in EOS and not params.ignore_eos:
                return output, "stop", None
            if token in params.stop_token_ids:
                return output, "stop", token
        if len(output) == most:
            return output, "length", None


class NaiveEngine:
    """Drives a scheduler as the engine does, checking each step against slots that hold whole prefixes."""

    def __init__(self, config: SchedulerConfig, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.config, self.num_blocks, self.size = config, num_blocks, block_size
        self.scheduler = Scheduler(config, BlockManager(num_blocks, block_size, prefix_cache))
        self.limit = min(config.max_model_len, (num_blocks - 1) * block_size)
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.alive: list[Request] = []  # by arrival
        self.tokens: dict[str, list[int]] = {}  # our own copy of each live request's tokens
        self.done: dict[str, int] = {}  # how many of them were computed since the request last had no blocks
        self.names = 0

    def add(self, prompt: list[int], params: SamplingParams) -> Request | None:
        self.names += 1
        request = Request(f"r{self.names}", prompt, params, EOS)
        least = max(1, params.min_tokens) if params.max_tokens is None else params.max_tokens
        if not prompt or len(prompt) + least > self.limit:
            with pytest.raises(RequestError):
                self.scheduler.add(request)
            COUNTS["refusals"] += 1
            return None
        self.scheduler.add(request)
        COUNTS["requests"] += 1
        self.alive.append(request)
        self.tokens[request.id], self.done[request.id] = list(prompt), 0
        return request

    def start(self) -> Step | None:
        """schedule(), with everything that must hold for the step."""
        step = self.scheduler.schedule()
        self.scheduler.check()
        assert (step is None) == (not self.alive), "work and no step, or a step and no work"
        if step is None:
            return None
        COUNTS["steps"] += 1
        COUNTS["preemptions"] += len(step.preempted)
        for victim in step.preempted:
            self.done[victim.id] = 0
            assert victim.status is Status.WAITING
            assert victim.tokens == self.tokens[victim.id], "a preempted request lost tokens"
        requests = [chunk.request for chunk in step.chunks]
        assert len({request.id for request in requests}) == len(requests)
        assert not set(requests) & set(step.preempted)
        assert self.alive[0] in requests, "the earliest request does not progress"
        assert step.tokens == sum(chunk.count for chunk in step.chunks)
        assert 0 < step.tokens <= self.config.max_num_batched_tokens
        running = [request for request in self.alive if request.status is Status.RUNNING]
        assert len(running) <= self.config.max_num_seqs
        self._check_chunks(step)
        return step

    def _check_chunks(self, step: Step) -> None:
        decodes, first = [], []
        for request, start, count, sample in step.chunks:
            total, before = len(self.tokens[request.id]), self.done[request.id]
            assert request.tokens == self.tokens[request.id]
            assert count >= 1
            assert sample == (start + count == total)
            if start != before:
                assert before == 0, "a chunk was skipped"
                assert start % self.size == 0, "a prefix hit is made of whole blocks"
                assert request.params.prompt_logprobs is None
                COUNTS["prefix hits"] += 1
            if self.config.chunk_size is not None:
                assert start + count == total or (start + count) % self.config.chunk_size == 0
                assert start // self.config.chunk_size == (start + count - 1) // self.config.chunk_size
            decodes.append(count == 1 and sample and start >= request.num_prompt)
            first.append(decodes[-1] and before == start)
        assert step.decode == all(decodes)
        assert first == sorted(first, reverse=True), "a decode comes after a prefill"

    def run(self, step: Step) -> list[int]:
        """What the runner does: write all chunks' slots, then read every context back; the sampled tokens."""
        written: dict[tuple[int, int], tuple[int, ...]] = {}
        owners = Counter(block for request in self.alive for block in set(request.blocks))
        for request, start, count, _ in step.chunks:
            for position in range(start, start + count):
                block = request.blocks[position // self.size]
                slot = (block, position % self.size)
                assert 0 < block < self.num_blocks
                assert owners[block] == 1, "a shared block is written"
                assert slot not in written
                written[slot] = tuple(request.tokens[: position + 1])
        self.slots |= written
        for request, start, count, _ in step.chunks:
            for position in range(start + count):
                slot = (request.blocks[position // self.size], position % self.size)
                assert self.slots.get(slot) == tuple(self.tokens[request.id][: position + 1]), "someone else's context"
        COUNTS["tokens computed"] += step.tokens
        return [toy_model(chunk.request.tokens) for chunk in step.chunks if chunk.sample]

    def end(self, step: Step, sampled: list[int]) -> None:
        """commit(), and what must hold afterwards."""
        finished = self.scheduler.commit(step, sampled)
        self.scheduler.check()
        tokens = iter(sampled)
        for request, start, count, sample in step.chunks:
            token = next(tokens) if sample else None
            if request not in self.alive:
                continue  # aborted in flight
            self.done[request.id] = start + count
            if token is not None:
                self.tokens[request.id].append(token)
            assert request.tokens == self.tokens[request.id]
        for request in finished:
            wanted = expected(request.prompt, request.params, self.limit)
            assert (request.output, request.finish_reason, request.stop_reason) == wanted
            COUNTS["requests finished"] += 1
            self.forget(request)

    def step(self) -> None:
        step = self.start()
        if step is not None:
            self.end(step, self.run(step))

    def forget(self, request: Request) -> None:
        assert request.status is Status.FINISHED
        assert request.blocks == []
        self.alive.remove(request)
        del self.tokens[request.id], self.done[request.id]

    def end_early(self, request: Request, by_abort: bool) -> None:
        if by_abort:
            assert self.scheduler.abort(request.id) is request
            assert request.finish_reason is FinishReason.ABORT
        else:
            self.scheduler.finish(request, FinishReason.STOP, "###")
            assert (request.finish_reason, request.stop_reason) == ("stop", "###")
        COUNTS["aborts and stop strings"] += 1
        self.forget(request)
        self.scheduler.check()

    def drain(self) -> None:
        """Run until nothing is alive: every request ends, and every block comes back."""
        bound = 10 + sum(request.max_total for request in self.alive) * 3
        while self.alive:
            self.step()
            bound -= 1
            assert bound, "the requests do not end"
        assert not self.scheduler.has_work
        assert self.scheduler.schedule() is None
        assert self.scheduler.blocks.available == self.num_blocks - 1, "blocks leaked"
        self.scheduler.blocks.check([])
        self.scheduler.blocks.reset()
        self.scheduler.blocks.check([])


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(3, 12),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (), (2,), (8,)]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
)
PROMPTS = st.builds(  # few beginnings and a small alphabet: many prefixes in common
    lambda head, tail: [0, 1, 2, 1, 0, 0, 2, 1, 1, 0, 2, 2][:head] + tail,
    st.integers(0, 12),
    st.lists(st.integers(0, 2), max_size=6),
)


class SchedulerMachine(RuleBasedStateMachine):
    engine: NaiveEngine
    flying: tuple[Step, list[int]] | None = None

    @initialize(
        sizes=st.tuples(st.integers(2, 16), st.integers(1, 4)),
        seqs=st.integers(1, 6),
        budget=st.integers(1, 24),
        length=st.integers(4, 40),
        chunk=st.none() | st.integers(1, 8),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def build(
        self, sizes: tuple[int, int], seqs: int, budget: int, length: int, chunk: int | None, prefix_cache: bool
    ) -> None:
        config = SchedulerConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=max(budget, chunk or 0),
            max_model_len=length,
            chunk_size=chunk,
        )
        self.engine = NaiveEngine(config, *sizes, prefix_cache)
        COUNTS["machines"] += 1

    @rule(requests=st.lists(st.tuples(PROMPTS, PARAMS), min_size=1, max_size=4))
    def add(self, requests: list[tuple[list[int], SamplingParams]]) -> None:
        for prompt, params in requests:
            self.engine.add(prompt, params)

    @precondition(lambda self: self.flying is None)
    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: self.flying is None)
    @rule()
    def launch(self) -> None:
        step = self.engine.start()
        if step is not None:
            self.flying = step, self.engine.run(step)

    @precondition(lambda self: self.flying is not None)
    @rule(discard=st.sampled_from([False, False, False, True]))
    def land(self, discard: bool) -> None:
        assert self.flying is not None
        step, sampled = self.flying
        self.flying = None
        if discard:
            self.engine.scheduler.discard(step)
            self._note_admissions(step)
            COUNTS["discarded steps"] += 1
        else:
            self.engine.end(step, sampled)

    def _note_admissions(self, step: Step) -> None:
        for chunk in step.chunks:  # a request admitted by a discarded step keeps its prefix hit
            if chunk.request in self.engine.alive:
                self.engine.done[chunk.request.id] = chunk.start

    @precondition(lambda self: self.engine.alive)
    @rule(which=st.integers(0, 50), by_abort=st.booleans())
    def end_early(self, which: int, by_abort: bool) -> None:
        alive = self.engine.alive
        self.engine.end_early(alive[which % len(alive)], by_abort)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            if self.flying is not None:
                self.engine.end(*self.flying)
            self.engine.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("block_size", [1, 4])
def test_with_the_cache_at_its_minimum_all_of_100_requests_finish(
    block_size: int, chunk: int | None, prefix_cache: bool
) -> None:
    """The cache holds exactly the longest request, so that two can hardly ever live side by side."""
    rng = random.Random(1)
    config = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=32, max_model_len=24, chunk_size=chunk)
    engine = NaiveEngine(config, 1 + 24 // block_size, block_size, prefix_cache)
    finished = COUNTS["requests finished"]
    for _ in range(100):
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
        assert engine.add(prompt, SamplingParams(max_tokens=rng.randint(1, 12), ignore_eos=True)) is not None
    engine.drain()
    assert COUNTS["requests finished"] == finished + 100


@pytest.mark.parametrize("seed", range(12))
def test_long_random_runs_under_memory_pressure(seed: int) -> None:
    """Many requests and few blocks: preemption, eviction, hits and aborts in flight, a few hundred steps at a time."""
    rng = random.Random(seed)
    chunk = rng.choice([None, 4, 6])
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=24, max_model_len=40, chunk_size=chunk)
    size = rng.choice([1, 2, 4])
    engine = NaiveEngine(config, 2 + -(-rng.randint(40, 100) // size), size, True)
    heads = [[rng.randrange(3) for _ in range(20)] for _ in range(3)]
    before = COUNTS["preemptions"]
    for _ in range(250):
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            prompt = rng.choice(heads)[: rng.randint(0, 20)] + [rng.randrange(3) for _ in range(rng.randint(1, 4))]
            engine.add(prompt, SamplingParams(max_tokens=rng.randint(1, 16), ignore_eos=rng.random() < 0.8))
        step = engine.start()
        if step is None:
            continue
        sampled = engine.run(step)
        if rng.random() < 0.1:
            engine.end_early(rng.choice(engine.alive), rng.random() < 0.5)
        engine.end(step, sampled)
    engine.drain()
    assert COUNTS["preemptions"] > before, "this run was meant to be under pressure"


def test_preemption_changes_no_output() -> None:
    """Two equal loads, one with room for everybody and one preempting: the same tokens (both equal `expected`)."""
    for num_blocks, pressed in ((200, False), (14, True)):
        config = SchedulerConfig(max_num_seqs=12, max_num_batched_tokens=64, max_model_len=32)
        engine = NaiveEngine(config, num_blocks, 4, True)
        requests = [engine.add([i % 3, i % 2, i // 3], SamplingParams(max_tokens=29)) for i in range(24)]
        engine.drain()
        assert any(request is not None and request.preemptions for request in requests) == pressed
