"""The KV cache in FP8: the format by hand, attention over it against FP64 on the same codes, the engine around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic import LLM, SamplingParams
from moesaic.contracts.spec import KVParts
from moesaic.engine.launch import Launched
from moesaic.errors import OptionError
from moesaic.formats import kv
from moesaic.kernels import cpu, cpu_invariant, reference
from moesaic.kernels.ops import AttentionBatch, KVView, Span
from tests.checkpoints import random_model, save
from tests.compare import assert_rows_close, worst_row
from tests.test_determinism import MODELS, answers, prompts, start

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_a_row_by_hand() -> None:
    """Two parts of three elements and two plain ones. 448 = 1.75 x 2^8 is the largest code."""
    parts = KVParts((3, 3), 2)
    rows = torch.tensor([[448.0, -1.0, 0.0, 449.0, 2.0, -4.0, 1.0, 257.0]])
    stored = kv.encode(rows, parts)
    assert stored.dtype == torch.uint8
    assert stored.shape == (1, 16) == (1, parts.fp8_bytes)
    # exponents 0 and 1, as 127 and 128; codes: 448 is 0x7e, -1 is 0xb8; 449 / 2 rounds to 224 = 0x76
    assert stored[0].tolist() == [0x7E, 0xB8, 0, 0x76, 0x38, 0xC0, 0x80, 0x3F, 0x80, 0x43, 127, 128, 0, 0, 0, 0]
    # BF16 has 8 bits: 257 is between 256 and 258, and goes to the even one
    assert kv.decode(stored, parts).tolist() == [[448.0, -1.0, 0.0, 448.0, 2.0, -4.0, 1.0, 256.0]]


def test_scales_are_powers_of_two_that_saturate_nothing() -> None:
    parts = KVParts((64, 32), 16)
    for size in (1e-30, 1e-3, 1.0, 3e4, 1e30):
        rows = torch.randn(50, parts.width) * size
        again = kv.decode(kv.encode(rows, parts), parts)
        for part, back in zip(rows[:, :96].split([64, 32], 1), again[:, :96].split([64, 32], 1), strict=True):
            amax = part.abs().amax(1, keepdim=True)
            assert ((part - back).abs() <= torch.maximum(part.abs() * 2.0**-4, amax * 2.0**-16)).all()
        assert worst_row(again[:, 96:], rows[:, 96:]) < 2**-8
    exact = torch.randn(9, parts.width).to(torch.float8_e4m3fn).float()
    assert torch.equal(kv.decode(kv.encode(exact, parts), parts), exact), "what E4M3 holds stays what it is"


def test_what_is_no_number_and_zeros() -> None:
    parts = KVParts((4, 4))
    rows = torch.zeros(3, 8)
    rows[1, 2], rows[2, 5] = float("nan"), float("inf")
    again = kv.decode(kv.encode(rows, parts), parts)
    assert torch.equal(again[0], rows[0])
    assert again[1, :4].isnan().all()
    assert torch.equal(again[1, 4:], rows[1, 4:])
    assert again[2, 4:].isnan().all()
    assert torch.equal(kv.decode(torch.zeros(2, 16, dtype=torch.uint8), parts), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [{}, {"window": 9}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("view", [KVView(2, 24, 48, 24), KVView(1, 48, 0, 32)], ids=str)
def test_attention_reads_it(view: KVView, how: dict[str, Any], dtype: torch.dtype) -> None:
    """Decodes and a prompt together; rows that nobody owns are NaN."""
    lengths, counts, block = (33, 5, 20), (1, 1, 7), 4
    used = [-(-length // block) for length in lengths]
    pool = kv.encode(torch.randn((sum(used) + 1) * block, view.parts.width), view.parts)
    table = torch.zeros(3, max(used), dtype=torch.int32)
    for s, blocks in enumerate((torch.randperm(sum(used)) + 1).split(used)):
        table[s, : used[s]] = blocks
    spans = tuple(Span(s if s < 2 else 2, c, n) for s, (n, c) in enumerate(zip(lengths, counts, strict=True)))
    batch = AttentionBatch(spans, 2, table, block, torch.tensor([(s.start, s.count, s.length) for s in spans]))
    seen = torch.zeros(len(pool), dtype=torch.bool)
    seen[batch.slots_SL[~batch.outside_SL]] = True
    pool[~seen] = 255
    pool[:block] = 0  # the block of padding
    q = torch.randn(9, 4, view.key_dim).to(dtype)
    sinks = torch.randn(4) if how.get("sinks") else None
    args = (view, 0.2, how.get("window"), sinks)
    theirs = reference.attend_paged(q.double(), pool, batch, *args)
    for backend in (cpu, cpu_invariant, reference):
        mine = backend.attend_paged(q, pool, batch, *args)
        limit = 1e-5 if dtype == torch.float32 else 2**-7
        assert_rows_close(mine.flatten(1), theirs.flatten(1), limit, f"{backend.__name__}")


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(request.param, **MODELS[request.param]), tmp_path_factory.mktemp("kv8"))


def alone(launched: Launched) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for i, prompt in enumerate(prompts(9)):
        found |= answers(launched, [(i, prompt)])
    return found


def test_deterministic_mode_is_exact_with_it(path: Path) -> None:
    """Alone without a prefix cache, together, again from the prefix cache, and preempted: bit for bit the same."""
    expected = alone(start(path, kv="fp8", prefix_cache=False))
    together = start(path, kv="fp8", max_num_batched_tokens=256)
    numbered = list(enumerate(prompts(9)))
    assert answers(together, numbered) == expected
    assert answers(together, numbered[::-1]) == expected
    assert together.engine.scheduler.blocks.hits > 0
    row = together.engine.runner.pool.nbytes // len(together.engine.runner.pool.layers[0])
    pressed = start(path, kv="fp8", max_model_len=300, kv_memory=20 * 16 * row)
    assert answers(pressed, numbered) == expected
    assert pressed.engine.stats.preemptions > 0
    assert expected != alone(start(path, prefix_cache=False)), "it does round something"


def test_the_same_memory_holds_more_tokens() -> None:
    plain, fp8 = (LLM(kv=form, kv_memory=1 << 22, progress=False) for form in ("bf16", "fp8"))
    spec = plain.launched.built.model.spec
    parts = [block.attention.kv_parts for block in spec.layers]
    assert [table.shape[1] for table in fp8.engine.runner.pool.layers] == [each.fp8_bytes for each in parts]
    assert fp8.launched.blocks > 1.9 * plain.launched.blocks * plain.launched.built.dtype.itemsize / 4 * 0.9
    assert fp8.launched.built.plan.kv_bytes_per_token == sum(each.fp8_bytes for each in parts)
    questions = ["What is 12 + 30?", "Reverse the word stone."]
    tokens = [[llm.chat_tokens([{"role": "user", "content": q}]) for q in questions] for llm in (plain, fp8)]
    one, other = (llm.generate(each, GREEDY) for llm, each in zip((plain, fp8), tokens, strict=True))
    assert [r.tokens for r in one] == [r.tokens for r in other]
    assert "cpu_native" not in {c.chosen for c in next(iter(fp8.launched.built.plan.ops.values())) if "attend" in c.op}


def test_it_is_asked_for_by_name() -> None:
    with pytest.raises(OptionError, match="--kv"):
        LLM(kv="fp4")
