"""What the tests of FlashInfer's backend share: batches over blocks that lie anywhere, held against FP64."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels import flashinfer, reference
from moesaic.kernels.ops import AttentionBatch, KVView, Span
from tests.compare import assert_rows_close

GQA = KVView(4, 128, 512, 128)
OSS = KVView(8, 64, 512, 64)
LATENT = KVView(1, 576, 0, 512)
LIMIT = 2**-7
"""BF16 results and weights, as all kernels are held to."""


def paged(lengths: tuple[int, ...], counts: tuple[int, ...], block: int, device: str) -> tuple[AttentionBatch, int]:
    """A batch whose blocks lie anywhere, and how many blocks there are. Those that decode come first."""
    used = [-(-length // block) for length in lengths]
    table = torch.zeros(len(lengths), max(used) + 2, dtype=torch.int32)
    for s, blocks in enumerate((torch.randperm(sum(used)) + 1).split(used)):
        table[s, : used[s]] = blocks
    starts = [sum(counts[:s]) for s in range(len(counts))]
    spans = tuple(Span(*each) for each in zip(starts, counts, lengths, strict=True))
    decodes = next((s for s, count in enumerate(counts) if count != 1), len(counts))
    spans_S3 = torch.tensor([(s.start, s.count, s.length) for s in spans], device=device)
    return AttentionBatch(spans, decodes, table.to(device), block, spans_S3), sum(used) + 1


def width_of(view: KVView) -> int:
    return view.key_dim if view.latent else 2 * view.kv_heads * view.key_dim


def check(view: KVView, heads: int, lengths: tuple[int, ...], counts: tuple[int, ...], block: int = 16,
          window: int | None = None, sinks: bool = False, device: str = "cuda") -> float:  # fmt: skip
    """`attend_paged` against its twin in FP64; positions that no context holds are NaN. Returns the worst row."""
    batch, blocks = paged(lengths, counts, block, device)
    pool = torch.randn(blocks * block, width_of(view), device=device).bfloat16()
    seen = torch.zeros(len(pool), dtype=torch.bool, device=device)
    seen[batch.slots_SL[~batch.outside_SL]] = True
    pool[~seen] = float("nan")
    wide = torch.randn(sum(counts), heads + 3, view.key_dim, device=device).bfloat16()
    q, sinks_H = wide[:, 1 : heads + 1], torch.randn(heads, device=device) * 3 if sinks else None
    args = (view, view.key_dim**-0.5, window, sinks_H)
    mine = flashinfer.attend_paged(q, pool, batch, *args)
    theirs = reference.attend_paged(q.double(), pool.double(), batch, *args)
    assert (mine.shape, mine.dtype) == (theirs.shape, torch.bfloat16)
    return assert_rows_close(mine.flatten(1), theirs.flatten(1), LIMIT, f"{view} {lengths} {counts} {block} {window}")


def with_lengths(batch: AttentionBatch, lengths: Tensor, longest: int) -> AttentionBatch:
    """As a graph sees its batch: lengths on the device only, spans that say no more than how long one could be."""
    spans_S3 = torch.stack([torch.arange(len(lengths), device=lengths.device), torch.ones_like(lengths), lengths], 1)
    return AttentionBatch((Span(0, 1, longest),) * len(lengths), len(lengths), batch.table_SB, batch.block, spans_S3)
