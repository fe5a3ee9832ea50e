"""Plain dense products. BF16: the vendor's library, which torch calls. FP32, which routers compute in: here.

The library's FP32 product of a few rows takes longer than all the rest of routing. Here an FP32 weight is two TF32
numbers, upper and lower bits; rows that come in BF16 are TF32 numbers as they are, so two products are FP32's equal but
for the last bits. FP32 rows take three (Triton's `tf32x3`). K is shared out over programs; whoever reads adds up.

A tensor core cuts the low bits off a sum each time it adds to it, always towards zero: over thousands of terms that is
many times the error of FP32's own additions, which round. So it adds up one step of K at a time, the products of the
lower bits first, while the sum is small; steps are added to one another outside.
Letters: M rows of x, N of w, P parts of K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.bits import WIDE
from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.linear_quant import PROGRAMS, added_up
from moesaic.kernels._triton.pdl import options, prefetch, wait

STEP = 64
MOST_PARTS = 16


@triton.jit
def wide_product(x, w, acc, EXACT: tl.constexpr, NARROW: tl.constexpr):
    """acc + x w^T in FP32. EXACT: x holds numbers that TF32 holds.

    NARROW: both hold numbers that BF16 holds, and the result will be rounded to it.
    """
    if WIDE:
        return tl.dot(x, tl.trans(w), acc)
    elif NARROW:
        return tl.dot(x.to(tl.bfloat16), tl.trans(w.to(tl.bfloat16)), acc)
    elif EXACT:
        upper = (w.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 10 bits of mantissa
        step = tl.dot(x, tl.trans(w - upper), input_precision="tf32")
        return acc + tl.dot(x, tl.trans(upper), step, input_precision="tf32")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="tf32x3")  # which adds acc outside, too


@triton.jit
def wide_kernel(x_ptr, x_stride, w_ptr, w_stride, bias_ptr, y_ptr, M, N, K, share, BM: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr, EXACT: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    begin, end = part * share, tl.minimum(part * share + share, K)
    x_row = x_ptr + m.to(tl.int64)[:, None] * x_stride
    w_row = w_ptr + n.to(tl.int64)[:, None] * w_stride
    if PDL:
        prefetch(w_ptr + n.to(tl.int64) * w_stride + begin, n < N, end - begin, 64 if NARROW else 32, 8)
    wait(PDL)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(begin, end, BK):
        k = k0 + tl.arange(0, BK)[None, :]
        x = tl.load(x_row + k, (m < M)[:, None] & (k < K), 0.0).to(tl.float32)
        w = tl.load(w_row + k, (n < N)[:, None] & (k < K), 0.0).to(tl.float32)
        acc = wide_product(x, w, acc, EXACT, NARROW)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, (n < N) & (part == 0), 0.0).to(tl.float32)[None, :]
    at = (part * M + m.to(tl.int64))[:, None] * N + n[None, :]
    tl.store(y_ptr + at, acc, (m < M)[:, None] & (n < N)[None, :])


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    if x_TD.dtype != torch.float32 or x_TD.dim() != 2 or w_ND.stride(1) != 1 or not x_TD.numel():
        return F.linear(x_TD, w_ND, bias_N)
    terms = wide_terms(x_TD, w_ND, bias_N)
    return terms[0] if len(terms) == 1 else added_up(terms, torch.float32)


def wide_terms(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None, fixed: bool = False) -> Tensor:
    """FP32 [P, T, N] to be added up, of rows and weights in FP32 or BF16. fixed: the same tiles for any T."""
    x = x_TD if w_ND.dtype == torch.float32 else x_TD.to(w_ND.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, k), n = x.shape, w_ND.shape[0]
    bm, bn = (16, 32) if fixed else (min(max(power(m), 16), 64), 32 if m <= 64 else 64)
    tiles = (1 if fixed else max(1, cdiv(m, bm))) * cdiv(n, bn)
    share = cdiv(cdiv(k, max(1, min(PROGRAMS // tiles, MOST_PARTS, k // (2 * STEP)))), STEP) * STEP
    parts = cdiv(k, share)
    y = x.new_empty(parts, m, n, dtype=torch.float32)
    if m:
        wide_kernel[(cdiv(m, bm), cdiv(n, bn), parts)](
            x, x.stride(0), w_ND, w_ND.stride(0), bias_N, y, m, n, k, share, BM=bm, BN=bn, BK=STEP,
            EXACT=x.dtype == torch.bfloat16, NARROW=w_ND.dtype == torch.bfloat16, num_warps=4, num_stages=3,
            **options(x.device),
        )  # fmt: skip
    return y
