"""One tile of x w^T, the weight in any format, the rows plain or in E4M3. Everything that multiplies stands on it.

The tile is usually computed transposed (FLIP), `[BN, BM]` = w `[BN, BK]` x^T: a weight that is decoded in registers
is then the tensor core's first operand, which may stay there, and few rows (decoding) make a narrow tile, not an empty
one. Many rows in E4M3 with a scale per 128 are better off upright: a thread then holds few of the rows' scales.

Which numbers meet in the tensor core:
- E4M3 weights (fp8_*), and int4 codes, which are exact in E4M3, with E4M3 rows: FP8 products, added in FP32 registers
  outside the tensor core after at most 128 of K (Hopper's FP8 accumulator is narrower than FP32);
- anything else in BF16, to which every operand is decoded exactly. MX and NVFP4 block scales are part of the operand
  (formats.md: E4M3 x 2^k and E2M1 x E4M3 fit BF16); FP32 and 16-bit scales multiply the FP32 sums of their group.

Letters: N weight rows of the tile, M rows of x, K contraction; `N_` and `M_` vectors hold row indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.bits import (
    TINY_E2M1,
    TINY_E4M3,
    WIDE,
    e2m1_pairs,
    e4m3,
    e8m0,
    int4_e4m3_pairs,
    int4_pairs,
    to_e4m3,
    to_operand,
)
from moesaic.kernels._triton.encode import exact_rows

LIFT_E4M3, LIFT_E2M1 = tl.constexpr(TINY_E4M3.value**-0.5), tl.constexpr(TINY_E2M1.value**-0.5)
EIGHT_BITS = ("fp8_tensor", "fp8_channel", "fp8_block", "int4")
"""Formats whose codes E4M3 holds."""


@triton.jit
def block_scales(ws_row, row_ok, k0, K: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK / block] operands: the MX or NVFP4 scales of a tile. ws_row: pointers [BN].

    Where the rows allow it, all scales of a row's step are read as one word: a load per row, not per scale, which the
    compiler can place straight into the registers that need them.
    """
    BLOCK: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    COUNT: tl.constexpr = BK // BLOCK
    g = tl.arange(0, COUNT)[None, :]
    if (K % BK == 0) and (COUNT == 4 or COUNT == 8) and not WIDE:
        WORD: tl.constexpr = tl.int32 if COUNT == 4 else tl.int64
        word = tl.load(ws_row.to(tl.pointer_type(WORD)) + k0 // BK, row_ok, 0)[:, None]
        codes = ((word >> (8 * g).to(WORD)) & 255).to(tl.uint8)
        scale = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) if FORMAT == "nvfp4" else e8m0(codes)
    else:
        at = k0 // BLOCK + g
        scale = tl.load(ws_row[:, None] + at, row_ok[:, None] & (at < K // BLOCK), 0.0 if FORMAT == "nvfp4" else 0)
        scale = scale.to(tl.float32) if FORMAT == "nvfp4" else e8m0(scale)
    return to_operand(scale * lift(FORMAT, False))


@triton.jit
def lift(FORMAT: tl.constexpr, EIGHT: tl.constexpr):
    """The root of what operands as decoded are too small by (bits.py): applied to each, and again to the sum."""
    if FORMAT == "mxfp4" or FORMAT == "nvfp4":
        return LIFT_E2M1
    elif FORMAT == "bf16" or FORMAT == "int4" or EIGHT:
        return 1.0
    else:
        return LIFT_E4M3


@triton.jit
def weight_tile(w_row, ws_row, zero_row, row_ok, k0, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
                EIGHT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """[BN, BK] of operands. The `_row` arguments are pointers [BN] to the beginnings of rows."""
    EVEN: tl.constexpr = K % BK == 0
    PACKED: tl.constexpr = (FORMAT == "mxfp4") or (FORMAT == "nvfp4") or (FORMAT == "int4")
    ok = row_ok[:, None]
    if PACKED:
        k = k0 // 2 + tl.arange(0, BK // 2)[None, :]
        data = tl.load(w_row[:, None] + k, ok if EVEN else ok & (k < K // 2), 0)
    else:
        k = k0 + tl.arange(0, BK)[None, :]
        data = tl.load(w_row[:, None] + k, ok if EVEN else ok & (k < K), 0.0)
    if FORMAT == "int4":
        if zero_row is not None:
            zero = 128.0 + tl.load(zero_row + k0 // GROUP, row_ok, 0).to(tl.float32)
            w = int4_pairs(data) - to_operand(zero)[:, None]
            return to_e4m3(w.to(tl.float32)) if EIGHT and not WIDE else w
        elif EIGHT and not WIDE:
            return int4_e4m3_pairs(data)
        else:
            w = int4_pairs(data)
            return w - tl.full((), 136.0, w.dtype)
    elif FORMAT == "mxfp8" or FORMAT == "mxfp4" or FORMAT == "nvfp4":
        scale = block_scales(ws_row, row_ok, k0, K, FORMAT, BN, BK)
        w = e4m3(data, True) if FORMAT == "mxfp8" else e2m1_pairs(data)
        return tl.reshape(tl.reshape(w, [BN, scale.shape[1], BK // scale.shape[1]]) * scale[:, :, None], [BN, BK])
    elif FORMAT == "bf16":
        return to_operand(data)
    elif EIGHT and not WIDE:
        return data
    else:
        w = e4m3(data, False)
        return w * tl.full((), lift(FORMAT, EIGHT), w.dtype)


@triton.jit
def product(x_row, x_ok, xs_row, w_row, row_ok, ws_row, ws_pair, zero_row, k_begin, k_end, K: tl.constexpr,
            FORMAT: tl.constexpr, GROUP: tl.constexpr, X_GROUPS: tl.constexpr, EIGHT: tl.constexpr,
            FLIP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """FP32 [BN, BM] if FLIP, else [BM, BN], over k_begin <= k < k_end (multiples of BK). `_row`: pointers, 1-D.

    X_GROUPS: the rows have an FP32 scale per 128 (at xs_row). Scales of whole rows are the caller's.
    ws_pair: where all even, and all odd, weight rows of the tile share their scales: pointers to the two; or None.
    """
    EVEN: tl.constexpr = K % BK == 0
    W_GROUPS: tl.constexpr = (FORMAT == "int4") or (FORMAT == "fp8_block")
    acc = tl.zeros([BN, BM] if FLIP else [BM, BN], tl.float32)
    for k0 in range(k_begin, k_end, BK):
        k = k0 + tl.arange(0, BK)[None, :]
        # Loaded ahead of the product that they scale, which the tensor core computes meanwhile.
        ws = None
        if ws_pair is not None:
            even, odd = tl.load(ws_pair[0] + k0 // GROUP), tl.load(ws_pair[1] + k0 // GROUP)
            ws = tl.where(tl.arange(0, BN) % 2 == 0, even, odd)
        elif W_GROUPS:
            ws = tl.load(ws_row + k0 // GROUP, row_ok, 0.0).to(tl.float32)
        xs = tl.load(xs_row + k0 // 128, x_ok, 0.0) if X_GROUPS else None
        x = tl.load(x_row[:, None] + k, x_ok[:, None] if EVEN else x_ok[:, None] & (k < K), 0.0)
        w = weight_tile(w_row, ws_row, zero_row, row_ok, k0, K, FORMAT, GROUP, EIGHT, BN, BK)
        if not EIGHT or WIDE:
            x = to_operand(x)
        a, b = (w, tl.trans(x)) if FLIP else (x, tl.trans(w))
        if W_GROUPS or X_GROUPS:
            part = tl.dot(a, b, out_dtype=tl.float32)
            if X_GROUPS and W_GROUPS:
                acc += part * (across(xs, FLIP) * along(ws, FLIP))
            elif X_GROUPS:
                acc += part * across(xs, FLIP)
            else:
                acc += part * along(ws, FLIP)
        elif EIGHT:
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=128)
        else:
            acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def along(of_N, FLIP: tl.constexpr):
    """One value per weight row, to broadcast over the tile."""
    return of_N[:, None] if FLIP else of_N[None, :]


@triton.jit
def across(of_M, FLIP: tl.constexpr):
    """One value per row of x, likewise."""
    return of_M[None, :] if FLIP else of_M[:, None]


@triton.jit
def scale_rows(acc, ws_row, top_row, row_ok, xs_ptr, xs_row, x_ok, FORMAT: tl.constexpr, X_GROUPS: tl.constexpr,
               X_ROWS: tl.constexpr, EIGHT: tl.constexpr, FLIP: tl.constexpr):  # fmt: skip
    """Applies what multiplies whole rows of the weight or of x."""
    acc *= lift(FORMAT, EIGHT)
    if FORMAT == "fp8_tensor" or FORMAT == "fp8_channel":
        acc *= along(tl.load(ws_row, row_ok, 0.0), FLIP)
    elif FORMAT == "nvfp4":
        acc *= along(tl.load(top_row, row_ok, 0.0), FLIP)
    if xs_ptr is not None and not X_GROUPS:
        if X_ROWS:
            acc *= across(tl.load(xs_row, x_ok, 0.0), FLIP)
        else:
            acc *= tl.load(xs_ptr)
    return acc


@dataclass(frozen=True)
class Operands:
    """Rows and a weight as a kernel's arguments: pointers and strides by name, and what is known at compile time."""

    pointers: dict[str, Any]
    constants: dict[str, Any]


def operands(x: Rows, w: QuantTensor) -> Operands:
    """The arguments `x_ptr .. map_ptr` and `K .. BK` of a kernel that multiplies rows with (experts of) a weight."""
    values, x_scale, per_row = operand_rows(x)
    values = values.reshape(-1, values.shape[-1])
    form, parts = w.form, w.parts
    step, group = steps(w)
    eight = form.name in EIGHT_BITS and values.dtype == torch.float8_e4m3fn and step >= 32
    data, scale = parts["data"], parts.get("scale")
    pointers = {
        "x_ptr": values, "x_stride": values.stride(0), "xs_ptr": x_scale,
        "xs_stride": 0 if x_scale is None or x_scale.dim() == 0 else x_scale.reshape(-1, x_scale.shape[-1]).stride(0),
        "w_ptr": data, "w_expert": data.stride(0) if data.dim() == 3 else 0, "w_stride": data.stride(-2),
        "ws_ptr": scale, "ws_expert": 0 if scale is None or data.dim() < 3 else scale.stride(0),
        "ws_stride": 0 if scale is None else scale.stride(-2) if scale.dim() == data.dim() else 1,
        "zero_ptr": parts.get("zero"), "top_ptr": parts.get("global_scale"), "segments": len(w.segments),
        "map_ptr": coarse_rows(form.name, w.segments, data.device),
    }  # fmt: skip
    constants = {
        "K": w.columns, "FORMAT": form.name, "GROUP": group, "X_GROUPS": x.encoding.name == "fp8_group128",
        "X_ROWS": per_row, "EIGHT": eight, "BK": step,
    }  # fmt: skip
    return Operands(pointers, constants)


def operand_rows(x: Rows) -> tuple[Tensor, Tensor | None, bool]:
    """(numbers that the tensor core takes, FP32 scales of rows or groups or of everything, one scale for each row)."""
    if x.encoding.name == "bf16":
        return x.data, None, False
    if x.encoding.name in ("mxfp8", "nvfp4"):
        values, scale = exact_rows(x)
        return values, scale, scale is not None and scale.dim() > 0
    return x.data, x.parts["scale"], x.encoding.name == "fp8_token"


def steps(w: QuantTensor) -> tuple[int, int]:
    """(elements of K per step, elements of K per scale of the weight). A step lies within one group."""
    if w.form.name != "int4":
        return (64 if w.form.name == "bf16" else 128), 128
    step = gcd(w.form.group, 128)
    if step < 16:
        raise UnsupportedError(f"{w.form}: no kernel multiplies groups of {w.form.group}",
                               remedy="Groups of a multiple of 16 are supported.")  # fmt: skip
    return step, w.form.group


@lru_cache(maxsize=256)
def coarse_rows(form: str, segments: tuple[int, ...], device: torch.device) -> Tensor | None:
    """INT32 [N]: the row of a coarse field that belongs to a row of the weight. Follows from shapes alone."""
    if form not in ("fp8_block", "fp8_tensor", "nvfp4"):
        return None
    found, height = [], 0
    for rows in segments:
        block = 128 if form == "fp8_block" else max(rows, 1)
        found.append(torch.arange(rows, dtype=torch.int32) // block + height)
        height += -(-rows // block)
    return torch.cat(found).to(device)


@dataclass(frozen=True)
class Tile:
    """BM rows of x, BN of the weight; see FLIP at the head of this file."""

    bm: int
    bn: int
    flip: bool
    warps: int
    stages: int

    def arguments(self) -> dict[str, Any]:
        return {"BM": self.bm, "BN": self.bn, "FLIP": self.flip, "num_warps": self.warps, "num_stages": self.stages}


def tile_of(height: int, given: Operands, few: bool = False) -> Tile:
    """The tile for BM rows; measured on an H100 with 128 experts of 2048 x 768. few: about a tile per processor."""
    form = given.constants["FORMAT"]
    if given.constants["EIGHT"] and form != "int4":
        if height >= 64:
            return Tile(height, 64 if height >= 128 else 128, False, 8, 4)
        return Tile(height, 64, True, 4, 5 if height == 16 else 4)
    if height >= 128:
        return Tile(height, 128, True, 8, 3)
    if height >= 32:
        return Tile(height, 128 if height == 64 and form != "int4" else 64, True, 4, 3)
    if few and form in ("mxfp8", "mxfp4", "nvfp4"):
        return Tile(height, 32, True, 2, 4)
    return Tile(height, 64, True, 4, 3 if form == "int4" and not given.constants["EIGHT"] else 4)
