"""Plain dense products. BF16: the vendor's library, which torch calls. FP32, which routers compute in: here.

The library's FP32 product of a few rows takes longer than all the rest of routing. Three TF32 products of split
operands (Triton's `tf32x3`) are FP32's equal but for the last bits; K is shared out over programs and summed in order.
Letters: M rows of x, N of w, P parts of K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.linear_quant import PROGRAMS, sum_kernel

STEP = 64


@triton.jit
def wide_kernel(x_ptr, x_stride, w_ptr, w_stride, bias_ptr, y_ptr, M, N, K, share, BM: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr):  # fmt: skip
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    x_row = x_ptr + m.to(tl.int64)[:, None] * x_stride
    w_row = w_ptr + n.to(tl.int64)[:, None] * w_stride
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(part * share, tl.minimum(part * share + share, K), BK):
        k = k0 + tl.arange(0, BK)[None, :]
        x = tl.load(x_row + k, (m < M)[:, None] & (k < K), 0.0)
        w = tl.load(w_row + k, (n < N)[:, None] & (k < K), 0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="tf32x3")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, n < N, 0.0)[None, :]
    at = (part * M + m.to(tl.int64))[:, None] * N + n[None, :]
    tl.store(y_ptr + at, acc, (m < M)[:, None] & (n < N)[None, :])


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    if x_TD.dtype != torch.float32 or x_TD.dim() != 2 or w_ND.stride(1) != 1 or not x_TD.numel():
        return F.linear(x_TD, w_ND, bias_N)
    x = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    (m, k), n = x.shape, w_ND.shape[0]
    bm, bn = min(max(power(m), 16), 64), 32 if m <= 64 else 64
    tiles = cdiv(m, bm) * cdiv(n, bn)
    share = cdiv(cdiv(k, max(1, min(2 * PROGRAMS // tiles, k // (2 * STEP)))), STEP) * STEP
    parts = cdiv(k, share)
    y = x.new_empty(m, n)
    target = y if parts == 1 else x.new_empty(parts, m, n)
    wide_kernel[(cdiv(m, bm), cdiv(n, bn), parts)](
        x, x.stride(0), w_ND, w_ND.stride(0), bias_N if parts == 1 else None, target, m, n, k, share, BM=bm, BN=bn,
        BK=STEP, num_warps=4, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        sum_kernel[(cdiv(y.numel(), 256),)](target, bias_N, y, y.numel(), n, PARTS=parts, BLOCK=256, num_warps=1)
    return y
