"""Attention of prompts in CUDA C++ on a Hopper GPU (`-m gpu`), against the reference in FP64.

Whatever no sequence may read is NaN: the pool's block 0, and what lies in a last block behind the context's end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")

from torch import Tensor

from moesaic.kernels import hopper, reference
from moesaic.kernels._hopper import attend_prompt
from moesaic.kernels._triton.attend_paged import Heads, Tables
from moesaic.kernels.ops import AttentionBatch, KVView, Softmax, Span
from tests.compare import assert_rows_close
from tests.hopper_support import on_hopper

__all__ = ["on_hopper"]
pytestmark = pytest.mark.gpu
LIMIT = 2**-7
RAGGED = ((1, 1), (17, 17), (300, 300), (129, 129), (64, 200), (5, 1000), (128, 128), (1, 700))
"""(rows, length of the context) of each sequence."""


@dataclass(frozen=True)
class Case:
    q: Tensor
    pool: Tensor
    batch: AttentionBatch
    view: KVView
    how: Softmax

    @staticmethod
    def of(sizes: tuple[tuple[int, int], ...], size: int, kv_heads: int, repeat: int, block: int,
           window: int | None = None, sinks: bool = False) -> Case:  # fmt: skip
        spans, start = [], 0
        for count, length in sizes:
            spans.append(Span(start, count, length))
            start += count
        blocks = [-(-length // block) for _, length in sizes]
        taken = iter((torch.randperm(sum(blocks)) + 1).tolist())
        table = torch.zeros(len(sizes), max(blocks), dtype=torch.int32)
        pool = torch.full(((sum(blocks) + 1) * block, 2 * kv_heads * size), float("nan"), dtype=torch.bfloat16)
        for s, (_, length) in enumerate(sizes):
            table[s, : blocks[s]] = torch.tensor([next(taken) for _ in range(blocks[s])])
            at = torch.arange(length)
            pool[table[s].long()[at // block] * block + at % block] = torch.randn(length, pool.shape[1]).bfloat16()
        spans_S3 = torch.tensor([(span.start, span.count, span.length) for span in spans], device="cuda")
        batch = AttentionBatch(tuple(spans), 0, table.cuda(), block, spans_S3)
        q = torch.randn(start, kv_heads * repeat, size, device="cuda").bfloat16()
        sinks_H = torch.randn(kv_heads * repeat, device="cuda").bfloat16() if sinks else None
        view = KVView(kv_heads, size, kv_heads * size, size)
        return Case(q, pool.cuda(), batch, view, Softmax(size**-0.5, window, sinks_H))

    def run(self) -> Tensor:
        heads, tables = Heads.of(self.pool, self.view), Tables.of(self.batch)
        assert attend_prompt.serves(self.q, heads, tables)
        out = torch.full((*self.q.shape[:2], self.view.value_dim), float("nan"), dtype=self.q.dtype, device="cuda")
        attend_prompt.attend(self.q, heads, tables, self.how, out)
        return out

    def check(self) -> None:
        how, sinks = self.how, None if self.how.sinks_H is None else self.how.sinks_H.double()
        want = reference.attend_paged(self.q.double(), self.pool.double(), self.batch, self.view, how.scale, how.window,
                                      sinks)  # fmt: skip
        assert_rows_close(self.run(), want, LIMIT, "weights are rounded to BF16, as is the result")


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("repeat", [1, 4, 8, 12])
def test_ragged(size: int, block: int, repeat: int) -> None:
    Case.of(RAGGED, size, 2, repeat, block).check()


@pytest.mark.parametrize("size", [64, 128])
def test_every_length(size: int) -> None:
    Case.of(tuple((n, n) for n in range(1, 301)), size, 1, 4, 16).check()
    Case.of(tuple((1 + n % 130, 130 + n) for n in range(0, 300, 7)), size, 2, 4, 16).check()


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [1, 100, 128, 300])
def test_windows(size: int, window: int) -> None:
    Case.of((*RAGGED, (1000, 1000), (200, 1777)), size, 2, 8, 16, window).check()
    Case.of((*RAGGED, (1000, 1000), (200, 1777)), size, 2, 8, 64, window, sinks=True).check()


@pytest.mark.parametrize("size", [64, 128])
def test_sinks_in_either_dtype(size: int) -> None:
    case = Case.of(RAGGED, size, 8, 8, 16, None, sinks=True)
    case.check()
    assert case.how.sinks_H is not None
    wide = replace(case.how, sinks_H=case.how.sinks_H.float() * 3 + 2)
    replace(case, how=wide).check()


@pytest.mark.parametrize("shape", [(64, 8, 8), (128, 4, 8), (128, 8, 1)], ids=str)
def test_long(shape: tuple[int, int, int]) -> None:
    Case.of(((4096, 4096),), *shape, 16).check()
    Case.of(((1000, 4096), (2048, 3001), (1, 4000)), *shape, 16).check()


def test_scores_far_apart() -> None:
    """Large scores, of either sign: the running maximum moves, and nothing overflows."""
    case = Case.of(((700, 700), (300, 900)), 128, 2, 8, 16)
    replace(case, q=case.q * 40).check()
    replace(case, q=case.q * 0).check()


def test_rows_of_a_wider_tensor_and_a_wide_table() -> None:
    case = Case.of(RAGGED, 128, 4, 8, 16)
    wider = torch.randn(len(case.q), 32 + 8, 128, device="cuda").bfloat16()
    wider[:, :32] = case.q
    replace(case, q=wider[:, :32]).check()
    long = replace(case, batch=replace(case.batch, table_SB=case.batch.table_SB.long()))
    assert torch.equal(long.run(), case.run())


def test_graphs_and_repeats() -> None:
    """A captured call does the same again, whatever order its items are taken in."""
    case = Case.of(((1500, 2000), (777, 777)), 128, 4, 8, 16)
    first = case.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.parametrize(("size", "block", "window"), [(96, 16, None), (128, 1, None), (64, 16, 100)])
def test_what_is_left_to_triton(size: int, block: int, window: int | None) -> None:
    case = Case.of(((200, 300), (80, 80)), size, 2, 4, block, window)
    heads, tables = Heads.of(case.pool, case.view), Tables.of(case.batch)
    out = torch.empty_like(case.q)
    attend_prompt.prefill(case.q, heads, tables, case.how, out)
    want = reference.attend_paged(case.q.double(), case.pool.double(), case.batch, case.view, case.how.scale, window)
    assert_rows_close(out, want, LIMIT)


def test_the_backend_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts behind sequences that decode, as a step has them."""
    case = Case.of(((1, 90), (1, 300), (200, 300), (80, 80)), 128, 4, 8, 16)
    called: list[int] = []
    real = attend_prompt.attend
    monkeypatch.setattr(attend_prompt, "attend", lambda *given: (called.append(given[2].sequences), real(*given))[1])
    out = hopper.attend_paged(case.q, case.pool, replace(case.batch, decodes=2), case.view, case.how.scale)
    want = reference.attend_paged(case.q.double(), case.pool.double(), case.batch, case.view, case.how.scale)
    assert_rows_close(out, want, LIMIT)
    assert called == [2]
