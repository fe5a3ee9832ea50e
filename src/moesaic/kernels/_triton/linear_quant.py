"""Dense products with quantised weights. Few rows: K is shared out over programs, whose parts are then summed in order.
Many: by `linear_decoded`, where that is exact.

Letters as in gemm.py; P parts of K. While the kernel before it ends, a program moves the beginning of its weights into
the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton import linear_decoded
from moesaic.kernels._triton.gemm import (
    EIGHT_BITS,
    Operands,
    Tile,
    across,
    along,
    operand_rows,
    operands,
    product,
    scale_rows,
    steps,
    tile_of,
)
from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.pdl import options, prefetch, wait

PROGRAMS = 132
"""Multiprocessors of a Hopper GPU: where there are fewer tiles, K is shared out."""
AHEAD = 8
"""Cache lines of each weight row that are moved ahead, where there are few rows."""


@triton.jit
def linear_kernel(x_ptr, x_stride, xs_ptr, xs_stride, w_ptr, w_expert, w_stride, ws_ptr, ws_expert, ws_stride,
                  zero_ptr, top_ptr, segments, map_ptr, bias_ptr, y_ptr, rows, N, K: tl.constexpr,
                  FORMAT: tl.constexpr, GROUP: tl.constexpr, X_GROUPS: tl.constexpr, X_ROWS: tl.constexpr,
                  EIGHT: tl.constexpr, FLIP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  SHARE: tl.constexpr, UNIFORM: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """UNIFORM: the weight rows of each tile share their block scales. LINES: of its weight rows, moved ahead."""
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
    if PDL and LINES > 0:
        PACKED: tl.constexpr = (FORMAT == "mxfp4") or (FORMAT == "nvfp4") or (FORMAT == "int4")
        first, room = (begin // 2, K // 2) if PACKED else (begin, K)
        prefetch(w_ptr + n64 * w_stride + first, n_ok, room - first, 128, LINES)
    wait(PDL)
    ws_pair = None
    if UNIFORM:
        first = ws_ptr + tl.load(map_ptr + tl.program_id(0) * BN).to(tl.int64) * ws_stride
        ws_pair = (first, first)
    acc = product(x_ptr + m64 * x_stride, m_ok, xs_row, w_ptr + n64 * w_stride, n_ok, ws_row, ws_pair, zero_row, begin,
                  end, K, FORMAT, GROUP, X_GROUPS, EIGHT, FLIP, BM, BN, BK)  # fmt: skip
    acc = scale_rows(acc, ws_row, top_row, n_ok, xs_ptr, xs_row, m_ok, FORMAT, X_GROUPS, X_ROWS, EIGHT,
                     FLIP)  # fmt: skip
    if bias_ptr is not None:
        acc += along(tl.load(bias_ptr + n, n_ok & (part == 0), 0.0).to(tl.float32), FLIP)
    at = across((part * rows + m64) * N, FLIP) + along(n64, FLIP)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), across(m_ok, FLIP) & along(n_ok, FLIP))


@triton.jit
def sum_kernel(part_ptr, y_ptr, size, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for p in tl.static_range(PARTS):
        total += tl.load(part_ptr + p * size.to(tl.int64) + at, at < size, 0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), at < size)


def linear_quant(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    terms = terms_of(x, w, bias_N)
    y = terms[0] if len(terms) == 1 else added_up(terms, x.dtype)
    return y.view(*x.data.shape[:-1], w.shape[-2])


def terms_of(x: Rows, w: QuantTensor, bias_N: Tensor | None, waves: int = 1) -> Tensor:
    """`products`, of many rows by weights that are decoded once."""
    if linear_decoded.suits(x, w):
        return linear_decoded.product(x, w, bias_N)[None]
    return products(x, w, bias_N, waves)


def added_up(terms_PTN: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(terms_PTN.shape[1:], dtype=dtype, device=terms_PTN.device)
    sum_kernel[(cdiv(y.numel(), 1024),)](
        terms_PTN, y, y.numel(), PARTS=len(terms_PTN), BLOCK=1024, **options(y.device)
    )
    return y


def products(x: Rows, w: QuantTensor, bias_N: Tensor | None, waves: int = 1, fixed: bool = False) -> Tensor:
    """[P, T, N]: FP32 parts whose sum is the product, or the product itself in x.dtype.

    waves: programs per multiprocessor that parts are made for.  fixed: the same tiles and parts for any T.
    """
    (n, k), given = w.shape, operands(x, w)
    rows = given.pointers["x_ptr"].shape[0]
    tile, share = cut(rows, w, given, waves, fixed)
    parts = cdiv(k, share)
    y = torch.empty(parts, rows, n, dtype=x.dtype if parts == 1 else torch.float32, device=x.data.device)
    if y.numel():
        line = 128 // w.parts["data"].element_size() * w.columns // w.parts["data"].shape[-1]  # elements of K
        linear_kernel[(cdiv(n, tile.bn), cdiv(rows, tile.bm), parts)](
            **given.pointers, bias_ptr=bias_N, y_ptr=y, rows=rows, N=n, SHARE=share, UNIFORM=uniform(w, tile.bn),
            LINES=min(AHEAD, power(cdiv(share, line))) if rows <= 64 else 0, **tile.arguments(), **given.constants,
            **options(y.device),
        )  # fmt: skip
    return y


def cut(rows: int, w: QuantTensor, given: Operands, waves: int, fixed: bool) -> tuple[Tile, int]:
    """The tile of each program, and its elements of K."""
    (n, k), step = w.shape, given.constants["BK"]
    tile = tile_of(64 if fixed else min(max(power(rows), 16), 128), given)
    tiles = (1 if fixed else cdiv(rows, tile.bm)) * cdiv(n, tile.bn)
    return tile, share_of(tiles, k // 64 if fixed else rows, k, step, waves)


def parts_of(x: Rows, w: QuantTensor, waves: int, fixed: bool) -> int:
    """How many parts `terms_of` makes (fixed: `products`), from shapes alone: nothing is allocated."""
    if not fixed and linear_decoded.suits(x, w):
        return 1
    values, _, _ = operand_rows(x)
    step, _ = steps(w)
    eight = w.form.name in EIGHT_BITS and values.dtype == torch.float8_e4m3fn and step >= 32
    given = Operands({}, {"FORMAT": w.form.name, "EIGHT": eight, "BK": step})
    return cdiv(w.columns, cut(values.shape[:-1].numel(), w, given, waves, fixed)[1])


def share_of(tiles: int, rows: int, k: int, step: int, waves: int = 1) -> int:
    """Elements of K per program: all of it where the tiles alone fill the machine.

    At least four steps, and as many as keep the parts' bytes below a quarter of the weight's, or so.
    """
    wanted = max(1, min(waves * PROGRAMS // max(tiles, 1), k // (4 * step), k // (16 * max(rows, 1))))
    return cdiv(cdiv(k, wanted), step) * step


def uniform(w: QuantTensor, height: int) -> bool:
    """Whether tiles of so many rows of an fp8_block weight stay within blocks, which start anew at each segment."""
    return w.form.name == "fp8_block" and 128 % height == 0 and all(rows % height == 0 for rows in w.segments[:-1])
