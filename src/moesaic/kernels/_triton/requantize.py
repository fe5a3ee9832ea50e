"""Slots in `fp8_group128` -> `fp8_tensor` with one static scale; twin: formats/encodings/requantize.py.

A program takes some slots of one expert and a range of columns; slots that are not in use cost it one load. Letters: E
experts, C slots, H columns, G groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.errors import UnsupportedError
from moesaic.kernels._triton.bits import divide, to_e4m3
from moesaic.kernels._triton.launch import cdiv, power

GROUP = 128


@triton.jit
def requantize_kernel(data_ptr, scales_ptr, counts_ptr, scale_ptr, out_ptr, data_e, data_c, scales_e, scales_c,
                      scales_g, out_e, out_c, G: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr):  # fmt: skip
    e, c = tl.program_id(2).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    count = tl.load(counts_ptr + e)
    if tl.program_id(1) * BC >= count:
        return
    g = tl.program_id(0) * BG + tl.arange(0, BG)
    ok = (c < count)[:, None] & (g < G)[None, :]
    scales = tl.load(scales_ptr + e * scales_e + c[:, None] * scales_c + g[None, :] * scales_g, ok, 0.0)
    column = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    at = c[:, None, None].to(tl.int64)
    x = tl.load(data_ptr + e * data_e + at * data_c + column[None, :, :], ok[:, :, None], 0.0).to(tl.float32)
    codes = to_e4m3(divide(x * scales[:, :, None], tl.load(scale_ptr)))
    tl.store(out_ptr + e * out_e + at * out_c + column[None, :, :], codes, ok[:, :, None])


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
        requantize_kernel[(cdiv(groups, block), cdiv(capacity, slots), experts)](
            data_ECH, scale_ECG, counts_E, scale, out, data_ECH.stride(0), data_ECH.stride(1), *scale_ECG.stride(),
            out.stride(0), out.stride(1), G=groups, BC=slots, BG=block, num_warps=4,
        )  # fmt: skip
    return out
