"""Slots in `fp8_group128` -> `fp8_tensor` with one static scale; twin: formats/encodings/requantize.py.

A program takes turns at the slots of one expert that are in use, for a range of columns. Letters: E experts, C slots, H
columns, G groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.errors import UnsupportedError
from moesaic.kernels._triton.bits import divide, to_e4m3
from moesaic.kernels._triton.launch import cdiv, power

GROUP = 128


PROGRAMS = 2048
"""About how many there are, whatever is in use; each takes turns at an expert's slots."""


@triton.jit
def quotient(x, scale, inverse):
    """x / scale as IEEE rounds it, for an `inverse` that is 1 / scale so rounded (Markstein 1990): a product and one
    correction. A quotient that is too large for that stays as it is; it saturates all the same."""
    x, scale = tl.broadcast(x, scale)
    x, inverse = tl.broadcast(x, inverse)
    q = x * inverse
    better = tl.fma(tl.fma(-q, scale, x), inverse, q)
    return tl.where(tl.abs(q) > 1.0e27, q, better)


@triton.jit
def requantize_kernel(data_ptr, scales_ptr, counts_ptr, scale_ptr, out_ptr, data_e, data_c, scales_e, scales_c,
                      scales_g, out_e, out_c, G: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr):  # fmt: skip
    e, step = tl.program_id(2).to(tl.int64), tl.num_programs(1) * BC
    count, scale = tl.load(counts_ptr + e).to(tl.int32), tl.load(scale_ptr)
    g = tl.program_id(0) * BG + tl.arange(0, BG)
    column = (g[:, None] * 128 + tl.arange(0, 128)[None, :])[None, :, :]
    usual = (scale > 1.0e-18) & (scale < 1.0e18)
    inverse = tl.div_rn(1.0, tl.where(usual, scale, 1.0))
    for first in tl.range(tl.program_id(1) * BC, count, step, num_stages=3):
        c = first + tl.arange(0, BC)
        ok = (c < count)[:, None] & (g < G)[None, :]
        scales = tl.load(scales_ptr + e * scales_e + c[:, None] * scales_c + g[None, :] * scales_g, ok, 0.0)
        at = c[:, None, None].to(tl.int64)
        x = tl.load(data_ptr + e * data_e + at * data_c + column, ok[:, :, None], 0.0).to(tl.float32)
        x = x * scales[:, :, None]
        if usual:  # noqa: SIM108 (a branch on the device)
            codes = to_e4m3(quotient(x, scale, inverse))
        else:
            codes = to_e4m3(divide(x, scale))
        tl.store(out_ptr + e * out_e + at * out_c + column, codes, ok[:, :, None])


def requantize_slots(
    data_ECH: Tensor, scale_ECG: Tensor, counts_E: Tensor, scale: Tensor, out_ECH: Tensor | None = None
) -> Tensor:
    """As its twin, without its look at values (that would wait for the device): shapes only are checked."""
    experts, capacity, width = data_ECH.shape
    if width % GROUP:
        raise UnsupportedError(f"rows of {width} columns are not whole groups of {GROUP}", where="requantize_slots")
    out = data_ECH.clone() if out_ECH is None else out_ECH
    groups = width // GROUP
    if out.numel():
        slots, block = 4, min(power(groups), 8)
        turns = max(1, min(cdiv(capacity, slots), PROGRAMS // (experts * cdiv(groups, block))))
        requantize_kernel[(cdiv(groups, block), turns, experts)](
            data_ECH, scale_ECG, counts_E, scale, out, data_ECH.stride(0), data_ECH.stride(1), *scale_ECG.stride(),
            out.stride(0), out.stride(1), G=groups, BC=slots, BG=block, num_warps=4,
        )  # fmt: skip
    return out
