"""The weighted sum of a token's experts, from rows that lie at places (place.py) or at the rows' own numbers.

In FP32, in the order of the choices: repeatable, without atomics. What the second product did not know of is applied
first: bias, the weight's tensor-wide scale, the rows' own scales.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.join_rows import NONE, Extras
from moesaic.kernels._triton.launch import cdiv, power


@triton.jit
def weigh_kernel(y_ptr, ids_ptr, weights_ptr, place_ptr, out_ptr, bias_ptr, top_ptr, row_ptr, D, A: tl.constexpr,
                 PER_ROW: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for a in range(A):
        r = t * A + a
        e = tl.load(ids_ptr + r)
        ok = (d < D) & (e >= 0)
        at = r if place_ptr is None else tl.load(place_ptr + r).to(tl.int64)
        y = tl.load(y_ptr + at * D + d, ok, 0.0).to(tl.float32)
        expert = tl.maximum(e, 0).to(tl.int64)
        if top_ptr is not None:
            y *= tl.load(top_ptr + expert)
        if row_ptr is not None:
            y *= tl.load(row_ptr + r, e >= 0, 0.0) if PER_ROW else tl.load(row_ptr)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + expert * D + d, ok, 0.0).to(tl.float32)
        total += tl.where(e >= 0, tl.load(weights_ptr + r), 0.0) * y
    tl.store(out_ptr + t * D + d, total.to(out_ptr.dtype.element_ty), d < D)


def weigh(y_PD: Tensor, ids_TA: Tensor, weights_TA: Tensor, places_R: Tensor | None,
          extras: Extras = NONE) -> Tensor:  # fmt: skip
    """sum over a of weights[t, a] y[row of (t, a)], over ids >= 0. -> [T, D]. extras: top [E, 1], row [R, 1] or []."""
    (tokens, top_k), size = ids_TA.shape, y_PD.shape[1]
    out = y_PD.new_empty(tokens, size)
    block = min(power(size), 1024)
    weigh_kernel[(tokens, cdiv(size, block))](
        y_PD, ids_TA, weights_TA, places_R, out, extras.bias, extras.top, extras.row, size, A=top_k,
        PER_ROW=extras.row is not None and extras.row.numel() > 1, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return out
