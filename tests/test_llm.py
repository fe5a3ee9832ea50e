"""The Python API on the embedded model: what a user meets, right and wrong. Each case was once a defect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic import LLM, SamplingParams
from moesaic.assets import embedded_model
from moesaic.errors import CheckpointError, MoesaicError, OptionError, RequestError
from moesaic.kernels import cpu, cpu_native
from moesaic.kernels.ops import AttentionBatch, KVView, Span

GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUESTION = [{"role": "user", "content": "Count the letter o in the word hoos."}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM(progress=False)
    yield made
    assert not made.engine.has_work, "a test left something behind"


def test_prompts_in_every_form(llm: LLM) -> None:
    ids = llm.chat_tokens(QUESTION)
    answers = [
        llm.generate(ids, GREEDY)[0].tokens,
        llm.generate([ids], GREEDY)[0].tokens,
        llm.generate(np.array(ids), GREEDY)[0].tokens,
        llm.generate(torch.tensor(ids), GREEDY)[0].tokens,
        llm.generate([np.array(ids)], GREEDY)[0].tokens,
        llm.chat(QUESTION, GREEDY)[0].tokens,
        llm.chat([QUESTION, QUESTION], [GREEDY, GREEDY])[1].tokens,
        [token for delta in llm.stream(ids, GREEDY) for token in delta.tokens],
    ]
    assert all(tokens == answers[0] for tokens in answers)
    assert llm.generate(ids, GREEDY)[0].text.startswith("Look for o in hoos.")


WRONG: list[Any] = ["", [[1.5, 2]], [[]], [[-1]], [[10**9]], [1, "text"], [None], [[True, "x"]]]


@pytest.mark.parametrize("prompts", WRONG, ids=str)
def test_a_wrong_prompt_leaves_nothing_behind(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompts, GREEDY)
    assert not llm.engine.has_work
    assert llm.chat(QUESTION, GREEDY)[0].completions[0].error is None


@pytest.mark.parametrize(
    "fields",
    [{"temperature": "1"}, {"temperature": 10**400}, {"temperature": True}, {"top_k": 2.5}, {"max_tokens": 2.5},
     {"stop": [1]}, {"stop_token_ids": ["a"]}, {"logit_bias": {1: 10**400}}, {"logit_bias": {1: "x"}}, {"n": 10**9},
     {"seed": 1.0}, {"ignore_eos": "no"}],
    ids=str,
)  # fmt: skip
def test_wrong_sampling_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(fields))):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    "options",
    [{"deterministic": "no"}, {"gpu_memory_utilization": "0.5"}, {"seed": "x"}, {"nope": 1}, {"dtype": "float16"},
     {"max_num_seqs": 0}, {"experts": "nope"}, {"kv_memory": 10}],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MoesaicError):
        LLM(progress=False, **options)
    assert issubclass(OptionError, MoesaicError)


def test_streams_side_by_side_lose_nothing(llm: LLM) -> None:
    ids = llm.chat_tokens(QUESTION)
    other = llm.chat_tokens([{"role": "user", "content": "What is 487 + 4338?"}])
    expected = [llm.generate(prompt, GREEDY)[0].text for prompt in (ids, other)]
    texts = ["", ""]
    streams = [llm.stream(ids, GREEDY), llm.stream(other, GREEDY)]
    open_streams = {0, 1}
    while open_streams:
        for i in sorted(open_streams):
            delta = next(streams[i], None)
            if delta is None:
                open_streams.remove(i)
            else:
                texts[i] += delta.text
    assert texts == expected
    first = llm.stream(ids, GREEDY)
    next(first)
    first.close()
    assert not llm.engine.has_work


def test_a_failing_request_fails_alone() -> None:
    """One token id makes every number of its request NaN. Nobody who gets its blocks afterwards notices."""
    llm = LLM(progress=False, kv_memory=2 << 20, max_model_len=256)
    prompt = llm.chat_tokens(QUESTION)
    healthy = llm.generate(prompt, GREEDY)[0].tokens
    llm.launched.built.model.embed.weight_VD[777] = float("inf")
    assert 777 not in prompt
    for _ in range(4):
        bad, good = llm.generate([[777] * 40, prompt], GREEDY)
        assert bad.completions[0].finish_reason == "error"
        assert good.tokens == healthy
        assert [r.tokens for r in llm.generate([prompt] * 3, GREEDY)] == [healthy] * 3


def test_deterministic_without_a_seed() -> None:
    llm = LLM(progress=False, deterministic=True)
    params = SamplingParams(temperature=3.0, max_tokens=12)
    ids, other = llm.chat_tokens(QUESTION), llm.chat_tokens([{"role": "user", "content": "Hello!"}])
    alone = llm.generate(ids, params)[0].tokens
    assert llm.generate([other, ids], params)[1].tokens == alone
    many = llm.generate(ids, SamplingParams(temperature=3.0, max_tokens=12, n=3))[0].completions
    assert len({tuple(c.tokens) for c in many}) == 3


def test_the_pool_follows_gpu_memory_utilization(llm: LLM) -> None:
    free = llm.launched.hardware.memory
    part = (150 << 20) / free
    small = LLM(progress=False, gpu_memory_utilization=part)
    weights = small.launched.built.model.nbytes()
    pool = small.engine.runner.pool.nbytes
    assert pool + weights == pytest.approx(150 << 20, rel=0.15)
    assert pool < llm.engine.runner.pool.nbytes


EDITS: list[tuple[str, str, Any]] = [
    ("config.json", "max_position_embeddings", 2**39), ("config.json", "hidden_size", 2**23),
    ("config.json", "hidden_size", 2**33), ("config.json", "vocab_size", 2**24), ("config.json", "vocab_size", 2**39),
    ("config.json", "num_hidden_layers", 2**30), ("config.json", "n_routed_experts", 2**30),
    ("config.json", "partial_rotary_factor", 0.5), ("config.json", "rms_norm_eps", 10**400),
    ("config.json", "rms_norm_eps", -1), ("config.json", "rope_theta", -1),
    ("config.json", "rope_scaling", {"rope_type": "linear", "factor": 0}),
    ("config.json", "rope_scaling", {"rope_type": "yarn", "rope_theta": 1, "factor": 4}),
    ("generation_config.json", "temperature", "hot"), ("generation_config.json", "max_new_tokens", "many"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "name", "value"), EDITS, ids=lambda value: str(value)[:30])
def test_a_strange_configuration_is_an_error_that_names_it(tmp_path: Path, file: str, name: str, value: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model(), folder)
    config = json.loads((folder / file).read_text()) | {name: value, "do_sample": True}
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        LLM(str(folder), progress=False)
    assert file in str(caught.value) or "shape" in str(caught.value)


def test_top_k_minus_one_is_off(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model(), folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": -1, "repetition_penalty": 1.5}')
    assert LLM(str(folder), progress=False).defaults.top_k == 0
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    assert LLM(str(folder), progress=False).defaults == SamplingParams(temperature=0.0, repetition_penalty=1.5)


def test_one_long_context_does_not_inflate_the_others() -> None:
    """Decode groups like lengths, and the result is that of each sequence alone."""
    lengths = [1, 5, 4000, 7, 90, 100, 3, 3999]
    groups = cpu.like_lengths(lengths)
    assert sorted(s for group in groups for s in group) == list(range(8))
    assert sum(len(g) * max(lengths[s] for s in g) for g in groups) < 2 * sum(lengths) + 32 * 8
    assert cpu.like_lengths([50] * 8) == [list(range(8))]
    pool, q = torch.randn(5000, 48), torch.randn(8, 4, 48)
    slots_SL = torch.randint(0, 5000, (8, 4000))
    spans = tuple(Span(s, 1, n) for s, n in enumerate(lengths))
    view = KVView(1, 48, 0, 32)
    together = cpu.attend_paged(q, pool, AttentionBatch.of(spans, 8, slots_SL), view, 0.2)
    for s, n in enumerate(lengths):
        one = AttentionBatch.of((Span(0, 1, n),), 1, slots_SL[s : s + 1, :n])
        torch.testing.assert_close(cpu.attend_paged(q[s : s + 1], pool, one, view, 0.2), together[s : s + 1])


def test_the_choice_of_kernels_explains_itself(llm: LLM) -> None:
    text, best = llm.launched.built.plan.explain(), "cpu" if cpu_native.probe() else "cpu_native"
    assert f"experts, layers 1-5, decode: {best}\n" in text
    assert f"not reference with local: {best} with local is preferred" in text
    wished = LLM(progress=False, experts="reference").launched.built.plan.explain()
    assert "experts, layers 1-5, decode: reference\n" in wished
    with pytest.raises(OptionError, match="deterministic"):
        LLM(progress=False, experts="cpu", deterministic=True)


def test_an_unknown_option_of_chat_is_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"max_tokens: unknown option of chat.*SamplingParams"):
        llm.chat([{"role": "user", "content": "hello"}], max_tokens=5)
