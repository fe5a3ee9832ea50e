"""Writes the pool rows of latent attention: the normalised latent, then the rotated key. A token per program.

In an FP8 cache the latent is coded and the key stays in BF16 (formats/kv.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.bits import mx_exponent, mx_inverse, to_e4m3
from moesaic.kernels._triton.launch import power
from moesaic.kernels._triton.pdl import options, wait
from moesaic.kernels.ops import Latent


@triton.jit
def store_latent_kernel(x_ptr, x_row, norm_ptr, cos_ptr, sin_ptr, angle_row, slots_ptr, pool_ptr, codes_ptr, bytes_ptr,
                        pool_row, eps, R: tl.constexpr, HALF: tl.constexpr, BR: tl.constexpr, BHALF: tl.constexpr,
                        INTERLEAVED: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """pool_ptr: the rows, those of an FP8 cache seen as BF16; pool_row: elements of a row, or bytes."""
    t, i, d = tl.program_id(0).to(tl.int64), tl.arange(0, BR), tl.arange(0, BHALF)
    w = tl.load(norm_ptr + i, i < R, 0.0).to(tl.float32)
    wait(PDL)
    x = tl.load(x_ptr + t * x_row + i, i < R, 0.0).to(tl.float32)
    first_at, second_at = (2 * d, 2 * d + 1) if INTERLEAVED else (d, HALF + d)
    first = tl.load(x_ptr + t * x_row + R + first_at, d < HALF, 0.0).to(tl.float32)
    second = tl.load(x_ptr + t * x_row + R + second_at, d < HALF, 0.0).to(tl.float32)
    cos = tl.load(cos_ptr + t * angle_row + d, d < HALF, 0.0)
    sin = tl.load(sin_ptr + t * angle_row + d, d < HALF, 0.0)
    row = tl.load(slots_ptr + t).to(tl.int64) * pool_row
    y = x * tl.rsqrt(tl.sum(x * x, 0) / R + eps) * w
    y1, y2 = first * cos - second * sin, second * cos + first * sin
    if FP8:
        code = mx_exponent(tl.max(tl.abs(y), 0), 0x1FFFFF, 8)
        tl.store(codes_ptr + row + i, to_e4m3(y * mx_inverse(code)), i < R)
        tl.store(bytes_ptr + row + R + 4 * HALF, code.to(tl.uint8))
        turned_ptr = pool_ptr + row // 2 + R // 2
    else:
        tl.store(pool_ptr + row + i, y.to(pool_ptr.dtype.element_ty), i < R)
        turned_ptr = pool_ptr + row + R
    tl.store(turned_ptr + d, y1.to(pool_ptr.dtype.element_ty), d < HALF)
    tl.store(turned_ptr + HALF + d, y2.to(pool_ptr.dtype.element_ty), d < HALF)


def store_latent(x_TX: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor, slots_T: Tensor) -> None:
    x = (x_TX if x_TX.stride(1) == 1 else x_TX.contiguous())[:, w.column :]
    (cos, sin), rank, fp8 = angles, len(w.norm_R), pool_PW.dtype == torch.uint8
    if len(x):
        store_latent_kernel[(len(x),)](
            x, x.stride(0), w.norm_R, cos, sin, cos.stride(0), slots_T,
            pool_PW.view(torch.bfloat16) if fp8 else pool_PW, pool_PW.view(torch.float8_e4m3fn) if fp8 else None,
            pool_PW if fp8 else None, pool_PW.stride(0), w.eps,
            R=rank, HALF=cos.shape[1], BR=power(rank), BHALF=power(cos.shape[1]), INTERLEAVED=w.interleaved, FP8=fp8,
            num_warps=min(8, max(1, power(rank) // 256)), **options(x.device),
        )  # fmt: skip
