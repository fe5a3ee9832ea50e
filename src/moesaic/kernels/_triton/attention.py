"""Causal attention by online softmax, of one sequence's queries or of one query of many sequences; paged or not.

A tile's rows are (query, head) pairs of one kv head: few heads and many queries of a prompt, or many heads and one
query of a decoding sequence, fill the same tensor-core tile. Keys are read as two pieces of power-of-two width (512
and 64 for a latent cache); where the value is the first piece of the key, it is read once.
A decoding sequence's context may be shared out over SPLITS programs, whose results `merge_kernel` joins.

Letters: M rows of the tile, L positions, K key size, V value size, R query heads per kv head, S sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels._triton.bits import to_operand

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def keys(base, ok, d_first, WIDTH: tl.constexpr, END: tl.constexpr):
    """A piece of keys or values or queries [rows, WIDTH] from d_first on; base: pointers [rows, 1]; zeros from END."""
    d = d_first + tl.arange(0, WIDTH)[None, :]
    return to_operand(tl.load(base + d, ok & (d < END), 0.0))


@triton.jit
def fold(q1, q2, at_M, row_ok, kv, slots_row, begin, end, scale, WINDOW: tl.constexpr, K: tl.constexpr,
         V: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BV: tl.constexpr, SHARED: tl.constexpr,
         BM: tl.constexpr, BL: tl.constexpr):  # fmt: skip
    """(running maximum, sum of exponentials, weighted values) of positions begin..end; scores in units of log 2.

    kv: (k pointer, its token stride, v pointer, its token stride), at the kv head.
    """
    k_ptr, k_token, v_ptr, v_token = kv
    top, total = tl.full([BM], LOWEST, tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for start in range(begin, end, BL):
        at = start + tl.arange(0, BL)
        ok = at < end
        slot = at.to(tl.int64) if slots_row is None else tl.load(slots_row + at, ok, 0).to(tl.int64)
        row = k_ptr + (slot * k_token)[:, None]
        k1 = keys(row, ok[:, None], 0, D1, K)
        scores = tl.dot(q1, tl.trans(k1))
        if D2 > 0:
            scores = tl.dot(q2, tl.trans(keys(row, ok[:, None], D1, D2, K)), scores)
        seen = ok[None, :] & (at[None, :] <= at_M[:, None]) & row_ok[:, None]
        if WINDOW > 0:
            seen = seen & (at[None, :] > at_M[:, None] - WINDOW)
        scores = tl.where(seen, scores * (scale * LOG2E), float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        weights, fade = tl.exp2(scores - peak[:, None]), tl.exp2(top - peak)
        total = total * fade + tl.sum(weights, 1)
        v = k1 if SHARED else keys(v_ptr + (slot * v_token)[:, None], ok[:, None], 0, BV, V)
        acc = tl.dot(to_operand(weights), v, acc * fade[:, None])
        top = peak
    return top, total, acc


@triton.jit
def attention_kernel(q_ptr, q_token, q_head, k_ptr, k_token, k_head, v_ptr, v_token, v_head, slots_ptr, slots_stride,
                     spans_ptr, sinks_ptr, out_ptr, lse_ptr, start, count, length, scale, heads, R: tl.constexpr,
                     K: tl.constexpr, V: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BV: tl.constexpr,
                     SHARED: tl.constexpr, WINDOW: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr,
                     BL: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Rows start..start + count of a sequence, its last positions of `length`; from spans_ptr where there are many."""
    BLOCKS: tl.constexpr = (R + RB - 1) // RB
    g, part = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    s, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    if spans_ptr is not None:
        start, count = tl.load(spans_ptr + 3 * s).to(tl.int32), tl.load(spans_ptr + 3 * s + 1).to(tl.int32)
        length = tl.load(spans_ptr + 3 * s + 2).to(tl.int32)
        if tl.program_id(0) * (BM // RB) >= count:
            return
    i = tl.arange(0, BM)
    query, r = tl.program_id(0) * (BM // RB) + i // RB, part * RB + i % RB
    head, row_ok = g * R + r, (query < count) & (r < R)
    at_M = length - count + query
    token = (start + query).to(tl.int64)
    q_row = q_ptr + (token * q_token + head * q_head)[:, None]
    q1 = keys(q_row, row_ok[:, None], 0, D1, K)
    q2 = keys(q_row, row_ok[:, None], D1, D2, K) if D2 > 0 else None
    first = tl.program_id(0) * (BM // RB)
    begin, end = 0, tl.minimum(length, length - count + first + BM // RB)
    if WINDOW > 0:
        begin = tl.maximum(0, length - count + first - WINDOW + 1) // BL * BL
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, SPLITS), BL) * BL
        begin += split * share
        end = tl.minimum(end, begin + share)
    kv = (k_ptr + g * k_head, k_token, v_ptr + g * v_head, v_token)
    slots_row = None if slots_ptr is None else slots_ptr + s.to(tl.int64) * slots_stride
    top, total, acc = fold(q1, q2, at_M, row_ok, kv, slots_row, begin, end, scale, WINDOW, K, V, D1, D2, BV, SHARED,
                           BM, BL)  # fmt: skip
    if sinks_ptr is not None and SPLITS == 1:
        sink = tl.load(sinks_ptr + head, row_ok, 0.0).to(tl.float32) * LOG2E
        peak = tl.maximum(top, sink)
        total = total * tl.exp2(top - peak) + tl.exp2(sink - peak)
        acc = acc * tl.exp2(top - peak)[:, None]
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    row = (token * heads + head) * SPLITS + split
    v = tl.arange(0, BV)[None, :]
    tl.store(out_ptr + row[:, None] * V + v, acc.to(out_ptr.dtype.element_ty), row_ok[:, None] & (v < V))
    if SPLITS > 1:
        lse = top + tl.log2(tl.where(total == 0, 1.0, total))
        tl.store(lse_ptr + row, tl.where(total == 0, float("-inf"), lse), row_ok)


@triton.jit
def merge_kernel(part_ptr, lse_ptr, sinks_ptr, out_ptr, heads, V: tl.constexpr, BV: tl.constexpr, SPLITS: tl.constexpr,
                 BS: tl.constexpr):  # fmt: skip
    """One (token, head) per program: shares of the context, weighted by their sums of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    p, v = tl.arange(0, BS), tl.arange(0, BV)
    lse = tl.load(lse_ptr + row * SPLITS + p, p < SPLITS, float("-inf"))
    peak = tl.maximum(tl.max(lse, 0), LOWEST)
    extra = 0.0
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row % heads).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
        extra = tl.exp2(sink - peak)
    weights = tl.exp2(lse - peak)
    total = tl.sum(weights, 0) + extra
    at = (row * SPLITS + p)[:, None] * V + v[None, :]
    parts = tl.load(part_ptr + at, (p < SPLITS)[:, None] & (v < V)[None, :], 0.0)
    y = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * V + v, y.to(out_ptr.dtype.element_ty), v < V)
