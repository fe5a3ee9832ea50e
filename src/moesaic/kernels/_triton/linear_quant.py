"""Dense products with quantised weights. Few rows: K is shared out over programs, whose parts are then summed in order.

Letters as in gemm.py; P parts of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.gemm import across, along, operands, product, scale_rows, tile_of
from moesaic.kernels._triton.launch import cdiv, power

PROGRAMS = 132
"""Multiprocessors of a Hopper GPU: where there are fewer tiles, K is shared out."""


@triton.jit
def linear_kernel(x_ptr, x_stride, xs_ptr, xs_stride, w_ptr, w_expert, w_stride, ws_ptr, ws_expert, ws_stride,
                  zero_ptr, top_ptr, segments, map_ptr, bias_ptr, y_ptr, rows, N, K: tl.constexpr,
                  FORMAT: tl.constexpr, GROUP: tl.constexpr, X_GROUPS: tl.constexpr, X_ROWS: tl.constexpr,
                  EIGHT: tl.constexpr, FLIP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  SHARE: tl.constexpr, UNIFORM: tl.constexpr):  # fmt: skip
    """UNIFORM: the weight rows of each tile share their block scales."""
    part = tl.program_id(2)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_ok, n_ok = m < rows, n < N
    m64, n64 = m.to(tl.int64), n.to(tl.int64)
    coarse = n64 if map_ptr is None else tl.load(map_ptr + n, n_ok, 0).to(tl.int64)
    ws_row = None if ws_ptr is None else ws_ptr + (n64 if FORMAT == "nvfp4" else coarse) * ws_stride
    zero_row = None if zero_ptr is None else zero_ptr + n64 * ws_stride
    top_row = None if top_ptr is None else top_ptr + coarse
    xs_row = None if xs_ptr is None else xs_ptr + m64 * xs_stride
    begin = part * SHARE
    end = tl.minimum(begin + SHARE, K)
    ws_pair = None
    if UNIFORM:
        first = ws_ptr + tl.load(map_ptr + tl.program_id(0) * BN).to(tl.int64) * ws_stride
        ws_pair = (first, first)
    acc = product(x_ptr + m64 * x_stride, m_ok, xs_row, w_ptr + n64 * w_stride, n_ok, ws_row, ws_pair, zero_row, begin,
                  end, K, FORMAT, GROUP, X_GROUPS, EIGHT, FLIP, BM, BN, BK)  # fmt: skip
    acc = scale_rows(acc, ws_row, top_row, n_ok, xs_ptr, xs_row, m_ok, FORMAT, X_GROUPS, X_ROWS, EIGHT,
                     FLIP)  # fmt: skip
    if bias_ptr is not None:
        acc += along(tl.load(bias_ptr + n, n_ok, 0.0).to(tl.float32), FLIP)
    at = across((part * rows + m64) * N, FLIP) + along(n64, FLIP)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), across(m_ok, FLIP) & along(n_ok, FLIP))


@triton.jit
def sum_kernel(part_ptr, bias_ptr, y_ptr, size, N, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for p in range(PARTS):
        total += tl.load(part_ptr + p * size.to(tl.int64) + at, at < size, 0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, at < size, 0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), at < size)


def linear_quant(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    lead, (n, k) = x.data.shape[:-1], w.shape
    given = operands(x, w)
    rows = given.pointers["x_ptr"].shape[0]
    y = torch.empty(rows, n, dtype=x.dtype, device=x.data.device)
    if y.numel():
        tile = tile_of(min(max(power(rows), 16), 128), given)
        bm, bn = tile.bm, tile.bn
        tiles, step = cdiv(rows, bm) * cdiv(n, bn), given.constants["BK"]
        share = share_of(tiles, k, step)
        parts = cdiv(k, share)
        target = y if parts == 1 else y.new_empty(parts, rows, n, dtype=torch.float32)
        linear_kernel[(cdiv(n, bn), cdiv(rows, bm), parts)](
            **given.pointers, bias_ptr=bias_N if parts == 1 else None, y_ptr=target, rows=rows, N=n, SHARE=share,
            UNIFORM=uniform(w, bn), **tile.arguments(), **given.constants,
        )  # fmt: skip
        if parts > 1:
            sum_kernel[(cdiv(y.numel(), 1024),)](target, bias_N, y, y.numel(), n, PARTS=parts, BLOCK=1024)
    return y.view(*lead, n)


def share_of(tiles: int, k: int, step: int) -> int:
    """Elements of K per program: all of it where the tiles alone fill the machine; at least four steps."""
    wanted = max(1, min(PROGRAMS // max(tiles, 1), k // (4 * step)))
    return cdiv(cdiv(k, wanted), step) * step


def uniform(w: QuantTensor, height: int) -> bool:
    """Whether tiles of so many rows of an fp8_block weight stay within blocks, which start anew at each segment."""
    return w.form.name == "fp8_block" and 128 % height == 0 and all(rows % height == 0 for rows in w.segments[:-1])
