"""Sum with the residual, RMS norm, and the norm's rows in the encoding in which they are multiplied next: one pass.

A row per program. The rows may come as FP32 terms of a sum [P, T, D] (a product whose K was shared out): they are added
up here, in order, and need no kernel of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.emit import emit_row, emitting, parts_for, rows_of
from moesaic.kernels._triton.pdl import options, wait


@triton.jit
def add_norm_encode_kernel(x_ptr, x_part, x_row, residual_ptr, w_ptr, y_ptr, sum_ptr, eps, data_ptr, scale_ptr,
                           exact_ptr, top_ptr, P: tl.constexpr, D: tl.constexpr, ENCODING: tl.constexpr,
                           STATIC: tl.constexpr, BG: tl.constexpr, S: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    r, g = tl.program_id(0).to(tl.int64), tl.arange(0, BG)
    d = g[:, None] * S + tl.arange(0, S)[None, :]
    ok = d < D
    w = tl.load(w_ptr + d, ok, 0.0).to(tl.float32)
    wait(PDL)
    x = tl.load(x_ptr + r * x_row + d, ok, 0.0).to(tl.float32)
    for p in tl.static_range(1, P):
        x += tl.load(x_ptr + p * x_part + r * x_row + d, ok, 0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + r * D + d, ok, 0.0).to(tl.float32)
    if sum_ptr is not None:
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)  # the norm is of the sum as it is stored
        tl.store(sum_ptr + r * D + d, x.to(sum_ptr.dtype.element_ty), ok)
    factor = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / D + eps)
    y = (x * factor * w).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + r * D + d, y, ok)
    emit_row(y.to(tl.float32), r, g, data_ptr, scale_ptr, exact_ptr, top_ptr, D, ENCODING, STATIC, BG, S)


def add_norm_encode(x: Tensor, residual_TD: Tensor | None, w_D: Tensor, eps: float, encoding: Encoding,
                    scale: Tensor | None = None) -> tuple[Tensor, Rows, Tensor]:  # fmt: skip
    terms = x if x.dim() == 3 else x[None]
    terms = terms if terms.stride(2) == 1 else terms.contiguous()
    parts, tokens, size = terms.shape
    y = w_D.new_empty(tokens, size)
    total = x if x.dim() == 2 and residual_TD is None else torch.empty_like(y)
    residual = None if residual_TD is None else residual_TD.contiguous()
    stored = {} if encoding.name == "bf16" else parts_for(encoding, tokens, size, y, scale)
    if y.numel():
        how = emitting(encoding, stored, size)
        add_norm_encode_kernel[(tokens,)](
            terms, terms.stride(0), terms.stride(1), residual, w_D, y, None if total is x else total, eps, P=parts,
            D=size, num_warps=min(16, max(1, how["BG"] * how["S"] // 512)), **how, **options(x.device),
        )  # fmt: skip
    return y, rows_of(encoding, stored, y), total
