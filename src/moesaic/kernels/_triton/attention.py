"""Causal attention by online softmax, of one sequence's queries or of one query of many sequences; paged or not.

A tile's rows are (query, head) pairs of one kv head: few heads and many queries of a prompt, or many heads and one
query of a decoding sequence, fill the same tensor-core tile. Keys are read as two pieces of power-of-two width (512
and 64 for a latent cache); where the value is the first piece of the key, it is read once.
A context may be shared out over several programs, whose results `merge_kernel` joins: in `splits` equal parts, or, for
results that depend on nothing but the context, at fixed positions (CHUNK).

An FP8 cache (formats/kv.py) is decoded in registers; powers of two multiply the scores, and the weights of the values,
both exactly.

Letters: M rows of the tile, L positions, K key size, V value size, R query heads per kv head, S sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels._triton.bits import TINY_E4M3, e4m3, e8m0, to_operand
from moesaic.kernels._triton.emit import emit_row
from moesaic.kernels._triton.pdl import wait

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e38)
LIFT = tl.constexpr(TINY_E4M3.value**-0.5)
"""The root of what decoded E4M3 operands are too small by; applied twice, so that nothing overflows in between."""
TURN = tl.constexpr(8)
"""Parts of a context that `merge_kernel` loads at once."""


@triton.jit
def keys(base, ok, d_first, WIDTH: tl.constexpr, END: tl.constexpr, FP8: tl.constexpr):
    """A piece of keys or values or queries [rows, WIDTH] from d_first on; base: pointers [rows, 1]; zeros from END."""
    d = d_first + tl.arange(0, WIDTH)[None, :]
    x = tl.load(base + d, ok & (d < END), 0.0)
    return e4m3(x, True) if FP8 else to_operand(x)


@triton.jit
def powers(bytes_ptr, at, ok):
    """[L]: the powers of two of a part of the rows, times LIFT."""
    return e8m0(tl.load(bytes_ptr + at, ok, 127)) * LIFT


@triton.jit
def fold(q1, q2, at_M, row_ok, kv, tail_ptr, key_bytes, value_bytes, table_row, begin, end, scale,
         BLOCK: tl.constexpr, WINDOW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D1: tl.constexpr,
         D2: tl.constexpr, BV: tl.constexpr, SHARED: tl.constexpr, FP8: tl.constexpr, BM: tl.constexpr,
         BL: tl.constexpr):  # fmt: skip
    """(running maximum, sum of exponentials, weighted values) of positions begin..end; scores in units of log 2.

    kv: (k pointer, its token stride, v pointer, its token stride), at the kv head. key_bytes, value_bytes: where a row
    of bytes has the head's exponents.  tail_ptr: the rows as BF16, where an FP8 cache has the end of its keys in that.
    """
    k_ptr, k_token, v_ptr, v_token = kv
    top, total = tl.full([BM], LOWEST, tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for start in range(begin, end, BL):
        at = start + tl.arange(0, BL)
        ok = at < end
        if table_row is None:
            slot = at.to(tl.int64)
        elif BLOCK == 1:
            slot = tl.load(table_row + at, ok, 0).to(tl.int64)
        else:
            slot = tl.load(table_row + at // BLOCK, ok, 0).to(tl.int64) * BLOCK + at % BLOCK
        row = k_ptr + (slot * k_token)[:, None]
        k1 = keys(row, ok[:, None], 0, D1, K, FP8)
        scores = tl.dot(q1, tl.trans(k1))
        if FP8:
            power = powers(key_bytes, slot * k_token, ok)
            scores = scores * LIFT * power[None, :]
        if D2 > 0:
            if tail_ptr is not None:
                tail_row = tail_ptr + (slot * (k_token // 2) + D1 // 2)[:, None]
                scores = tl.dot(q2, tl.trans(keys(tail_row, ok[:, None], 0, D2, K - D1, False)), scores)
            elif FP8:
                k2 = keys(row, ok[:, None], D1, D2, K, True)
                scores += tl.dot(q2, tl.trans(k2)) * LIFT * power[None, :]
            else:
                scores = tl.dot(q2, tl.trans(keys(row, ok[:, None], D1, D2, K, False)), scores)
        seen = ok[None, :] & (at[None, :] <= at_M[:, None]) & row_ok[:, None]
        if WINDOW > 0:
            seen = seen & (at[None, :] > at_M[:, None] - WINDOW)
        scores = tl.where(seen, scores * (scale * LOG2E), float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        weights, fade = tl.exp2(scores - peak[:, None]), tl.exp2(top - peak)
        total = total * fade + tl.sum(weights, 1)
        v = k1 if SHARED else keys(v_ptr + (slot * v_token)[:, None], ok[:, None], 0, BV, V, FP8)
        if FP8:
            weights *= (power if SHARED else powers(value_bytes, slot * v_token, ok))[None, :]
        acc = tl.dot(to_operand(weights), v, acc * fade[:, None])
        top = peak
    return top, total, acc * LIFT if FP8 else acc


@triton.jit
def attention_kernel(q_ptr, q_token, q_head, k_ptr, k_token, k_head, v_ptr, v_token, v_head, tail_ptr, bytes_ptr,
                     exponents_at, table_ptr, table_stride, spans_ptr, sinks_ptr, out_ptr, lse_ptr, start, count,
                     length, splits, scale, heads, BLOCK: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
                     V: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BV: tl.constexpr, SHARED: tl.constexpr,
                     FP8: tl.constexpr, WINDOW: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr,
                     SPLIT: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows start..start + count of a sequence, its last positions of `length`; from spans_ptr where there are many.

    SPLIT: out and lse hold a part per program. bytes_ptr: the rows' bytes, exponents from exponents_at on.
    tail_ptr: the rows as BF16, where keys end in that.
    """
    BLOCKS: tl.constexpr = (R + RB - 1) // RB
    g, part = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    s, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    wait(PDL)
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
    q1 = keys(q_row, row_ok[:, None], 0, D1, K, False)
    q2 = keys(q_row, row_ok[:, None], D1, D2, K, False) if D2 > 0 else None
    first = tl.program_id(0) * (BM // RB)
    begin, end = 0, tl.minimum(length, length - count + first + BM // RB)
    if WINDOW > 0:
        begin = tl.maximum(0, length - count + first - WINDOW + 1) // BL * BL
    if CHUNK > 0:
        begin = tl.maximum(begin, split * CHUNK)
        end = tl.minimum(end, split * CHUNK + CHUNK)
    elif SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, splits), BL) * BL
        begin += split * share
        end = tl.minimum(end, begin + share)
    groups = heads // R
    key_bytes = None if bytes_ptr is None else bytes_ptr + exponents_at + g
    value_bytes = None if bytes_ptr is None else bytes_ptr + exponents_at + groups + g
    kv = (k_ptr + g * k_head, k_token, v_ptr + g * v_head, v_token)
    table_row = None if table_ptr is None else table_ptr + s.to(tl.int64) * table_stride
    top, total, acc = fold(q1, q2, at_M, row_ok, kv, tail_ptr, key_bytes, value_bytes, table_row, begin, end, scale,
                           BLOCK, WINDOW, K, V, D1, D2, BV, SHARED, FP8, BM, BL)  # fmt: skip
    if sinks_ptr is not None and not SPLIT:
        sink = tl.load(sinks_ptr + head, row_ok, 0.0).to(tl.float32) * LOG2E
        peak = tl.maximum(top, sink)
        total = total * tl.exp2(top - peak) + tl.exp2(sink - peak)
        acc = acc * tl.exp2(top - peak)[:, None]
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    row = (token * heads + head) * splits + split
    v = tl.arange(0, BV)[None, :]
    tl.store(out_ptr + row[:, None] * V + v, acc.to(out_ptr.dtype.element_ty), row_ok[:, None] & (v < V))
    if SPLIT:
        lse = top + tl.log2(tl.where(total == 0, 1.0, total))
        tl.store(lse_ptr + row, tl.where(total == 0, float("-inf"), lse), row_ok)


@triton.jit
def merge_kernel(part_ptr, lse_ptr, sinks_ptr, out_ptr, splits, data_ptr, scale_ptr, exact_ptr, top_ptr,
                 HEADS: tl.constexpr, V: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, ENCODING: tl.constexpr,
                 STATIC: tl.constexpr, BG: tl.constexpr, S: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BH heads of a token per program: parts of the context, weighted by their sums of exponentials, added in order.

    ENCODING: of the rows [T, HEADS x V] that come out, if not `bf16`; BH x V is then BG x S.
    """
    t = tl.program_id(0).to(tl.int64)
    h, v = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BV)
    ok = h < HEADS
    row = (t * HEADS + h) * splits
    wait(PDL)
    peak = tl.full([BH], LOWEST, tl.float32)
    for first in range(0, splits, TURN):
        for j in tl.static_range(TURN):
            lse = tl.load(lse_ptr + row + first + j, ok & (first + j < splits), float("-inf"))
            peak = tl.maximum(peak, lse)
    total = tl.zeros([BH], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h, ok, 0.0).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
        total = tl.exp2(sink - peak)
    y = tl.zeros([BH, BV], tl.float32)
    for first in range(0, splits, TURN):
        for j in tl.static_range(TURN):
            lse = tl.load(lse_ptr + row + first + j, ok & (first + j < splits), float("-inf"))
            weight = tl.exp2(lse - peak)
            seen = (weight > 0)[:, None] & (v < V)[None, :]
            y += tl.load(part_ptr + (row + first + j)[:, None] * V + v[None, :], seen, 0.0) * weight[:, None]
            total += weight
    y = y / tl.where(total == 0, 1.0, total)[:, None]
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (t * HEADS + h)[:, None] * V + v[None, :], y, ok[:, None] & (v < V)[None, :])
    if ENCODING != "bf16":
        g = tl.program_id(1) * BG + tl.arange(0, BG)
        emit_row(tl.reshape(y.to(tl.float32), [BG, S]), t, g, data_ptr, scale_ptr, exact_ptr, top_ptr, HEADS * V,
                 ENCODING, STATIC, BG, S)  # fmt: skip
