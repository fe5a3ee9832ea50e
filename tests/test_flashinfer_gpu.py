"""FlashInfer's attention on a GPU (`-m gpu`), where it is installed: against FP64, in graphs, and in the engine.

Shapes: 32 / 4 x 128 (Qwen3-30B-A3B), 64 / 8 x 64 with sinks and windows (gpt-oss), latents of 512 + 64 with 128 and 16
heads (DeepSeek-V3, V2-Lite). The first run compiles for minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from moesaic import LLM, SamplingParams
from moesaic.engine.graphs import DecodeGraphs
from moesaic.kernels import flashinfer, reference
from moesaic.kernels.ops import AttentionBatch, KVView
from tests import flashinfer_support as support
from tests.compare import assert_rows_close
from tests.flashinfer_support import GQA, LATENT, LIMIT, OSS, check, paged
from tests.vendor_support import usable

pytestmark = pytest.mark.gpu
PROMPTS = [((300,), (300,)), ((700, 300, 513), (1, 300, 129)), ((1, 2000, 64, 65), (1, 700, 64, 2))]


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    usable(flashinfer)
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("block", [16, 64])
def test_decoding(block: int) -> None:
    check(GQA, 32, (1,), (1,), block)
    check(GQA, 32, (3000,), (1,), block)
    check(GQA, 32, tuple(range(1, 1300, 41)), (1,) * 32, block)
    check(GQA, 32, tuple(range(7, 400, 3)), (1,) * 131, block)


@pytest.mark.parametrize(("lengths", "counts"), PROMPTS, ids=str)
@pytest.mark.parametrize("block", [16, 64])
def test_prompts(lengths: tuple[int, ...], counts: tuple[int, ...], block: int) -> None:
    check(GQA, 32, lengths, counts, block)


@pytest.mark.parametrize("window", [None, 128])
def test_sinks_and_windows(window: int | None) -> None:
    for lengths in ((1,), (3000,), tuple(range(1, 1300, 41))):
        check(OSS, 64, lengths, (1,) * len(lengths), 16, window, True)
    for lengths, counts in PROMPTS:
        check(OSS, 64, lengths, counts, 16, window, True)


@pytest.mark.parametrize("heads", [128, 16])
@pytest.mark.parametrize("block", [16, 64])
def test_latents(heads: int, block: int) -> None:
    for lengths, counts in (((1,), (1,)), ((3000,), (1,)), (tuple(range(1, 1300, 41)), (1,) * 32), *PROMPTS):
        check(LATENT, heads, lengths, counts, block)


@pytest.mark.parametrize(("view", "heads"), [(GQA, 32), (OSS, 64)], ids=str)
def test_decoding_in_a_graph(view: KVView, heads: int) -> None:
    """Lengths and tables change on the device between replays; rows that are padding have none."""
    lengths = (1, 700, 1033, 64, 17, 16, 15, 512)
    first, blocks = paged(lengths, (1,) * 8, 16, "cuda")
    room = first.table_SB.shape[1] * 16
    pool = torch.randn(blocks * 16, support.width_of(view), device="cuda").bfloat16()
    sinks = torch.randn(heads, device="cuda") if view == OSS else None
    q = torch.randn(8, heads, view.key_dim, device="cuda").bfloat16()
    held = torch.tensor(lengths, device="cuda")
    batch = support.with_lengths(first, held, room)

    def call() -> torch.Tensor:
        fresh = AttentionBatch(batch.spans, 8, batch.table_SB, 16, batch.spans_S3)
        return flashinfer.attend_paged(q, pool, fresh, view, 0.1, None, sinks)

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for now in (lengths, (1, 3, 1, 64, 2, 16, 1, 130), (1, 0, 1033, 0, 17, 0, 15, 512)):
        batch.spans_S3[:, 2] = torch.tensor(now, device="cuda")
        batch.table_SB.copy_(batch.table_SB[torch.randperm(8, device="cuda")] if now == lengths else first.table_SB)
        graph.replay()
        for s, length in enumerate(now):
            if length:
                alone = AttentionBatch.of((replace(first.spans[0], length=length),), 1, own_slots(batch, s)[:, :length])
                want = reference.attend_paged(q[s : s + 1].double(), pool.double(), alone, view, 0.1, None, sinks)
                assert_rows_close(out[s : s + 1].flatten(1), want.flatten(1), LIMIT, f"{now} {s}")
        assert out.isfinite().all()


def own_slots(batch: AttentionBatch, s: int) -> torch.Tensor:
    within = torch.arange(16, device="cuda")
    return (batch.table_SB[s].long()[:, None] * 16 + within).flatten()[None]


def test_steps_that_the_host_runs_ahead_of() -> None:
    """Plans are copied to the device while it is still busy: none may be overwritten before that."""
    batches = [paged((n, 900), (1 + n // 2, 600 + n), 16, "cuda") for n in range(20, 60)]
    pool = torch.randn(max(blocks for _, blocks in batches) * 16, 1024, device="cuda").bfloat16()
    q = torch.randn(1000, 32, 128, device="cuda").bfloat16()
    rows = [sum(span.count for span in batch.spans) for batch, _ in batches]
    apart = []
    for (batch, _), count in zip(batches, rows, strict=True):
        apart.append(flashinfer.attend_paged(q[:count], pool, batch, GQA, 0.1))
        torch.cuda.synchronize()
    big = torch.randn(8192, 8192, device="cuda").bfloat16()
    for _ in range(60):
        big @ big  # the device is busy for a while
    fresh = [replace(batch, spans=batch.spans) for batch, _ in batches]
    together = [flashinfer.attend_paged(q[:n], pool, b, GQA, 0.1) for b, n in zip(fresh, rows, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


CONFIG = {
    "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "vocab_size": 512, "max_position_embeddings": 2048,
}  # fmt: skip


def test_the_engine_runs_on_it(tmp_path: Path) -> None:
    """Prompts of all lengths, chunked, then decoding in graphs: as near to `transformers` in FP32 as our own kernels.

    Ours in other chunks are held to the same: a limit that they do not keep would say nothing of others.
    """
    pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
    from tests import forced

    oracle = forced.write_peaked(tmp_path, "qwen3_moe", **CONFIG)
    prompts = forced.draw_prompts((3, 100, 400, 17, 161, 33, 128, 65), CONFIG["vocab_size"])
    params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    found: dict[str, forced.Judged] = {}
    runs = {"ours": ("triton", 256), "ours in other chunks": ("triton", 96), "theirs": ("flashinfer", 256)}
    for name, (attention, chunk) in runs.items():
        llm = LLM(str(tmp_path), device="cuda", progress=False, attention=attention, kv_memory=1 << 26,
                  max_num_seqs=8, max_num_batched_tokens=chunk, prefix_cache=False)  # fmt: skip
        assert {layer.attention for layer in llm.launched.built.plan.layers} == {attention}
        assert isinstance(llm.engine.runner.graphs, DecodeGraphs), "decoding stands in graphs"
        found[name] = forced.judge(oracle, llm.generate(prompts, params))
        del llm
    print("", *(f"{name}: {judged}" for name, judged in found.items()), sep="\n")
    for name in ("ours in other chunks", "theirs"):
        forced.hold(found[name], found["ours"])
