"""A row that a kernel holds in its registers, into an encoding: what `encode.py` does of rows in memory, bit for bit.

The row is a tile [BG, S] of FP32: group g, element s is column g S + s, zeros behind the last column. S follows from
the encoding, so that a group with a scale of its own is a row of the tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.bits import (
    E2M1_MAX,
    E4M3_MAX,
    TINY,
    divide,
    e2m1,
    e8m0,
    mx_exponent,
    mx_inverse,
    to_e2m1,
    to_e4m3,
    to_operand,
)  # fmt: skip
from moesaic.kernels._triton.launch import cdiv, power

GROUPS = {"bf16": 128, "fp8_group128": 128, "fp8_token": 128, "fp8_tensor": 128, "mxfp8": 32, "nvfp4": 16}
"""S of each encoding. A dynamic `fp8_tensor`, whose scale spans all rows, cannot be emitted."""


@triton.jit
def emit(x, r, g, data_ptr, scale_ptr, exact_ptr, K: tl.constexpr, ENCODING: tl.constexpr, STATIC: tl.constexpr,
         BG: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Stores row r (INT64), groups g [BG]. Parts as in encode.py; scale_ptr: of `nvfp4` the block scales.

    `fp8_token` and a dynamic `nvfp4` need the whole row in x.
    """
    k = g[:, None] * S + tl.arange(0, S)[None, :]
    amax = tl.max(tl.abs(x), 1)
    if ENCODING == "fp8_group128":
        scale = tl.div_rn(amax, tl.full([BG], E4M3_MAX, tl.float32))
        tl.store(data_ptr + r * K + k, to_e4m3(divide(x, scale[:, None])), k < K)
        tl.store(scale_ptr + r * ((K + 127) // 128) + g, scale, g < (K + 127) // 128)
    elif ENCODING == "fp8_token":
        scale = tl.div_rn(tl.max(amax, 0), tl.full((), E4M3_MAX, tl.float32))
        tl.store(data_ptr + r * K + k, to_e4m3(divide(x, scale)), k < K)
        tl.store(scale_ptr + r, scale)
    elif ENCODING == "fp8_tensor":
        tl.static_assert(STATIC, "a dynamic scale spans all rows")
        tl.store(data_ptr + r * K + k, to_e4m3(divide(x, tl.load(scale_ptr))), k < K)
    elif ENCODING == "mxfp8":
        code = mx_exponent(amax, 0x1FFFFF, 8)
        data = to_e4m3(x * mx_inverse(code)[:, None])
        tl.store(data_ptr + r * K + k, data, k < K)
        tl.store(scale_ptr + r * (K // 32) + g, code.to(tl.uint8), g < K // 32)
        exact = data.to(tl.float32) * e8m0(code)[:, None]
        tl.store(exact_ptr + r * K + k, exact.to(exact_ptr.dtype.element_ty), k < K)


@triton.jit
def emit_nvfp4(x, r, g, data_ptr, scale_ptr, exact_ptr, top_ptr, K: tl.constexpr, STATIC: tl.constexpr,
               BG: tl.constexpr):  # fmt: skip
    k = g[:, None] * 16 + tl.arange(0, 16)[None, :]
    amax = tl.max(tl.abs(x), 1)
    if STATIC:
        top = tl.load(top_ptr)
    else:
        top = tl.maximum(tl.div_rn(tl.max(amax, 0), tl.full((), E4M3_MAX * E2M1_MAX, tl.float32)), TINY)
        tl.store(top_ptr + r, top)
    sixth = tl.div_rn(amax, tl.full([BG], E2M1_MAX, tl.float32))
    scale = to_e4m3(tl.div_rn(sixth, tl.zeros_like(sixth) + top))
    code = to_e2m1(divide(x, (scale.to(tl.float32) * top)[:, None]))
    tl.store(scale_ptr + r * (K // 16) + g, scale, g < K // 16)
    exact = e2m1(code) * to_operand(scale)[:, None]
    tl.store(exact_ptr + r * K + k, exact.to(exact_ptr.dtype.element_ty), k < K)
    low, high = tl.split(tl.reshape(code, [BG, 8, 2]))
    byte = g[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(data_ptr + r * (K // 2) + byte, (low | (high << 4)).to(tl.uint8), byte < K // 2)


@triton.jit
def emit_row(x, r, g, data_ptr, scale_ptr, exact_ptr, top_ptr, K: tl.constexpr, ENCODING: tl.constexpr,
             STATIC: tl.constexpr, BG: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Any of the encodings, or none (`bf16`)."""
    if ENCODING == "nvfp4":
        emit_nvfp4(x, r, g, data_ptr, scale_ptr, exact_ptr, top_ptr, K, STATIC, BG)
    elif ENCODING != "bf16":
        emit(x, r, g, data_ptr, scale_ptr, exact_ptr, K, ENCODING, STATIC, BG, S)


def emits(encoding: Encoding) -> bool:
    """Whether a row can be encoded without looking at others."""
    return encoding.by_row and encoding.name in GROUPS


def parts_for(encoding: Encoding, rows: int, size: int, like: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    """Storage for rows [rows, size], uninitialised. scale: of a static encoding; it becomes a part as it is."""
    name = encoding.name
    if name == "fp8_group128":
        return {"data": fp8(rows, size, like), "scale": like.new_empty(rows, cdiv(size, 128), dtype=torch.float32)}
    if name == "fp8_token":
        return {"data": fp8(rows, size, like), "scale": like.new_empty(rows, 1, dtype=torch.float32)}
    if name == "fp8_tensor":
        assert scale is not None, "a dynamic scale spans all rows"
        return {"data": fp8(rows, size, like), "scale": scale}
    exact = like.new_empty(rows, size, dtype=torch.bfloat16)
    if name == "mxfp8":
        scales = like.new_empty(rows, size // 32, dtype=torch.uint8)
        return {"data": fp8(rows, size, like), "scale": scales, "exact": exact}
    top = like.new_empty(rows, 1, dtype=torch.float32) if scale is None else scale
    blocks = like.new_empty(rows, size // 16, dtype=torch.float8_e4m3fn)
    codes = like.new_empty(rows, size // 2, dtype=torch.uint8)
    return {"data": codes, "scale": blocks, "global_scale": top, "exact": exact}


def fp8(rows: int, size: int, like: Tensor) -> Tensor:
    return like.new_empty(rows, size, dtype=torch.float8_e4m3fn)


def emitting(encoding: Encoding, parts: dict[str, Tensor], size: int, groups: int | None = None) -> dict[str, Any]:
    """The kernel arguments `data_ptr .. top_ptr, ENCODING, STATIC, BG, S`. groups: of a program; None is all."""
    step = GROUPS[encoding.name]
    none = parts.get("data")
    return {
        "data_ptr": none, "scale_ptr": parts.get("scale", none), "exact_ptr": parts.get("exact", none),
        "top_ptr": parts.get("global_scale", none), "ENCODING": encoding.name, "STATIC": encoding.static,
        "BG": power(cdiv(size, step)) if groups is None else groups, "S": step,
    }  # fmt: skip


def rows_of(encoding: Encoding, parts: dict[str, Tensor], plain: Tensor) -> Rows:
    """What was emitted; `bf16`: the rows as they are."""
    return Rows(encoding, parts or {"data": plain}, plain.dtype)
