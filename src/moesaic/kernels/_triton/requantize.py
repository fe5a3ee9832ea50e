"""Slots in `fp8_group128` -> `fp8_tensor` with one static scale; twin: formats/encodings/requantize.py.

A program takes turns at the slots of one expert that are in use, within a range of columns. Letters: E
experts, C slots, H columns, G groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.errors import UnsupportedError
from moesaic.kernels._triton.bits import WIDE, divide, to_e4m3
from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.pdl import options, wait

GROUP = 128
SLOTS, GROUPS, WARPS = 2, 8, 4
"""Of a program."""
PROGRAMS = 2112
"""About how many there are, whatever is in use: each takes turns at an expert's slots."""
UP, DOWN = tl.constexpr(2.0**96), tl.constexpr(2.0**-96)


@triton.jit
def quotients(x, scale):
    """x / scale as IEEE rounds it, by a product and one correction (Markstein 1990) in place of a division each. Scales
    whose inverse is tiny or huge are lifted; quotients that are too small or too large for the correction round to 0,
    or saturate, without it. 0 where the scale is 0 or infinite."""
    if WIDE:
        return divide(x, scale)  # the interpreter's `fma` rounds twice
    lift = tl.where(scale < 1.0e-27, UP, tl.where(scale > 1.0e27, DOWN, 1.0))
    usual = (scale > 0) & (scale < float("inf"))
    by, x = tl.where(usual, scale * lift, 1.0), x * lift
    inverse = tl.where(usual, tl.div_rn(1.0, by), 0.0)
    q = x * inverse
    better = tl.fma(tl.fma(q, by, -x), -inverse, q)  # in this form, -0 remains -0
    return tl.where(tl.abs(q) > 1.0e27, q, better)


@triton.jit
def requantize_kernel(data_ptr, scales_ptr, counts_ptr, scale_ptr, out_ptr, data_e, data_c, scales_e, scales_c,
                      scales_g, out_e, out_c, capacity, G: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    e, step = tl.program_id(2).to(tl.int64), tl.num_programs(1) * BC
    count, scale = tl.minimum(tl.load(counts_ptr + e), capacity).to(tl.int32), tl.load(scale_ptr)
    g = tl.program_id(0) * BG + tl.arange(0, BG)
    column = (g[:, None] * 128 + tl.arange(0, 128)[None, :])[None, :, :]
    for first in range(tl.program_id(1) * BC, count, step):
        c = first + tl.arange(0, BC)
        ok = (c < count)[:, None] & (g < G)[None, :]
        scales = tl.load(scales_ptr + e * scales_e + c[:, None] * scales_c + g[None, :] * scales_g, ok, 0.0)
        at = c[:, None, None].to(tl.int64)
        x = tl.load(data_ptr + e * data_e + at * data_c + column, ok[:, :, None], 0.0).to(tl.float32)
        x = x * scales[:, :, None]
        codes = to_e4m3(quotients(x, scale))
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
        block = min(power(groups), GROUPS)
        across = cdiv(groups, block)
        turns = min(cdiv(capacity, SLOTS), cdiv(PROGRAMS, experts * across))
        requantize_kernel[(across, turns, experts)](
            data_ECH, scale_ECG, counts_E, scale, out, data_ECH.stride(0), data_ECH.stride(1), *scale_ECG.stride(),
            out.stride(0), out.stride(1), capacity, G=groups, BC=SLOTS, BG=block, num_warps=WARPS,
            **options(out.device),
        )  # fmt: skip
    return out
