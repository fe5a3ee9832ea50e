"""Rotary embedding: one token per program, all its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.launch import power


@triton.jit
def rotate_kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, heads, x_token, x_head, angle_token, HALF: tl.constexpr,
                  BH: tl.constexpr, BD: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BD)
    ok = (h < heads)[:, None] & (d < HALF)[None, :]
    if INTERLEAVED:
        first_at, second_at = 2 * d, 2 * d + 1
    else:
        first_at, second_at = d, d + HALF
    x_row = x_ptr + t * x_token + h[:, None] * x_head
    first = tl.load(x_row + first_at[None, :], ok, 0.0).to(tl.float32)
    second = tl.load(x_row + second_at[None, :], ok, 0.0).to(tl.float32)
    cos = tl.load(cos_ptr + t * angle_token + d, d < HALF, 0.0)[None, :]
    sin = tl.load(sin_ptr + t * angle_token + d, d < HALF, 0.0)[None, :]
    y_row = y_ptr + (t * heads + h[:, None]) * (2 * HALF) + d[None, :]
    tl.store(y_row, (first * cos - second * sin).to(y_ptr.dtype.element_ty), ok)
    tl.store(y_row + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), ok)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
    if x_THD.stride(-1) != 1:
        x_THD = x_THD.contiguous()
    tokens, heads, size = x_THD.shape
    y_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    if y_THD.numel():
        cos, sin = cos_TD.contiguous(), sin_TD.contiguous()
        block = min(power(heads), 32)
        rotate_kernel[(tokens, -(-heads // block))](
            x_THD, cos, sin, y_THD, heads, x_THD.stride(0), x_THD.stride(1), cos.stride(0), HALF=size // 2,
            BH=block, BD=power(size // 2), INTERLEAVED=interleaved, num_warps=1 if block * size <= 1024 else 4,
        )  # fmt: skip
    return y_THD
