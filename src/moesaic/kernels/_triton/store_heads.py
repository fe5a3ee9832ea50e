"""Between the product of queries, keys and values and attention: add terms up, norm, rotate, write the cache.

A program has some heads of one token. A head is three pieces: the first and the second elements of its rotated pairs,
and the rest that passes through. Letters: H heads of the program, K head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.bits import mx_exponent, mx_inverse, to_e4m3
from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.pdl import options, wait
from moesaic.kernels.ops import HeadNorms, KVView

BLOCK = 8
"""Heads of a program."""


@triton.jit
def added_up(x_ptr, x_part, at, ok, P: tl.constexpr):
    """FP32 sum of P terms, in order."""
    x = tl.load(x_ptr + at, ok, 0.0).to(tl.float32)
    for p in tl.static_range(1, P):
        x += tl.load(x_ptr + p * x_part + at, ok, 0.0).to(tl.float32)
    return x


@triton.jit
def norm_weights(q_ptr, k_ptr, d, ok, is_q):
    """[H, columns]: of each head its own norm's; 1 where there is none."""
    q = 1.0 if q_ptr is None else tl.load(q_ptr + d, ok, 0.0).to(tl.float32)[None, :]
    k = 1.0 if k_ptr is None else tl.load(k_ptr + d, ok, 0.0).to(tl.float32)[None, :]
    return tl.where(is_q[:, None], q, k)


@triton.jit
def put(y, at, q_row, row_ptr, byte_row, inverse, is_q, is_kv, ok, FP8: tl.constexpr):
    """Queries to q_row + at, keys and values to the pool's row + at (both [H, columns])."""
    tl.store(q_row + at, y.to(q_row.dtype.element_ty), ok & is_q[:, None])
    if FP8:
        tl.store(row_ptr + at, to_e4m3(y * inverse[:, None]), ok & is_kv[:, None])
    else:
        tl.store(row_ptr + at, y.to(row_ptr.dtype.element_ty), ok & is_kv[:, None])


@triton.jit
def store_heads_kernel(x_ptr, x_part, x_row, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, angle_row, slots_ptr, q_ptr,
                       pool_ptr, bytes_ptr, pool_row, eps, P: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr,
                       K: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BHALF: tl.constexpr,
                       BREST: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
                       PDL: tl.constexpr):  # fmt: skip
    """HQ query heads, then HKV of keys and as many of values. HALF: rotated pairs."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1) * BH + tl.arange(0, BH)
    is_q, is_kv, is_v = h < HQ, (h >= HQ) & (h < HQ + 2 * HKV), h >= HQ + HKV
    d, r = tl.arange(0, BHALF), tl.arange(0, BREST)
    d_ok, r_ok = d < HALF, r < K - 2 * HALF
    first_at, second_at = (2 * d, 2 * d + 1) if INTERLEAVED else (d, HALF + d)
    normed: tl.constexpr = (q_norm_ptr is not None) or (k_norm_ptr is not None)
    if normed:
        w1 = norm_weights(q_norm_ptr, k_norm_ptr, first_at, d_ok, is_q)
        w2 = norm_weights(q_norm_ptr, k_norm_ptr, second_at, d_ok, is_q)
        w3 = norm_weights(q_norm_ptr, k_norm_ptr, 2 * HALF + r, r_ok, is_q)
    wait(PDL)
    ok, rest_ok = (is_q | is_kv)[:, None] & d_ok[None, :], (is_q | is_kv)[:, None] & r_ok[None, :]
    head = t * x_row + h[:, None] * K
    first = added_up(x_ptr, x_part, head + first_at[None, :], ok, P)
    second = added_up(x_ptr, x_part, head + second_at[None, :], ok, P)
    rest = added_up(x_ptr, x_part, head + 2 * HALF + r[None, :], rest_ok, P)
    cos = tl.load(cos_ptr + t * angle_row + d, d_ok, 1.0)[None, :]
    sin = tl.load(sin_ptr + t * angle_row + d, d_ok, 0.0)[None, :]
    if normed:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / K + eps)
        plain = is_v
        if q_norm_ptr is None:
            plain = plain | is_q
        if k_norm_ptr is None:
            plain = plain | ~is_q
        factor = tl.where(plain, 1.0, factor)[:, None]
        first *= factor * tl.where(plain[:, None], 1.0, w1)
        second *= factor * tl.where(plain[:, None], 1.0, w2)
        rest *= factor * tl.where(plain[:, None], 1.0, w3)
    turned = ~is_v[:, None]
    y1 = tl.where(turned, first * cos - second * sin, first)
    y2 = tl.where(turned, second * cos + first * sin, second)
    inverse = None
    slot = tl.load(slots_ptr + t).to(tl.int64)
    if FP8:
        amax = tl.maximum(tl.maximum(tl.max(tl.abs(y1), 1), tl.max(tl.abs(y2), 1)), tl.max(tl.abs(rest), 1))
        code = mx_exponent(amax, 0x1FFFFF, 8)
        inverse = mx_inverse(code)
        tl.store(bytes_ptr + slot * pool_row + 2 * HKV * K + h - HQ, code.to(tl.uint8), is_kv)
    # What is rotated leaves its first elements, then its second ones; values stay in their order.
    at1 = tl.where(is_v[:, None], first_at[None, :], d[None, :])
    at2 = tl.where(is_v[:, None], second_at[None, :], HALF + d[None, :])
    q_row, kv_row = q_ptr + (t * HQ + h[:, None]) * K, pool_ptr + slot * pool_row + (h[:, None] - HQ) * K
    put(y1, at1, q_row, kv_row, bytes_ptr, inverse, is_q, is_kv, ok, FP8)
    put(y2, at2, q_row, kv_row, bytes_ptr, inverse, is_q, is_kv, ok, FP8)
    put(rest, 2 * HALF + r[None, :], q_row, kv_row, bytes_ptr, inverse, is_q, is_kv, rest_ok, FP8)


def store_heads(x_PTX: Tensor, w: HeadNorms, angles: tuple[Tensor, Tensor], pool_PW: Tensor, slots_T: Tensor,
                view: KVView) -> Tensor:  # fmt: skip
    x = x_PTX if x_PTX.stride(2) == 1 else x_PTX.contiguous()
    (parts, tokens, width), size, groups = x.shape, view.key_dim, view.kv_heads
    heads, (cos, sin) = width // size - 2 * groups, angles
    q = torch.empty(tokens, heads, size, dtype=w.dtype, device=x.device)
    if tokens:
        fp8, half = pool_PW.dtype == torch.uint8, cos.shape[1]
        store_heads_kernel[(tokens, cdiv(heads + 2 * groups, BLOCK))](
            x, x.stride(0), x.stride(1), w.q_K, w.k_K, cos, sin, cos.stride(0), slots_T, q,
            pool_PW.view(torch.float8_e4m3fn) if fp8 else pool_PW, pool_PW if fp8 else None, pool_PW.stride(0), w.eps,
            P=parts, HQ=heads, HKV=groups, K=size, HALF=half, BH=BLOCK, BHALF=power(half), BREST=power(size - 2 * half),
            INTERLEAVED=w.interleaved, FP8=fp8, num_warps=4, **options(x.device),
        )  # fmt: skip
    return q
