"""The whole engine under random company: real model, real cache, `check()` after each step.

Requests come, stop, are aborted in the middle; the cache is small, so that they are preempted; prefixes are shared.
Whatever happens around it, a request's tokens are those it gets alone (deterministic mode), and at the end nothing is
held.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.config import EngineConfig
from moesaic.engine.engine import Engine
from moesaic.engine.launch import launch
from moesaic.engine.params import SamplingParams
from moesaic.models.checkpoint import Checkpoint
from tests.checkpoints import random_model, save

BLOCKS, BLOCK = 8, 4
COUNTS = {"examples": 0, "steps": 0, "requests": 0, "aborted": 0, "preempted": 0, "prefix hits": 0}

requests = st.lists(
    st.tuples(
        st.integers(0, 2),  # which shared beginning
        st.integers(0, 5),  # how much of it
        st.lists(st.integers(3, 60), min_size=1, max_size=3),  # own tokens
        st.integers(1, 16),  # new tokens
        st.integers(0, 12),  # the step at which it comes
        st.one_of(st.none(), st.integers(1, 12)),  # how many steps later it is aborted
    ),
    min_size=1,
    max_size=8,
)
BEGINNINGS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8, 20, 21, 22, 23, 24], [40, 41, 42, 43, 44, 45, 46, 47, 48]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64}
    return save(random_model("mixtral", **sizes), tmp_path_factory.mktemp("fuzz"))


def engine_of(folder: Path, *, blocks: int, prefix_cache: bool) -> Engine:
    options = {"progress": False, "deterministic": True, "block_size": BLOCK, "max_num_batched_tokens": 16}
    with Checkpoint.open(folder) as checkpoint:
        probe = launch(checkpoint, EngineConfig(**options, max_num_seqs=1), None)
        row = probe.engine.runner.pool.nbytes // len(probe.engine.runner.pool.layers[0])
        config = EngineConfig(
            **options, max_num_seqs=4, max_model_len=24, kv_memory=row * BLOCK * blocks, prefix_cache=prefix_cache
        )
        return launch(checkpoint, config, None).engine


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[dict[tuple[tuple[int, ...], int], tuple[int, ...]]]:
    """(prompt, new tokens) -> answer of an otherwise empty engine, remembered."""
    yield {}
    print("\nengine fuzz:", COUNTS)


def answer(engine: Engine, prompt: list[int], count: int) -> tuple[int, ...]:
    engine.add("alone", prompt, greedy(count))
    return tuple(t for _ in iter(lambda: engine.has_work, False) for delta in engine.step() for t in delta.tokens)


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def test_a_request_is_the_same_in_any_company(
    folder: Path, alone: dict[tuple[tuple[int, ...], int], tuple[int, ...]]
) -> None:
    busy = engine_of(folder, blocks=BLOCKS, prefix_cache=True)
    quiet = engine_of(folder, blocks=40, prefix_cache=False)

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(requests)
    def company(drawn: list[tuple[int, int, list[int], int, int, int | None]]) -> None:
        plans = {str(i): (BEGINNINGS[b][:n] + own, count, at, until)
                 for i, (b, n, own, count, at, until) in enumerate(drawn)}  # fmt: skip
        got: dict[str, list[int]] = {name: [] for name in plans}
        aborted: set[str] = set()
        step = 0
        while step <= 12 or busy.has_work:
            for name, (prompt, count, at, until) in plans.items():
                if step == at:
                    busy.add(name, prompt, greedy(count))
                if until is not None and step == at + until:
                    aborted.add(name) if name in busy.states else None
                    busy.abort(name)
            for delta in busy.step():
                got[delta.request_id] += delta.tokens
            busy.check()
            step += 1
            assert step < 2000, "an engine that does not come to an end"
        for name, (prompt, count, _, _) in plans.items():
            key = (tuple(prompt), count)
            if key not in alone:
                alone[key] = answer(quiet, prompt, count)
            expected = alone[key]
            assert tuple(got[name]) == (expected[: len(got[name])] if name in aborted else expected)
        assert not busy.states
        COUNTS["examples"] += 1
        COUNTS["requests"] += len(plans)
        COUNTS["aborted"] += len(aborted)

    company()
    blocks = busy.scheduler.blocks
    assert blocks.available == BLOCKS - 1, "every block but the reserved one is free again"
    COUNTS.update({"steps": busy.stats.steps, "preempted": busy.stats.preemptions, "prefix hits": blocks.hits})
    assert COUNTS["preempted"] > 0, "the cache is so small that somebody must have been preempted"
    assert COUNTS["prefix hits"] > 0
    assert COUNTS["aborted"] > 0


def test_a_hundred_requests_through_the_smallest_cache(folder: Path) -> None:
    """The cache holds one request of full length and nothing else; all of 100 finish."""
    engine = engine_of(folder, blocks=24 // BLOCK + 1, prefix_cache=True)
    for i in range(100):
        engine.add(str(i), BEGINNINGS[i % 3] + [3 + i % 50], greedy(1 + i % 14))
    ended: dict[str, str] = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.finish_reason is not None:
                ended[delta.request_id] = delta.finish_reason
        engine.check()
    assert ended == {str(i): "length" for i in range(100)}
