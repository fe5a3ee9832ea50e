"""The largest score of each row, where it is, and the next: chunks of the vocabulary first, then their winners.

Scores become integers that order as they do, with the id below them: the largest integer is the first of the largest.
Letters: R rows, V vocabulary, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.pdl import options, wait

CHUNK = 4096
LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def ordered(x, at):
    """INT64 keys: by FP32 value (a NaN is the largest), the lower place first."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # minus zero equals zero
    bits = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (bits.to(tl.int64) << 32) | (at.to(tl.int64) ^ LOW)


@triton.jit
def value_of(key):
    bits = (key >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def chunk_kernel(scores_ptr, key_ptr, next_ptr, V, stride, C, BLOCK: tl.constexpr, PDL: tl.constexpr):
    r, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = c * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    x = tl.load(scores_ptr + r * stride + v, v < V, float("-inf")).to(tl.float32)
    key = ordered(x, v)
    first = tl.max(key, 0)
    tl.store(key_ptr + r * C + c, first)
    tl.store(next_ptr + r * C + c, tl.max(tl.where(key == first, float("-inf"), x), 0))


@triton.jit
def winner_kernel(key_ptr, next_ptr, id_ptr, best_ptr, second_ptr, C, BC: tl.constexpr, PDL: tl.constexpr):
    r, c = tl.program_id(0).to(tl.int64), tl.arange(0, BC)
    wait(PDL)
    key = tl.load(key_ptr + r * C + c, c < C, -(2**63))
    first = tl.max(key, 0)
    others = tl.where((key == first) | (c >= C), float("-inf"), value_of(key))
    behind = tl.load(next_ptr + r * C + c, c < C, float("-inf"))
    tl.store(id_ptr + r, (first & LOW) ^ LOW)
    tl.store(best_ptr + r, value_of(first))
    tl.store(second_ptr + r, tl.maximum(tl.max(others, 0), tl.max(behind, 0)))


def top_two(scores_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores = scores_RV if scores_RV.stride(1) == 1 else scores_RV.contiguous()
    (rows, vocab), new = scores.shape, scores.new_empty
    ids, best, second = new(rows, dtype=torch.int64), new(rows, dtype=torch.float32), new(rows, dtype=torch.float32)
    chunks = cdiv(vocab, CHUNK)
    key, behind = new(rows, chunks, dtype=torch.int64), new(rows, chunks, dtype=torch.float32)
    if rows:
        how = options(scores.device)
        row = scores.stride(0)
        chunk_kernel[(rows, chunks)](scores, key, behind, vocab, row, chunks, BLOCK=CHUNK, num_warps=8, **how)
        winner_kernel[(rows,)](key, behind, ids, best, second, chunks, BC=power(chunks), num_warps=1, **how)
    return ids, best, second
