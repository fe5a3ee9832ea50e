"""Decoding attention in CUDA C++ on a Hopper GPU (`-m gpu`), held against the reference twin in FP64.

What lies behind a context in its last block, and every row that no sequence owns, is NaN.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.formats import encodings, kv
from moesaic.kernels import hopper, reference
from moesaic.kernels.ops import AttentionBatch, KVView, Softmax, Span
from tests.compare import assert_rows_close
from tests.hopper_support import on_hopper

__all__ = ["on_hopper"]
pytestmark = pytest.mark.gpu
LIMIT = 2**-7
GQA, NARROW, WIDE = KVView(4, 128, 512, 128), KVView(2, 64, 128, 64), KVView(1, 128, 128, 128)
ENCODED = [Encoding("fp8_group128"), Encoding("fp8_tensor", True), Encoding("mxfp8"), Encoding("fp8_token"),
           Encoding("nvfp4"), Encoding("nvfp4", True), Encoding("bf16")]  # fmt: skip


def batch_of(lengths: tuple[int, ...], block: int, room: int = 0) -> tuple[AttentionBatch, int]:
    """Decoding sequences whose blocks lie anywhere, and how many blocks there are. room: positions of each table, and
    what the host believes their lengths to be, as where a graph is captured."""
    used = [-(-length // block) for length in lengths]
    width = max(1, -(-room // block), *used)
    table = torch.zeros(len(lengths), width, dtype=torch.int64 if block == 1 else torch.int32)
    for s, blocks in enumerate((torch.randperm(sum(used)) + 1).split(used)):
        table[s, : used[s]] = blocks
    spans = tuple(Span(s, 1, room or length) for s, length in enumerate(lengths))
    spans_S3 = torch.tensor([(s, 1, length) for s, length in enumerate(lengths)], device="cuda")
    return AttentionBatch(spans, len(lengths), table.cuda(), block, spans_S3), sum(used) + 1


def pool_for(batch: AttentionBatch, blocks: int, view: KVView, fp8: bool) -> Tensor:
    rows = torch.randn(blocks * batch.block, view.parts.width, device="cuda")
    rows *= 2.0 ** torch.randint(-3, 3, (len(rows), 1), device="cuda")  # exponents of FP8 rows differ
    pool = kv.encode(rows, view.parts) if fp8 else rows.bfloat16()
    seen = torch.zeros(len(pool), dtype=torch.bool, device="cuda")
    for row, length in zip(batch.table_SB.long(), batch.lengths_S.tolist(), strict=True):
        at = torch.arange(length, device="cuda")
        seen[row[at // batch.block] * batch.block + at % batch.block] = True
    pool[~seen] = 255 if fp8 else float("nan")
    return pool


def wanted(q: Tensor, pool: Tensor, batch: AttentionBatch, view: KVView, how: Softmax) -> Tensor:
    """The twin, one sequence after another; zeros where there is no context."""
    out = torch.zeros(*q.shape[:2], view.value_dim, dtype=torch.float64, device="cuda")
    wide = pool if pool.dtype == torch.uint8 else pool.double()
    for s, length in enumerate(batch.lengths_S.tolist()):
        if length:
            at = torch.arange(length, device="cuda")
            slots = (batch.table_SB[s].long()[at // batch.block] * batch.block + at % batch.block)[None]
            one = AttentionBatch.of((Span(0, 1, length),), 1, slots)
            args = (view, how.scale, how.window, how.sinks_H)
            out[s] = reference.attend_paged(q[s : s + 1].double(), wide, one, *args)[0]
    return out


def check(lengths: tuple[int, ...], repeat: int, view: KVView = GQA, block: int = 16, fp8: bool = False,
          window: int | None = None, sinks: bool = False) -> None:  # fmt: skip
    batch, blocks = batch_of(lengths, block)
    pool, heads = pool_for(batch, blocks, view, fp8), view.kv_heads * repeat
    q = torch.randn(len(lengths), heads, view.key_dim, device="cuda").bfloat16()
    how = Softmax(view.key_dim**-0.5, window, torch.randn(heads, device="cuda") * 3 if sinks else None)
    mine = hopper.attend_paged(q, pool, batch, view, how.scale, how.window, how.sinks_H)
    theirs = wanted(q, pool, batch, view, how)
    empty = batch.lengths_S == 0
    assert not mine[empty].any()
    assert_rows_close(mine[~empty].flatten(1), theirs[~empty].flatten(1), LIMIT, f"{lengths} {repeat} {view}")


def test_probe() -> None:
    assert hopper.probe() is None


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_lengths(block: int, fp8: bool) -> None:
    for length in (1, 2, 15, 16, 17, 63, 64, 65, 255, 1000, 1024, 1025, 1100):
        check((length,), 8, block=block, fp8=fp8)
    check((16384,), 8, block=block, fp8=fp8)
    check((5, 0, 1024, 1), 8, block=block, fp8=fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("view", [GQA, NARROW, WIDE], ids=str)
@pytest.mark.parametrize("repeat", [1, 4, 5, 8, 12, 16])
def test_heads(repeat: int, view: KVView, fp8: bool) -> None:
    check((1000,), repeat, view, fp8=fp8)
    check((300, 17, 1, 511), repeat, view, fp8=fp8)
    check((700,), repeat, view, fp8=fp8, window=128, sinks=True)


@pytest.mark.parametrize("fp8", [False, True])
def test_many_ragged(fp8: bool) -> None:
    check(tuple(torch.randint(0, 1500, (64,)).tolist()), 8, fp8=fp8)
    check(tuple(torch.randint(0, 300, (256,)).tolist()), 8, fp8=fp8)
    check(tuple(torch.randint(0, 3000, (7,)).tolist()), 12, fp8=fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("window", [1, 16, 100, 128, 5000])
def test_windows_and_sinks(window: int, fp8: bool) -> None:
    for lengths in ((1,), (130,), (1111,), (40, 128, 129, 1000) * 8):
        check(lengths, 8, NARROW, fp8=fp8, window=window, sinks=True)
        check(lengths, 8, GQA, fp8=fp8, window=window)
    check((600, 9), 8, GQA, fp8=fp8, sinks=True)


def test_prompts_beside_decoding() -> None:
    lengths, counts = (100, 33, 70, 20), (1, 1, 30, 20)
    batch, blocks = batch_of(lengths, 16)
    starts = [sum(counts[:s]) for s in range(4)]
    spans = tuple(Span(*each) for each in zip(starts, counts, lengths, strict=True))
    spans_S3 = torch.tensor([(s.start, s.count, s.length) for s in spans], device="cuda")
    mixed = AttentionBatch(spans, 2, batch.table_SB, 16, spans_S3)
    pool, q = pool_for(batch, blocks, GQA, False), torch.randn(sum(counts), 32, 128, device="cuda").bfloat16()
    mine = hopper.attend_paged(q, pool, mixed, GQA, 0.1)
    theirs = reference.attend_paged(q.double(), pool.double(), mixed, GQA, 0.1)
    assert_rows_close(mine.flatten(1), theirs.flatten(1), LIMIT, "mixed")


@pytest.mark.parametrize("encoding", ENCODED, ids=str)
@pytest.mark.parametrize("view", [GQA, NARROW], ids=str)
def test_encoded(view: KVView, encoding: Encoding) -> None:
    """Bit for bit what the formats say of the rows that attention gives on its own."""
    for lengths in ((1024,), (0, 7, 300), (90,) * 70):
        batch, blocks = batch_of(lengths, 16)
        pool, how = pool_for(batch, blocks, view, False), Softmax(0.1)
        q = torch.randn(len(lengths), view.kv_heads * 8, view.key_dim, device="cuda").bfloat16()
        scale = torch.tensor(0.01, device="cuda") if encoding.static else None
        rows = hopper.attend_encode(q, pool, batch, view, how, encoding, scale)
        plain = hopper.attend_paged(q, pool, batch, view, how.scale).flatten(1)
        want = encodings.encode(plain.cpu(), encoding, None if scale is None else scale.cpu())
        for name, part in want.parts.items():
            mine = rows.parts[name].cpu().reshape(-1, part.shape[-1] if part.dim() else 1)
            assert torch.equal(mine.view(torch.uint8), part.reshape(mine.shape).view(torch.uint8)), (lengths, name)
        if "exact" in rows.parts:
            top = want.parts.get("global_scale", torch.ones(()))
            assert torch.equal(rows.parts["exact"].cpu().float() * top, want.decode())


@pytest.mark.parametrize("fp8", [False, True])
def test_captured_once_for_all_lengths(fp8: bool) -> None:
    """A graph replays with other lengths, tables, queries and rows than those it was captured with."""
    sizes = (2000, 16, 1), (1, 2048, 700), (0, 900, 0)
    first, blocks = batch_of((2048,) * 3, 16, 2048)
    pool = pool_for(first, blocks, GQA, fp8)
    q, how, encoding = torch.randn(3, 32, 128, device="cuda").bfloat16(), Softmax(0.1), Encoding("fp8_group128")
    hopper.attend_encode(q, pool, first, GQA, how, encoding)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = hopper.attend_encode(q, pool, first, GQA, how, encoding)
    for lengths in sizes:
        now, _ = batch_of(lengths, 16, 2048)
        fresh = pool_for(now, blocks, GQA, fp8)
        pool.copy_(fresh)
        q.copy_(torch.randn(q.shape))
        first.table_SB.copy_(now.table_SB)
        first.spans_S3.copy_(now.spans_S3)
        graph.replay()
        plain = hopper.attend_paged(q, fresh, now, GQA, how.scale).flatten(1)
        theirs = wanted(q, fresh, now, GQA, how).flatten(1)
        some = now.lengths_S > 0
        assert_rows_close(plain[some], theirs[some], LIMIT, f"{lengths}")
        want = encodings.encode(plain.cpu(), encoding)
        for name, part in want.parts.items():
            assert torch.equal(rows.parts[name].cpu().view(torch.uint8), part.view(torch.uint8)), (lengths, name)


def test_a_row_written_by_the_kernel_in_front() -> None:
    """Dependent launch: queries and the last row come from the kernel before, earlier rows were there."""
    from moesaic.kernels import triton
    from moesaic.kernels.ops import HeadNorms

    norms = HeadNorms(None, None, 1e-6, False, torch.bfloat16)
    turn = (torch.ones(3, 64, device="cuda"), torch.zeros(3, 64, device="cuda"))
    for lengths in ((1, 600, 1024), (64, 65, 2000), (16, 17, 3)):
        batch, blocks = batch_of(lengths, 16)
        pool, x = pool_for(batch, blocks, GQA, False), torch.randn(1, 3, 40 * 128, device="cuda")
        last = batch.lengths_S - 1
        slots = batch.table_SB.long()[torch.arange(3, device="cuda"), last // 16] * 16 + last % 16

        def layer(batch: AttentionBatch = batch, pool: Tensor = pool, x: Tensor = x,
                  slots: Tensor = slots) -> Tensor:  # fmt: skip
            q = triton.store_heads(x, norms, turn, pool, slots, GQA)
            return hopper.attend_paged(q, pool, batch, GQA, 0.1)

        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mine = layer()
        for _ in range(20):
            x.copy_(torch.randn(x.shape))
            pool[slots] = float("nan")
            graph.replay()
            q = triton.store_heads(x, norms, turn, pool, slots, GQA)
            theirs = wanted(q, pool, batch, GQA, Softmax(0.1))
            assert_rows_close(mine.flatten(1), theirs.flatten(1), LIMIT, f"{lengths}")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("view", [GQA, NARROW], ids=str)
@pytest.mark.parametrize(("rows", "start"), [(2, 0), (33, 0), (40, 100), (130, 7), (16, 1500)])
def test_rows_of_a_prompt_written_by_the_kernel_in_front(rows: int, start: int, view: KVView, fp8: bool) -> None:
    """Dependent launch: each row's context ends with it, and what is before it in the prompt is written only now, by a
    kernel that waits for a long one. Behind them a sequence that decodes."""
    from moesaic.kernels import triton
    from moesaic.kernels._triton.linear import wide_terms
    from moesaic.kernels.ops import HeadNorms

    heads, size = 8 * view.kv_heads, view.key_dim
    norms, count = HeadNorms(None, None, 1e-6, False, torch.bfloat16), rows + 1
    turn = (torch.ones(count, size // 2, device="cuda"), torch.zeros(count, size // 2, device="cuda"))
    two, blocks = batch_of((start + rows, 77), 16, 2048)
    lengths = torch.cat([torch.arange(rows) + start + 1, torch.tensor([77])]).cuda()
    spans_S3 = torch.stack([torch.arange(count).cuda(), torch.ones_like(lengths), lengths], 1)
    fresh = torch.cat([torch.arange(rows) + 1, torch.ones(1).long()]).cuda()
    table = torch.cat([two.table_SB[:1].expand(rows, -1), two.table_SB[1:]])
    batch = AttentionBatch((Span(0, 1, 2048),) * count, count, table, 16, spans_S3, fresh)
    pool, h = pool_for(two, blocks, view, fp8), torch.randn(count, 8192, device="cuda").bfloat16()
    w = torch.randn((heads + 2 * view.kv_heads) * size, 8192, device="cuda").bfloat16() / 90
    last = lengths - 1
    slots = table.long()[torch.arange(count, device="cuda"), last // 16] * 16 + last % 16

    def queries() -> Tensor:
        return triton.store_heads(wide_terms(h, w, None), norms, turn, pool, slots, view)

    hopper.attend_paged(queries(), pool, batch, view, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine = hopper.attend_paged(queries(), pool, batch, view, 0.1)
    for _ in range(5):
        h.copy_(torch.randn(h.shape))
        pool[slots] = 255 if fp8 else float("nan")
        graph.replay()
        q = queries()
        theirs = wanted(q, pool, batch, view, Softmax(0.1))
        assert_rows_close(mine.flatten(1), theirs.flatten(1), LIMIT, f"{rows} {start}")
