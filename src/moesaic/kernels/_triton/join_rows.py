"""Between the two products of experts, where they are not ours: [gate, up] rows -> activated rows, encoded at once.

The product before rounded its sums to BF16; bias, the weight's tensor-wide scales (one for gate, one for up) and the
rows' own scales, which it did not know of, are applied here in FP32. Rows of padding ids give zeros.

Letters: R routed rows, P places, I expert width, G groups of 128 or 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.spec import Activation
from moesaic.kernels._triton.activate import join
from moesaic.kernels._triton.bits import E4M3_MAX, divide, e8m0, mx_exponent, mx_inverse, to_e4m3
from moesaic.kernels._triton.launch import cdiv, power


@dataclass(frozen=True)
class Extras:
    """What the first product did not do. bias [E, 2I].  top [E, 2]: FP32, of gate and up.  row: FP32 [T, 1] or []."""

    bias: Tensor | None = None
    top: Tensor | None = None
    row: Tensor | None = None


NONE = Extras()


@triton.jit
def join_kernel(x_ptr, y_ptr, scale_ptr, ids_ptr, place_ptr, counts_ptr, capacity, bias_ptr, top_ptr, row_ptr, P,
                scale_p, scale_r, scale_g, TOP_K: tl.constexpr, PER_ROW: tl.constexpr, SIZE: tl.constexpr,
                OAI: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, HOW: tl.constexpr, GROUP: tl.constexpr,
                BG: tl.constexpr):  # fmt: skip
    """place_ptr None: rows stay at r. counts_ptr: rows are slots, of which only some are in use.

    Scales lie in planes of P rows, of which each and each group have strides of their own.
    """
    r = tl.program_id(0).to(tl.int64)
    if counts_ptr is not None:
        e = r // capacity
        used = r % capacity < tl.load(counts_ptr + e)
    else:
        e = tl.load(ids_ptr + r).to(tl.int64)
        used = e >= 0
    if (counts_ptr is not None) or (place_ptr is not None):  # noqa: SIM102 known when compiled, unlike the second
        if used == 0:
            return
    at = r if place_ptr is None else tl.load(place_ptr + r).to(tl.int64)
    e = tl.maximum(e, 0)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    i = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    ok = i < SIZE
    gate = tl.load(x_ptr + at * (2 * SIZE) + i, ok & used, 0.0).to(tl.float32)
    up = tl.load(x_ptr + at * (2 * SIZE) + SIZE + i, ok & used, 0.0).to(tl.float32)
    if top_ptr is not None:
        gate *= tl.load(top_ptr + 2 * e)
        up *= tl.load(top_ptr + 2 * e + 1)
    if row_ptr is not None:
        row = tl.load(row_ptr + r // TOP_K) if PER_ROW else tl.load(row_ptr)
        gate *= row
        up *= row
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + e * (2 * SIZE) + i, ok & used, 0.0).to(tl.float32)
        up += tl.load(bias_ptr + e * (2 * SIZE) + SIZE + i, ok & used, 0.0).to(tl.float32)
    h = join(gate, up, OAI, LIMIT, ALPHA)
    h = tl.where(ok & used, h, 0.0)
    if HOW == "fp8_group128":
        scale = tl.div_rn(tl.max(tl.abs(h), 1), tl.full([BG], E4M3_MAX, tl.float32))
        tl.store(y_ptr + at * SIZE + i, to_e4m3(divide(h, scale[:, None])), ok)
        place = at // P * scale_p + at % P * scale_r + g.to(tl.int64) * scale_g
        tl.store(scale_ptr + place, scale, g * GROUP < SIZE)
    elif HOW == "mxfp8":  # the BF16 numbers that codes and scales stand for
        code = mx_exponent(tl.max(tl.abs(h), 1), 0x1FFFFF, 8)
        exact = to_e4m3(h * mx_inverse(code)[:, None]).to(tl.float32) * e8m0(code)[:, None]
        tl.store(y_ptr + at * SIZE + i, exact.to(y_ptr.dtype.element_ty), ok)
    else:
        tl.store(y_ptr + at * SIZE + i, h.to(y_ptr.dtype.element_ty), ok)


def join_rows(
    x_PJ: Tensor, ids_R: Tensor, places_R: Tensor | None, activation: Activation, how: str, extras: Extras = NONE,
    top_k: int = 1, transposed: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x [P, 2I], at the places of routed rows or (None) at their own numbers -> rows [P, I] (there too) and scales.

    how: `bf16`; `fp8_group128`: E4M3 codes with FP32 scales [P, G], in memory transposed or not; `mxfp8`: the BF16
    numbers that its codes stand for; `wide`: FP32. What is in no place is left undefined.
    """
    rows, scale = launched(x_PJ, len(ids_R), activation, how, extras,
                           {"ids_ptr": ids_R, "place_ptr": places_R, "counts_ptr": None, "capacity": 1,
                            "TOP_K": top_k}, (1, transposed))  # fmt: skip
    return rows, None if scale is None else scale[0]


def join_slots(x_ECJ: Tensor, counts_E: Tensor, activation: Activation, how: str,
               extras: Extras = NONE) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The same of slots [E, C, 2I]; those behind counts[e] are left undefined.

    Scales [E, C, G], transposed per expert.
    """
    experts, capacity, width = x_ECJ.shape
    rows, scale = launched(x_ECJ.view(-1, width), experts * capacity, activation, how, extras,
                           {"ids_ptr": None, "place_ptr": None, "counts_ptr": counts_E, "capacity": capacity,
                            "TOP_K": 1}, (experts, True))  # fmt: skip
    return rows.view(experts, capacity, -1), scale


def launched(x: Tensor, rows: int, activation: Activation, how: str, extras: Extras,
             where: dict[str, object], planes: tuple[int, bool]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """planes: of scales, how many and whether transposed."""
    size, plane = x.shape[1] // 2, len(x) // planes[0]
    dtype = {"fp8_group128": torch.float8_e4m3fn, "wide": torch.float32}.get(how, x.dtype)
    y, scale, group = x.new_empty(len(x), size, dtype=dtype), None, 32 if how == "mxfp8" else 128
    if how == "fp8_group128":
        groups = cdiv(size, 128)
        if planes[1]:
            scale = x.new_empty(planes[0], groups, plane, dtype=torch.float32).transpose(1, 2)
        else:
            scale = x.new_empty(planes[0], plane, groups, dtype=torch.float32)
    block = min(power(cdiv(size, group)), 1024 // group)
    join_kernel[(rows, cdiv(size, group * block))](
        x, y, scale, **where, bias_ptr=extras.bias, top_ptr=extras.top, row_ptr=extras.row, P=plane,
        **strides(scale), PER_ROW=extras.row is not None and extras.row.numel() > 1, SIZE=size,
        OAI=activation.kind == "swiglu_oai", LIMIT=activation.limit, ALPHA=activation.alpha, HOW=how, GROUP=group,
        BG=block, num_warps=4,
    )  # fmt: skip
    return y, scale


def strides(scale: Tensor | None) -> dict[str, int]:
    plane, row, group = (0, 0, 0) if scale is None else scale.stride()
    return {"scale_p": plane, "scale_r": row, "scale_g": group}
