"""Latent attention over the cache as it is: queries into the latent space, attention there, results out of it.

Each head has a product of its own on either side. Letters as in ops.py; M rows, J outputs of a product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.attend_paged import attend_paged
from moesaic.kernels._triton.bits import to_operand
from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.pdl import options, wait
from moesaic.kernels.ops import AttentionBatch, KVView, Latent


@triton.jit
def turn(x_row, y_row, row_ok, angle_rows, cos_ptr, sin_ptr, HALF: tl.constexpr, BHALF: tl.constexpr,
         INTERLEAVED: tl.constexpr):  # fmt: skip
    """Rotates 2 HALF elements of each row from x_row to y_row (pointers [M, 1]); done by the first tile of outputs."""
    if tl.program_id(1) == 0:
        d = tl.arange(0, BHALF)[None, :]
        ok = row_ok & (d < HALF)
        first_at, second_at = (2 * d, 2 * d + 1) if INTERLEAVED else (d, HALF + d)
        first = tl.load(x_row + first_at, ok, 0.0).to(tl.float32)
        second = tl.load(x_row + second_at, ok, 0.0).to(tl.float32)
        cos, sin = tl.load(cos_ptr + angle_rows + d, ok, 0.0), tl.load(sin_ptr + angle_rows + d, ok, 0.0)
        tl.store(y_row + d, (first * cos - second * sin).to(y_row.dtype.element_ty), ok)
        tl.store(y_row + HALF + d, (second * cos + first * sin).to(y_row.dtype.element_ty), ok)


@triton.jit
def heads_kernel(x_ptr, x_token, x_head, w_ptr, w_head, w_out, w_in, y_ptr, y_token, y_head, cos_ptr, sin_ptr,
                 angle_row, T, K: tl.constexpr, J: tl.constexpr, HALF: tl.constexpr, BHALF: tl.constexpr,
                 INTERLEAVED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """y[t, h, :J] = w[h] x[t, h, :K]. HALF > 0: and y[t, h, J:] = x[t, h, K:] rotated."""
    m, n, h = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2)
    m64, h64, ok = m.to(tl.int64)[:, None], h.to(tl.int64), (m < T)[:, None]
    x_row, y_row = x_ptr + m64 * x_token + h64 * x_head, y_ptr + m64 * y_token + h64 * y_head
    w_column = w_ptr + h64 * w_head + n[None, :] * w_out
    wait(PDL)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_row + k[None, :], ok & (k < K)[None, :], 0.0)
        w = tl.load(w_column + k[:, None] * w_in, (k < K)[:, None] & (n < J)[None, :], 0.0)
        acc = tl.dot(to_operand(x), to_operand(w), acc)
    tl.store(y_row + n[None, :], acc.to(y_ptr.dtype.element_ty), ok & (n < J)[None, :])
    if HALF > 0:
        turn(x_row + K, y_row + J, ok, m64 * angle_row, cos_ptr, sin_ptr, HALF, BHALF, INTERLEAVED)


def per_head(x_THK: Tensor, w_HJK: Tensor, y_THJ: Tensor, angles: tuple[Tensor, Tensor] | None = None,
             interleaved: bool = False, most: int = 64) -> Tensor:  # fmt: skip
    """Writes w[h] x[t, h] (and what is rotated behind it); returns y. w may be any strided view [H, J, K].

    most: rows of a tile; 16 is the least, whatever T is.
    """
    (tokens, heads, _), (_, outputs, size) = x_THK.shape, w_HJK.shape
    cos, sin = angles or (None, None)
    half = 0 if cos is None else cos.shape[1]
    rows, columns = min(max(power(tokens), 16), most), min(power(outputs, 16), 128)
    how: dict[str, Any] = {"INTERLEAVED": interleaved, "HALF": half, "BHALF": power(half)}
    if tokens:
        heads_kernel[(cdiv(tokens, rows), cdiv(outputs, columns), heads)](
            x_THK, x_THK.stride(0), x_THK.stride(1), w_HJK, *w_HJK.stride(), y_THJ, y_THJ.stride(0), y_THJ.stride(1),
            cos, sin, 0 if cos is None else cos.stride(0), tokens, K=size, J=outputs, BM=rows, BN=columns,
            BK=min(power(size, 16), 64), num_warps=4, num_stages=3, **how, **options(x_THK.device),
        )  # fmt: skip
    return y_THJ


def attend_latent(q_THK: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor,
                  batch: AttentionBatch) -> Tensor:  # fmt: skip
    q = q_THK if q_THK.stride(-1) == 1 else q_THK.contiguous()
    tokens, heads, _ = q.shape
    rank, turned = w.w_k_HNR.shape[2], 2 * angles[0].shape[1]
    absorbed = torch.empty(tokens, heads, rank + turned, dtype=q.dtype, device=q.device)
    per_head(q, w.w_k_HNR.transpose(1, 2), absorbed, angles, w.interleaved)
    y_THR = attend_paged(absorbed, pool_PW, batch, KVView(1, rank + turned, 0, rank), w.scale)
    return per_head(y_THR, w.w_v_HVR, torch.empty(tokens, heads, w.w_v_HVR.shape[1], dtype=q.dtype, device=q.device))
