"""Decoding steps by graph, all but the graph: a stand-in runs the forward pass again when it is replayed.

What a graph adds to the forward pass is on the host: the integers that a step writes, tables kept from step to step,
padding rows, and buffers that are overwritten. In deterministic mode padding changes no bit, so that answers must be
the very same.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks.models import MODELS as CONFIGS
from moesaic.contracts.plan import ModelPlan, Wishes
from moesaic.engine import draw
from moesaic.engine.engine import Engine
from moesaic.engine.graphs import Captured, DecodeGraphs, prompt_rows, prompt_sizes, sizes, takes_short, takes_whole
from moesaic.engine.params import SamplingParams
from moesaic.engine.rows import Fetch
from moesaic.engine.staging import FIELDS, PromptInputs
from moesaic.hardware import GPUS
from moesaic.kernels import reference_fused
from moesaic.kernels.ops import AttentionBatch, Ops, Span
from moesaic.models.build import spec_of
from moesaic.planning.plan import plan
from tests.planning_support import CATALOGUE
from tests.request_streams import answers, summary
from tests.test_overlap import engine_of, folder

__all__ = ["folder"]
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(temperature=2.0, top_p=0.95, seed=3, max_tokens=5, ignore_eos=True)


class Replayed(DecodeGraphs):
    """Results lie where they lay at the first time, as those of a graph do."""

    counts: Counter[int]

    def capture_all(self, each: Any, show: bool) -> None:
        self.counts = Counter()
        super().capture_all(each, show)

    def capture(self, size: int, memory: Any) -> Captured:
        self.inputs(size).load((), size, self.feed)
        scores_BV, packed_2B = self.forward(size)

        class Again:
            def replay(_) -> None:
                self.counts[size] += 1
                self.check_fresh(size)
                with torch.inference_mode():
                    scores, packed = self.forward(size)
                scores_BV.copy_(scores)
                if packed_2B is not None and packed is not None:
                    packed_2B.copy_(packed)

        return Captured(Again(), scores_BV, packed_2B)  # type: ignore[arg-type]

    def check_fresh(self, size: int) -> None:
        """A kernel may read all of a context but its last `fresh` positions before this step has written anything."""
        inputs = self.inputs(size)
        if isinstance(inputs, PromptInputs):
            return
        of, block = inputs.integers, self.pool.block_size
        slot_B, fresh_B, length_B = (of.fields_FB[FIELDS.index(name), :size] for name in ("slot", "fresh", "length"))
        written = set(slot_B[length_B > 0].tolist())
        for table, fresh, length in zip(of.tables_SW.tolist(), fresh_B.tolist(), length_B.tolist(), strict=False):
            context = [table[at // block] * block + at % block for at in range(length)]
            assert [slot in written for slot in context] == [at >= length - fresh for at in range(length)]


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels read the spans themselves, where those of a GPU read the tensor; and from a GPU results are
    copied before the next step runs."""

    def batch_of(_: object, decodes: int, table_SB: Tensor, block: int, spans_S3: Tensor,
                 fresh_S: Tensor | None = None) -> AttentionBatch:  # fmt: skip
        spans = [Span(*each) for each in spans_S3.tolist()]
        real = [s for s, span in enumerate(spans) if span.count]
        decodes = sum(s < decodes for s in real)
        return AttentionBatch(tuple(spans[s] for s in real), decodes, table_SB[real], block, spans_S3[real], fresh_S)

    monkeypatch.setattr("moesaic.engine.staging.AttentionBatch", batch_of)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    fetch = Fetch.__init__
    monkeypatch.setattr(Fetch, "__init__", lambda self, tensor: fetch(self, tensor.clone()))


def with_graphs(engine: Engine, most: int = 64, length: int = 256, rows: int = 0, whole: bool = False) -> Replayed:
    """Where every row is greedy and wants nothing else, the graph's own choice is taken. Prompts run in them, whatever
    the plan says: on a CPU no bit may change. rows: of longer prompts.  whole: these are not rows of their own."""
    runner = engine.runner
    runner.model.ops = cast(Ops, SimpleNamespace(**vars(runner.model.ops), top_two=reference_fused.top_two))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.engine.graphs.takes_short", lambda plan: True)
        patch.setattr("moesaic.engine.graphs.takes_whole", lambda plan: whole)
        each = sizes(most) + prompt_sizes(most, rows)
        graphs = runner.graphs = Replayed(runner.model, runner.pool, runner.feed, most, length, each)
    return graphs


@pytest.mark.parametrize("overlap", [False, True])
def test_answers_are_the_same(folder: Path, overlap: bool) -> None:
    expected = summary(answers(engine_of(folder, overlap=False), random.Random(1)))
    engine = engine_of(folder, overlap=overlap)
    graphs = with_graphs(engine)
    assert summary(answers(engine, random.Random(1))) == expected
    assert summary(answers(engine, random.Random(2))) == expected, "tables that were filled before"
    assert sum(graphs.counts.values()) > 50
    assert len(graphs.counts) > 3, "several sizes"


def test_answers_are_the_same_when_pressed(folder: Path) -> None:
    """A cache so small that requests are preempted: their blocks are others afterwards."""
    plain = summary(answers(engine_of(folder, overlap=False), random.Random(3)))
    pool = engine_of(folder, overlap=False, max_num_seqs=1).runner.pool
    row = pool.nbytes // len(pool.layers[0])
    engine = engine_of(folder, overlap=True, max_model_len=84, kv_memory=row * 4 * 26, max_num_seqs=8)
    with_graphs(engine, 8, 84)
    found = {name: deltas for name, deltas in answers(engine, random.Random(4), aborts=True).items() if deltas}
    whole = {name: each for name, each in summary(found).items() if found[name][-1].finish_reason is not None}
    assert len(whole) > 15
    assert whole == {name: plain[name] for name in whole}
    assert engine.stats.preemptions > 0


def test_padding_rows_are_not_counted(folder: Path) -> None:
    """The loads of experts that `--eplb` and reports go by."""
    found = []
    for graphs in (False, True):
        engine = engine_of(folder, overlap=False)
        if graphs:
            with_graphs(engine)
        meter = engine.runner.model.meter
        meter.start()
        answers(engine, random.Random(5), 12)
        found.append([load.counts for load in meter.loads()])
        assert meter.steps == engine.stats.steps
    assert found[0] == found[1]
    assert sum(found[0][0]) > 100


def test_graphs_count_although_the_meter_is_off(folder: Path) -> None:
    """So do the steps that are said to be counted."""
    engine = engine_of(folder, overlap=True)
    graphs = with_graphs(engine)
    meter = engine.runner.model.meter
    meter.start()
    meter.on = False
    answers(engine, random.Random(5), 12)
    assert meter.steps == sum(graphs.counts.values()) > 10
    assert sum(meter.loads()[0].counts) > 20


def test_a_step_too_large_runs_without(folder: Path) -> None:
    engine = engine_of(folder, overlap=False)
    graphs = with_graphs(engine, 4)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for i in range(6):
        engine.add(f"{i}", [5 + i], params)
    engine.step()
    engine.step()
    assert not graphs.counts
    engine.abort("0")
    engine.abort("1")
    engine.step()
    assert graphs.counts == {4: 1}


def test_sizes() -> None:
    assert sizes(20) == [1, 2, 4, 8, 16, 20]
    assert sizes(8) == [1, 2, 4, 8]
    assert prompt_sizes(8, 0) == prompt_sizes(8, 8) == []
    assert prompt_sizes(8, 9) == [9]
    assert prompt_sizes(32, 300) == [48, 64, 96, 128, 160, 192, 256, 300]
    assert prompt_sizes(256, 2048) == [320, 384, 512, 640, 768, 1024, 1280, 1536, 2048]


@pytest.mark.parametrize(("budget", "requests", "whole", "read", "params"), [
    (256, 64, False, 1 << 20, GREEDY), (12, 64, True, 50, DRAWN), (256, 5, True, 0, GREEDY), (40, 5, True, 9, DRAWN),
    (40, 5, False, 1 << 20, GREEDY),
])  # fmt: skip
def test_prompts_run_in_graphs(folder: Path, budget: int, requests: int, whole: bool, read: int,
                               params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """At once, or cut in chunks of which all but the last choose nothing, beside requests that decode; as rows of their
    own, or as whole sequences where they read much or are long. What is drawn comes late, when the next step may have
    already overwritten the scores."""
    monkeypatch.setattr("moesaic.engine.graphs.MOST_READ", read)
    monkeypatch.setattr(draw, "NARROW", 2)
    rng = random.Random(7)
    asked = {f"{n}": [rng.randrange(5, 60) for _ in range(n)] for n in (1, 2, 3, 17, 40)}
    found = []
    for most in (0, 64):
        engine = engine_of(folder, overlap=True, max_num_batched_tokens=budget, max_num_seqs=requests)
        graphs = with_graphs(engine, requests, rows=100, whole=whole) if most else None
        said: dict[str, list[Any]] = {name: [] for name in asked}
        for name, prompt in asked.items():
            engine.add(name, prompt, params)
            for _ in range(1 if params is DRAWN else 2):
                for delta in engine.step():
                    said[delta.request_id].append((delta.tokens, delta.logprobs, delta.finish_reason))
        while engine.has_work:
            for delta in engine.step():
                said[delta.request_id].append((delta.tokens, delta.logprobs, delta.finish_reason))
        found.append(said)
        assert graphs is None or sum(graphs.counts.values()) == engine.stats.steps, "nothing ran without"
    assert found[0] == found[1]
    assert all(len(each) == 5 for each in found[0].values())


def test_prompts_that_run_without_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that ask for scores of every token, that read too much, that are too long; those of deterministic mode."""
    plain, curious = SamplingParams(max_tokens=1, temperature=0), SamplingParams(max_tokens=1, prompt_logprobs=0)
    for params, prompt, short, read, fits in (
        (plain, 30, True, 465, True), (plain, 30, True, 464, False), (plain, 64, True, 1 << 18, True),
        (plain, 65, True, 1 << 18, False), (plain, 30, False, 465, False), (curious, 30, True, 465, False),
        (curious, 1, True, 465, True),
    ):  # fmt: skip
        engine = engine_of(folder, overlap=False)
        graphs = with_graphs(engine)
        graphs.short = short
        monkeypatch.setattr("moesaic.engine.graphs.MOST_READ", read)
        engine.add("a", list(range(5, 5 + prompt)), params)
        while engine.has_work:
            engine.step()
        assert bool(graphs.counts) == fits, (params, prompt, short, read)


def test_more_prompts_than_a_graph_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rows, where there are enough; else without."""
    monkeypatch.setattr("moesaic.engine.staging.MOST_PROMPTS", 3)
    for count, length, size in ((3, 5, 15), (3, 4, 12), (4, 3, 12), (5, 3, 0), (3, 2, 8)):
        engine = engine_of(folder, overlap=False, max_num_seqs=12)
        graphs = with_graphs(engine, 12, rows=15, whole=True)
        for i in range(count):
            engine.add(f"{i}", [5 + i] * length, SamplingParams(max_tokens=1, temperature=0))
        engine.step()
        assert list(graphs.counts) == [size] * (size > 0), (count, length)


def test_who_asked_about_its_prompt_keeps_no_other_out(folder: Path) -> None:
    engine = engine_of(folder, overlap=False)
    graphs = with_graphs(engine)
    engine.add("a", [5, 6, 7], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, prompt_logprobs=0))
    engine.step()
    assert not graphs.counts
    engine.add("b", [8, 9, 10, 11], SamplingParams(max_tokens=1, temperature=0))
    engine.step()
    assert graphs.counts == {8: 1}, "a row that decodes, and four of a prompt"


@pytest.mark.parametrize(("config", "wishes", "short", "whole", "rows"), [
    ("qwen3-30b-a3b", Wishes(), True, True, 2048), ("qwen3-30b-a3b", Wishes(attention="triton"), True, True, 2048),
    ("qwen3-30b-a3b", Wishes(kv="fp8"), True, True, 2048),
    ("qwen3-30b-a3b", Wishes(deterministic=True), True, False, 512),
    ("v2-lite", Wishes(), True, False, 1024), ("v2-lite", Wishes(deterministic=True), True, False, 256),
    ("qwen3-30b-a3b", Wishes(attention="flashinfer"), False, False, 0),
])  # fmt: skip
def test_which_plans_take_prompts(config: str, wishes: Wishes, short: bool, whole: bool, rows: int) -> None:
    """Latents of longer prompts are decompressed, for as many tokens as there are. Parts of results, 64 of each row in
    deterministic mode here, take no more than half a gigabyte, nor tables more than 64 MB."""
    spec = spec_of(CONFIGS[config])
    made = plan(spec, GPUS["h200"], CATALOGUE, wishes)
    assert isinstance(made, ModelPlan), made
    assert (takes_short(made), takes_whole(made)) == (short, whole)
    assert prompt_rows(spec, made, 16, 1 << 15, 2048) == rows
    assert prompt_rows(spec, made, 16, 1 << 15, 100) == min(rows, 100)
    if whole:
        assert prompt_rows(spec, made, 16, 1 << 15, 1 << 20) == 4096, "not more than one launches as fast"
        assert prompt_rows(spec, made, 16, 300, 2048) == 300, "not more than padding has room for"
    elif rows:
        assert prompt_rows(spec, made, 16, 1 << 20, 2048) <= 256
        assert not wishes.deterministic or prompt_rows(spec, made, 16, 1 << 20, 2048) * (1 << 11) < 1 << 16
