"""Rows into an encoding, bit for bit as `formats/encodings` has it.

Encodings in blocks with scales that BF16 holds (MXFP8; NVFP4 but for its global scale) are multiplied in BF16 on a GPU
without block-scaled tensor cores. Their rows therefore carry one part more, `exact`: the BF16 numbers that codes and
block scales stand for. It costs nothing here, and spares every product its own decoding.

`total`: where the rows in use are counted on the device (routed rows), a pointer to that count; rows behind it are
neither read nor written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.formats import mx, nv
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

PARTIALS = 512
"""Programs of the tensor-wide maximum: each reduces a share of the rows."""


@triton.jit
def rows_in_use(total_ptr, rows, COUNTED: tl.constexpr):
    if COUNTED:
        return tl.minimum(tl.load(total_ptr).to(tl.int32), rows)
    else:
        return rows


@triton.jit
def group128_kernel(x_ptr, data_ptr, scale_ptr, total_ptr, rows, x_stride, K: tl.constexpr, GROUPS: tl.constexpr,
                    BG: tl.constexpr, COUNTED: tl.constexpr):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    if r >= rows_in_use(total_ptr, rows, COUNTED):
        return
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    k = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + r * x_stride + k, k < K, 0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([BG], E4M3_MAX, tl.float32))
    tl.store(data_ptr + r * K + k, to_e4m3(divide(x, scale[:, None])), k < K)
    tl.store(scale_ptr + r * GROUPS + g, scale, g < GROUPS)


@triton.jit
def token_kernel(x_ptr, data_ptr, scale_ptr, total_ptr, rows, x_stride, K: tl.constexpr, BK: tl.constexpr,
                 COUNTED: tl.constexpr):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    if r >= rows_in_use(total_ptr, rows, COUNTED):
        return
    k = tl.arange(0, BK)
    x = tl.load(x_ptr + r * x_stride + k, k < K, 0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 0), tl.full((), E4M3_MAX, tl.float32))
    tl.store(data_ptr + r * K + k, to_e4m3(divide(x, scale)), k < K)
    tl.store(scale_ptr + r, scale)


@triton.jit
def amax_kernel(x_ptr, partial_ptr, total_ptr, rows, x_stride, K: tl.constexpr, BK: tl.constexpr,
                COUNTED: tl.constexpr):  # fmt: skip
    k = tl.arange(0, BK)
    found = tl.zeros([BK], tl.float32)
    for r in range(tl.program_id(0), rows_in_use(total_ptr, rows, COUNTED), tl.num_programs(0)):
        x = tl.load(x_ptr + tl.cast(r, tl.int64) * x_stride + k, k < K, 0.0).to(tl.float32)
        found = tl.maximum(found, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    tl.store(partial_ptr + tl.program_id(0), tl.max(found, 0))


@triton.jit
def tensor_kernel(x_ptr, data_ptr, scale_ptr, partial_ptr, total_ptr, rows, x_stride, K: tl.constexpr, BK: tl.constexpr,
                  PROGRAMS: tl.constexpr, BP: tl.constexpr, STATIC: tl.constexpr, COUNTED: tl.constexpr):  # fmt: skip
    r, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BK + tl.arange(0, BK)
    if STATIC:
        scale = tl.load(scale_ptr)
    else:
        p = tl.arange(0, BP)
        found = tl.max(tl.load(partial_ptr + p, p < PROGRAMS, 0.0), 0)
        scale = tl.div_rn(found, tl.full((), E4M3_MAX, tl.float32))
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(scale_ptr, scale)
    if r >= rows_in_use(total_ptr, rows, COUNTED):
        return
    x = tl.load(x_ptr + r * x_stride + k, k < K, 0.0).to(tl.float32)
    tl.store(data_ptr + r * K + k, to_e4m3(divide(x, scale)), k < K)


@triton.jit
def mxfp8_kernel(x_ptr, data_ptr, scale_ptr, exact_ptr, total_ptr, rows, x_stride, K: tl.constexpr, BG: tl.constexpr,
                 COUNTED: tl.constexpr):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    if r >= rows_in_use(total_ptr, rows, COUNTED):
        return
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    k = g[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + r * x_stride + k, k < K, 0.0).to(tl.float32)
    code = mx_exponent(tl.max(tl.abs(x), 1), 0x1FFFFF, 8)
    data = to_e4m3(x * mx_inverse(code)[:, None])
    tl.store(data_ptr + r * K + k, data, k < K)
    tl.store(scale_ptr + r * (K // 32) + g, code.to(tl.uint8), g < K // 32)
    exact = data.to(tl.float32) * e8m0(code)[:, None]
    tl.store(exact_ptr + r * K + k, exact.to(exact_ptr.dtype.element_ty), k < K)


@triton.jit
def nvfp4_kernel(x_ptr, data_ptr, scale_ptr, exact_ptr, top_ptr, total_ptr, rows, x_stride, K: tl.constexpr,
                 BG: tl.constexpr, STATIC: tl.constexpr, COUNTED: tl.constexpr):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    if r >= rows_in_use(total_ptr, rows, COUNTED):
        return
    g = tl.arange(0, BG)
    k = g[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + r * x_stride + k, k < K, 0.0).to(tl.float32)
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


def encode(x_TD: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
    if encoding.static != (scale is not None):
        raise ValueError(f"{encoding} and a scale of {scale} do not go together")
    return encode_rows(x_TD, encoding, scale, None, x_TD.dtype)


def encode_rows(x: Tensor, encoding: Encoding, scale: Tensor | None, total: Tensor | None, dtype: torch.dtype) -> Rows:
    """total: INT32 [1], how many rows are in use. dtype: what products of the rows take."""
    if encoding.name == "bf16":
        return Rows(encoding, {"data": x}, dtype)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    parts = ENCODERS[encoding.name](flat, scale, total)
    lead = x.shape[:-1]
    shaped = {name: part.view(*lead, part.shape[-1]) if part.dim() else part for name, part in parts.items()}
    return Rows(encoding, shaped, dtype)


def exact_rows(x: Rows) -> tuple[Tensor, Tensor | None]:
    """(the BF16 numbers of MXFP8 or NVFP4 rows without their global scale, that scale). Rows that were not encoded
    here (a dispatcher's) lack them and are decoded."""
    scale = x.parts.get("global_scale")
    exact = x.parts.get("exact")
    if exact is None:
        data, one = x.data, torch.ones((), device=x.data.device)
        wide = mx.dequantize(data.float(), x.parts["scale"]) if scale is None else nv.dequantize(
            data, x.parts["scale"], one)  # fmt: skip
        exact = wide.to(torch.bfloat16)
    return exact, scale


def counted(total: Tensor | None, x: Tensor) -> dict[str, object]:
    """The arguments of the rows in use."""
    return {"total_ptr": x if total is None else total, "COUNTED": total is not None}


def to_group128(x: Tensor, scale: None, total: Tensor | None) -> dict[str, Tensor]:
    rows, size = x.shape
    groups = cdiv(size, 128)
    data, found = x.new_empty(rows, size, dtype=torch.float8_e4m3fn), x.new_empty(rows, groups, dtype=torch.float32)
    block = min(power(groups), 8)
    if x.numel():
        group128_kernel[(rows, cdiv(groups, block))](
            x, data, found, rows=rows, x_stride=x.stride(0), K=size, GROUPS=groups, BG=block, num_warps=min(block, 4),
            **counted(total, x),
        )  # fmt: skip
    return {"data": data, "scale": found}


def to_token(x: Tensor, scale: None, total: Tensor | None) -> dict[str, Tensor]:
    rows, size = x.shape
    data, found = x.new_empty(rows, size, dtype=torch.float8_e4m3fn), x.new_empty(rows, 1, dtype=torch.float32)
    if x.numel():
        token_kernel[(rows,)](
            x, data, found, rows=rows, x_stride=x.stride(0), K=size, BK=power(size),
            num_warps=min(16, max(1, power(size) // 512)), **counted(total, x),
        )  # fmt: skip
    return {"data": data, "scale": found}


def to_tensor(x: Tensor, scale: Tensor | None, total: Tensor | None) -> dict[str, Tensor]:
    rows, size = x.shape
    data = x.new_empty(rows, size, dtype=torch.float8_e4m3fn)
    if not x.numel():
        return {"data": data, "scale": x.new_zeros((), dtype=torch.float32) if scale is None else scale}
    found = x.new_empty((), dtype=torch.float32) if scale is None else scale
    programs, partial = min(rows, PARTIALS), found
    if scale is None:
        partial = x.new_empty(programs, dtype=torch.float32)
        amax_kernel[(programs,)](
            x, partial, rows=rows, x_stride=x.stride(0), K=size, BK=power(size),
            num_warps=min(16, max(1, power(size) // 512)), **counted(total, x),
        )  # fmt: skip
    block = min(power(size), 1024)
    tensor_kernel[(rows, cdiv(size, block))](
        x, data, found, partial, rows=rows, x_stride=x.stride(0), K=size, BK=block, PROGRAMS=programs,
        BP=power(programs), STATIC=scale is not None, num_warps=max(1, block // 256), **counted(total, x),
    )  # fmt: skip
    return {"data": data, "scale": found}


def to_mxfp8(x: Tensor, scale: None, total: Tensor | None) -> dict[str, Tensor]:
    rows, size = x.shape
    data, found = x.new_empty(rows, size, dtype=torch.float8_e4m3fn), x.new_empty(rows, size // 32, dtype=torch.uint8)
    exact = x.new_empty(rows, size, dtype=torch.bfloat16)
    block = min(power(size // 32), 32)
    if x.numel():
        mxfp8_kernel[(rows, cdiv(size // 32, block))](
            x, data, found, exact, rows=rows, x_stride=x.stride(0), K=size, BG=block, num_warps=max(1, block // 8),
            **counted(total, x),
        )  # fmt: skip
    return {"data": data, "scale": found, "exact": exact}


def to_nvfp4(x: Tensor, scale: Tensor | None, total: Tensor | None) -> dict[str, Tensor]:
    rows, size = x.shape
    data = x.new_empty(rows, size // 2, dtype=torch.uint8)
    found = x.new_empty(rows, size // 16, dtype=torch.float8_e4m3fn)
    exact = x.new_empty(rows, size, dtype=torch.bfloat16)
    top = x.new_empty(rows, 1, dtype=torch.float32) if scale is None else scale
    if x.numel():
        nvfp4_kernel[(rows,)](
            x, data, found, exact, top, rows=rows, x_stride=x.stride(0), K=size, BG=power(size // 16),
            STATIC=scale is not None, num_warps=min(16, max(1, power(size) // 512)), **counted(total, x),
        )  # fmt: skip
    return {"data": data, "scale": found, "global_scale": top, "exact": exact}


ENCODERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "fp8_group128": to_group128, "fp8_token": to_token, "fp8_tensor": to_tensor, "mxfp8": to_mxfp8, "nvfp4": to_nvfp4,
}  # fmt: skip
