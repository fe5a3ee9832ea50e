"""The criterion by which engines are held against `transformers` (`forced.py`): it passes an engine that is right, and
no engine whose attention has a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from moesaic import LLM, SamplingParams
from moesaic.kernels import cpu
from moesaic.kernels.ops import AttentionBatch, KVView
from tests import forced
from tests.forced import Judged, hold

CONFIG = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 4, "max_position_embeddings": 512,
}  # fmt: skip
LENGTHS = (3, 100, 300, 17, 161, 33, 128, 65)
ATTEND = cpu.attend_paged
Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    path: Path
    oracle: PreTrainedModel
    ours: Judged


def judged(path: Path, oracle: PreTrainedModel, attention: str) -> Judged:
    """Prompts in chunks, their answers beside one another."""
    llm = LLM(str(path), device="cpu", dtype="bfloat16", progress=False, attention=attention, kv_memory=1 << 24,
              max_num_seqs=8, max_num_batched_tokens=96, prefix_cache=False)  # fmt: skip
    assert {layer.attention for layer in llm.launched.built.plan.layers} == {attention}
    llm.engine.runner.graphs = None  # frames say how long a context may be, not how long it is
    params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    return forced.judge(oracle, llm.generate(forced.draw_prompts(LENGTHS, 256), params))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tmp_path_factory.mktemp("forced")
    oracle = forced.write_peaked(path, "qwen3_moe", **CONFIG)
    return Case(path, oracle, judged(path, oracle, "reference"))


def test_another_engine_that_is_right_passes(case: Case) -> None:
    theirs = judged(case.path, case.oracle, "cpu")
    print(f"\nours: {case.ours}\nanother: {theirs}")
    hold(theirs, case.ours)


def head_lost(q: Tensor, pool: Tensor, batch: AttentionBatch, view: KVView, scale: float, *more: Any) -> Tensor:
    out = ATTEND(q, pool, batch, view, scale, *more)
    out[:, 3] = 0
    return out


def scale_wrong(q: Tensor, pool: Tensor, batch: AttentionBatch, view: KVView, scale: float, *more: Any) -> Tensor:
    return ATTEND(q, pool, batch, view, 1.05 * scale, *more)


def scale_wrong_of_decoding(q: Tensor, pool: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                            *more: Any) -> Tensor:  # fmt: skip
    out = ATTEND(q, pool, batch, view, scale, *more)
    out[: batch.decodes] = ATTEND(q, pool, batch, view, 1.05 * scale, *more)[: batch.decodes]
    return out


def result_too_large(q: Tensor, pool: Tensor, batch: AttentionBatch, view: KVView, scale: float, *more: Any) -> Tensor:
    return ATTEND(q, pool, batch, view, scale, *more) * 1.05


@pytest.mark.parametrize(("fault", "seen_in"), [
    (head_lost, "prompts"), (scale_wrong, "prompts"), (result_too_large, "prompts"),
    (scale_wrong_of_decoding, "answers"),
])  # fmt: skip
def test_faults_of_attention_are_seen(case: Case, monkeypatch: pytest.MonkeyPatch, fault: Attend, seen_in: str) -> None:
    monkeypatch.setattr(cpu, "attend_paged", fault)
    theirs = judged(case.path, case.oracle, "cpu")
    print(f"\nours: {case.ours}\n{fault.__name__}: {theirs}")
    with pytest.raises(AssertionError, match=f"{seen_in}: errors of"):
        hold(theirs, case.ours)


def test_tokens_far_behind_the_best_are_seen(case: Case) -> None:
    trails_T = case.ours.trails_T.clone()
    hold(replace(case.ours, trails_T=trails_T), case.ours)
    trails_T[5] = 2.1 * case.ours.worst
    with pytest.raises(AssertionError, match="behind the best"):
        hold(replace(case.ours, trails_T=trails_T), case.ours)
