"""Same request, same tokens, in `--deterministic` mode: exact, whatever runs beside it and however it is cut.

Compared are the tokens and every log-prob, bit for bit, between a request alone in a roomy engine and the same request
in other company: other batches, other chunk budgets, preempted and recomputed, or served from the prefix cache.
Without the flag near-ties are counted instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.config import EngineConfig
from moesaic.engine.launch import Launched, launch
from moesaic.engine.output import Delta
from moesaic.engine.params import SamplingParams
from moesaic.models.checkpoint import Checkpoint
from tests.checkpoints import random_model, save

MODELS = {
    "deepseek_v3": {"n_group": 2, "topk_group": 1, "q_lora_rank": 32, "max_position_embeddings": 512},
    "mixtral": {"sliding_window": 24, "max_position_embeddings": 512},
}  # fmt: skip
Answer = tuple[tuple[int, ...], tuple[float, ...]]


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save(random_model(request.param, **MODELS[request.param]), folder)
    return folder


def start(path: Path, **options: Any) -> Launched:
    with Checkpoint.open(path) as checkpoint:
        return launch(checkpoint, EngineConfig(**{"progress": False, "deterministic": True, **options}), None)


def params(i: int) -> SamplingParams:
    """Greedy, sampled and penalised requests in turn."""
    kinds: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"seed": i, "top_p": 0.9},
                                         {"temperature": 0.7, "seed": i, "repetition_penalty": 1.2})  # fmt: skip
    return SamplingParams(max_tokens=20 + i % 5, ignore_eos=True, logprobs=0, **kinds[i % 3])


def prompts(count: int) -> list[list[int]]:
    """Ragged, some with a long common beginning."""
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(3, 250, (150,), generator=generator).tolist()
    lengths = [1, 2, 7, 31, 64, 97, 130, 16, 15, 17, 3, 50]
    own = [torch.randint(3, 250, (lengths[i % 12],), generator=generator).tolist() for i in range(count)]
    return [shared[: 100 + i] + tokens if i % 3 == 2 else tokens for i, tokens in enumerate(own)]


def answers(launched: Launched, requests: Sequence[tuple[int, list[int]]]) -> dict[int, Answer]:
    """Runs requests (number, prompt) together; {number: (tokens, log-probs)}."""
    engine = launched.engine
    for i, prompt in requests:
        engine.add(str(i), prompt, params(i))
    found: dict[int, list[Delta]] = {i: [] for i, _ in requests}
    while engine.has_work:
        for delta in engine.step():
            found[int(delta.request_id)].append(delta)
        engine.check()
    return {
        i: (tuple(t for d in deltas for t in d.tokens), tuple(e.logprob for d in deltas for e in d.logprobs))
        for i, deltas in found.items()
    }


@pytest.fixture(scope="module")
def alone(path: Path) -> dict[int, Answer]:
    """Each request by itself, without a prefix cache."""
    launched = start(path, prefix_cache=False)
    found: dict[int, Answer] = {}
    for i, prompt in enumerate(prompts(12)):
        found |= answers(launched, [(i, prompt)])
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_seqs": 5}, {"max_num_batched_tokens": 256}, {"max_num_batched_tokens": 300, "block_size": 8},
     {"prefix_cache": False}],
    ids=str,
)  # fmt: skip
def test_batch_and_chunking(path: Path, alone: dict[int, Answer], options: dict[str, Any]) -> None:
    launched = start(path, **options)
    numbered = list(enumerate(prompts(12)))
    assert answers(launched, numbered) == alone
    assert answers(launched, numbered[::-1]) == alone, "again, in another order, over whatever the cache holds"
    if options.get("prefix_cache", True):
        assert launched.engine.scheduler.blocks.hits > 0, "the second round must have hit the prefix cache"


def test_preemption(path: Path, alone: dict[int, Answer]) -> None:
    launched = start(path, max_model_len=300, kv_memory=20 * 16 * row_bytes(path))
    assert answers(launched, list(enumerate(prompts(12)))) == alone
    assert launched.engine.stats.preemptions > 0, "the cache was chosen so small that somebody is preempted"


def row_bytes(path: Path) -> int:
    """Bytes of KV per token, read off a running engine."""
    pool = start(path).engine.runner.pool
    return pool.nbytes // len(pool.layers[0])


def test_without_the_flag_near_ties_are_counted(path: Path) -> None:
    """The gauge: with the threshold at 0.02 in logits a flat model produces near ties, and they are counted."""
    launched = start(path, deterministic=False)
    answers(launched, list(enumerate(prompts(12))))
    assert launched.engine.stats.generated_tokens == sum(params(i).max_tokens or 0 for i in range(12))
    assert 0 <= launched.engine.stats.near_ties < launched.engine.stats.generated_tokens
