"""RMS norm over the last axis, alone or of a sum with the residual. One row, or a few short ones, per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.launch import cdiv, power, rows_of


@triton.jit
def rms_norm_kernel(x_ptr, residual_ptr, w_ptr, y_ptr, sum_ptr, rows, inner, x_outer, x_stride, r_outer, r_stride, eps,
                    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    ok = (r < rows)[:, None] & (d < D)[None, :]
    outer, within = (r // inner).to(tl.int64), (r % inner).to(tl.int64)
    x = tl.load(x_ptr + (outer * x_outer + within * x_stride)[:, None] + d[None, :], ok, 0.0).to(tl.float32)
    at = r.to(tl.int64)[:, None] * D + d[None, :]
    if ADD:
        x += tl.load(residual_ptr + (outer * r_outer + within * r_stride)[:, None] + d[None, :], ok, 0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)  # the norm is of the sum as it is stored
        tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), ok)
    factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    w = tl.load(w_ptr + d, d < D, 0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * factor[:, None] * w[None, :]).to(y_ptr.dtype.element_ty), ok)


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    return normalize(x_TD, None, w_D, eps)[0]


def normalize(x_TD: Tensor, residual_TD: Tensor | None, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm, what was normalised)."""
    shape, size = x_TD.shape, x_TD.shape[-1]
    y = torch.empty(shape, dtype=x_TD.dtype, device=x_TD.device)
    total = x_TD if residual_TD is None else torch.empty_like(y)
    rows = y.numel() // size if size else 0
    if rows:
        x, outer, stride, inner = rows_of(x_TD)
        other, r_outer, r_stride = x, 0, 0
        if residual_TD is not None:
            other, r_outer, r_stride, _ = rows_of(residual_TD.contiguous().view(x.shape))
        width = power(size)
        short = max(1, min(16, 1024 // width))
        rms_norm_kernel[(cdiv(rows, short),)](
            x, other, w_D, y, total, rows, inner, outer, stride, r_outer, r_stride, eps,
            D=size, BD=width, BR=short, ADD=residual_TD is not None, num_warps=min(16, max(1, width * short // 512)),
        )  # fmt: skip
    return y, total
