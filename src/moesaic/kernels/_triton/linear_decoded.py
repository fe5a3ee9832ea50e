"""Dense products of many rows: weights are decoded to BF16 once, which holds them exactly, for the vendor's library.

A tile of a product decodes the weights that it meets, and of many rows there are many tiles. From MANY rows on one
reading and writing of the weight takes less; the library then multiplies at nearly the tensor cores' rate. What BF16
does not hold, the scales of whole NVFP4 tensors and rows, multiplies the sums, in FP32, before they are rounded.
(Numbers below 2^-66, and MX scales above 2^67, are beyond what `weight_tile` decodes, here as everywhere.)

Letters: T rows, N outputs, K contraction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.gemm import Operands, along, lift, operands, scale_rows, weight_tile
from moesaic.kernels._triton.launch import cdiv
from moesaic.kernels._triton.pdl import options, wait

MANY = 129
"""Rows from which on this is faster, as measured on an H200 (docs/performance-log.md)."""
EXACT = ("mxfp8", "mxfp4", "nvfp4")
"""Formats whose codes, with the scales of their blocks, BF16 holds."""
ROWS = ("bf16", "mxfp8", "nvfp4")
"""Encodings of which the same is true."""
ROOM = 256 << 20
"""Bytes for decoded weights, and for sums in FP32, at a time."""
TILES = 264
"""Of 128 x 128 results, below which the library may share K out, and adds up the parts in the type of the result: it is
asked for FP32 then."""
COLUMNS = 256
"""Multiples of which the library is given, where a weight has no room as a whole."""


@triton.jit
def decode_kernel(w_ptr, w_stride, ws_ptr, ws_stride, y_ptr, N, K: tl.constexpr, FORMAT: tl.constexpr,
                  LIFTED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """LIFTED: as what codes stand for; else too small by `lift`, as sums of products are elsewhere (gemm.py)."""
    n, k0 = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BK
    n_ok, n64 = n < N, n.to(tl.int64)
    wait(PDL)
    w = weight_tile(w_ptr + n64 * w_stride, ws_ptr + n64 * ws_stride, None, n_ok, k0, K, FORMAT, 128, False, BN, BK)
    if LIFTED:
        w *= tl.full((), lift(FORMAT, False), w.dtype)
    k = k0 + tl.arange(0, BK)[None, :]
    tl.store(y_ptr + n64[:, None] * K + k, w.to(y_ptr.dtype.element_ty), n_ok[:, None] & (k < K))


@triton.jit
def scale_kernel(sum_ptr, sum_stride, xs_ptr, xs_stride, top_ptr, map_ptr, bias_ptr, y_ptr, y_stride, first, rows, N,
                 FORMAT: tl.constexpr, X_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """Sums of the outputs from `first` on -> y: by what multiplies whole rows of w or x, and bias added."""
    m, at = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    m_ok, at_ok, m64, n64 = m < rows, at < N, m.to(tl.int64), at.to(tl.int64) + first
    coarse = n64 if map_ptr is None else tl.load(map_ptr + n64, at_ok, 0).to(tl.int64)
    top_row = None if top_ptr is None else top_ptr + coarse
    xs_row = None if xs_ptr is None else xs_ptr + m64 * xs_stride
    wait(PDL)
    ok = m_ok[:, None] & at_ok[None, :]
    acc = tl.load(sum_ptr + m64[:, None] * sum_stride + at[None, :], ok, 0.0)
    acc = scale_rows(acc, None, top_row, at_ok, xs_ptr, xs_row, m_ok, FORMAT, False, X_ROWS, False, False)
    if bias_ptr is not None:
        acc += along(tl.load(bias_ptr + n64, at_ok, 0.0).to(tl.float32), False)
    tl.store(y_ptr + m64[:, None] * y_stride + n64[None, :], acc.to(y_ptr.dtype.element_ty), ok)


def suits(x: Rows, w: QuantTensor) -> bool:
    """Whether a product is done so, from shapes and formats alone."""
    return w.form.name in EXACT and x.encoding.name in ROWS and x.data.shape[:-1].numel() >= MANY


def product(x: Rows, w: QuantTensor, bias_N: Tensor | None) -> Tensor:
    """[T, N] in x.dtype."""
    given = operands(x, w)
    values, (n, k) = given.pointers["x_ptr"], w.shape
    in_sums = bias_N is not None or w.form.name == "nvfp4" or given.pointers["xs_ptr"] is not None
    in_sums = in_sums or cdiv(len(values), 128) * cdiv(n, 128) < TILES
    y = torch.empty(len(values), n, dtype=x.dtype, device=values.device)
    most = max(1, ROOM // max(2 * k, 4 * len(values) * in_sums) // COLUMNS) * COLUMNS
    for first in range(0, n, most):
        columns = min(most, n - first)
        w_NK = decoded(w, first, columns, not in_sums)
        if in_sums:
            finish(wide(values, w_NK), y, first, given, bias_N)
        else:
            torch.mm(values, w_NK.t(), out=y[:, first : first + columns])
    return y


def decoded(w: QuantTensor, first: int, columns: int, lifted: bool) -> Tensor:
    """BF16 [columns, K] of w's rows from `first` on."""
    data, scale = w.parts["data"], w.parts["scale"]
    y = torch.empty(columns, w.columns, dtype=torch.bfloat16, device=data.device)
    decode_kernel[(cdiv(columns, 32), cdiv(w.columns, 256))](
        data[first:], data.stride(0), scale[first:], scale.stride(0), y, columns, K=w.columns, FORMAT=w.form.name,
        LIFTED=lifted, BN=32, BK=256, num_warps=4, **options(y.device),
    )  # fmt: skip
    return y


def wide(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """FP32 [T, N] of operands in BF16."""
    if x_TK.device.type == "cpu":  # under the interpreter
        return x_TK.float() @ w_NK.float().t()
    return torch.mm(x_TK, w_NK.t(), out_dtype=torch.float32)


def finish(sums_TN: Tensor, y_TN: Tensor, first: int, given: Operands, bias_N: Tensor | None) -> None:
    rows, columns = sums_TN.shape
    names = ("xs_ptr", "xs_stride", "top_ptr", "map_ptr")
    scale_kernel[(cdiv(rows, 4), cdiv(columns, 512))](
        sums_TN, sums_TN.stride(0), *(given.pointers[name] for name in names), bias_N, y_TN, y_TN.stride(0), first,
        rows, columns, FORMAT=given.constants["FORMAT"], X_ROWS=given.constants["X_ROWS"], BM=4, BN=512, num_warps=4,
        **options(y_TN.device),
    )  # fmt: skip
