"""Rows of tokens, as often as they were routed, into their places (place.py).

Scales of groups come out *transposed*: [P, G] with P dense, as kernels want them that load a column of them at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.launch import as_bytes, cdiv, power
from moesaic.kernels._triton.place import Places


@triton.jit
def gather_kernel(x_ptr, x_stride, scale_ptr, scale_stride, y_ptr, out_ptr, place_ptr, P, TOP_K: tl.constexpr,
                  K: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, BG: tl.constexpr):  # fmt: skip
    """A program copies a share of one token's row to all its places."""
    t, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BK + tl.arange(0, BK)
    g = tl.arange(0, BG)
    groups_ok = (g < G) & (tl.program_id(1) == 0)
    x = tl.load(x_ptr + t * x_stride + k, k < K)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + t * scale_stride + g, groups_ok, 0.0)
    for a in range(TOP_K):
        place = tl.load(place_ptr + t * TOP_K + a).to(tl.int64)
        tl.store(y_ptr + place * K + k, x, (k < K) & (place >= 0))
        if scale_ptr is not None:
            tl.store(out_ptr + g.to(tl.int64) * P + place, scale, groups_ok & (place >= 0))


def gather(x_TK: Tensor, scale_TG: Tensor | None, places: Places) -> tuple[Tensor, Tensor | None]:
    """-> rows [P, K] and their scales FP32 [P, G] (transposed). What is in no place is left undefined."""
    tokens, size = x_TK.shape
    x = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    y = x.new_empty(places.count, size)
    scale, out = scale_TG, None
    if scale is not None:
        scale = scale if scale.stride(1) == 1 else scale.contiguous()
        out = scale.new_empty(scale.shape[1], places.count).t()
    source, target = (as_bytes(each) if each.element_size() == 1 else each for each in (x, y))
    block, groups = min(power(size), 4096), 1 if scale is None else scale.shape[1]
    gather_kernel[(tokens, cdiv(size, block))](
        source, x.stride(0), scale, 0 if scale is None else scale.stride(0), target, out, places.place_R, places.count,
        TOP_K=len(places.place_R) // tokens, K=size, BK=block, G=groups, BG=power(groups),
        num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return y, out


@triton.jit
def transpose_kernel(scale_ptr, scale_stride, out_ptr, P, M, G, BM: tl.constexpr, BG: tl.constexpr):
    m, g = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BG + tl.arange(0, BG)
    ok = (m < M)[:, None] & (g < G)[None, :]
    scale = tl.load(scale_ptr + m.to(tl.int64)[:, None] * scale_stride + g[None, :], ok, 0.0)
    tl.store(out_ptr + g.to(tl.int64)[None, :] * P + m[:, None], scale, ok)


def transposed(scale_MG: Tensor) -> Tensor:
    """FP32 scales [M, G] in memory of [G, M'], M' being M rounded up to 16 bytes; as they are where they lie so."""
    rows, groups = scale_MG.shape
    padded = cdiv(rows, 4) * 4
    if scale_MG.stride() == (1, padded):
        return scale_MG
    scale = scale_MG if scale_MG.stride(1) == 1 else scale_MG.contiguous()
    out = scale.new_empty(groups, padded).t()[:rows]
    transpose_kernel[(cdiv(rows, 32), cdiv(groups, 32))](
        scale, scale.stride(0), out, padded, rows, groups, BM=32, BG=32, num_warps=4
    )
    return out
