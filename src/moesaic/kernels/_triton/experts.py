"""The experts of a layer: sort -> first product, bias and activation -> encode -> second product -> weighted sum.

Gate and up rows of the first weight alternate within a tile, so that both halves of an element meet in one program and
the activation costs no pass of its own. Its result is FP32 where it is encoded afterwards (rounded once), else BF16.
The sum over a token's experts is taken in FP32, in the order of its choices: repeatable, without atomics.

Letters as in gemm.py; R sorted rows, A experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.spec import Activation
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.activate import join
from moesaic.kernels._triton.encode import encode_rows
from moesaic.kernels._triton.gemm import across, along, operands, product, scale_rows, tile_of
from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.sort import Blocks, single, slots, sort
from moesaic.kernels.ops import ExpertWeights

PROGRAMS = 132
"""Multiprocessors of a Hopper GPU."""


@triton.jit
def expert_kernel(x_ptr, x_stride, xs_ptr, xs_stride, w_ptr, w_expert, w_stride, ws_ptr, ws_expert, ws_stride,
                  zero_ptr, top_ptr, segments, map_ptr, bias_ptr, y_ptr, y_stride, expert_ptr, first_ptr, last_ptr,
                  order_ptr, N, TOP_K: tl.constexpr, UP: tl.constexpr, OAI: tl.constexpr, LIMIT: tl.constexpr,
                  ALPHA: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
                  X_GROUPS: tl.constexpr, X_ROWS: tl.constexpr, EIGHT: tl.constexpr, FLIP: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """UP: the first product, from token rows to sorted rows; otherwise the second, to the rows' places before sorting.

    order_ptr None: rows stay where they are (slots).
    """
    block, tile = tl.program_id(1), tl.program_id(0)
    e = tl.load(expert_ptr + block).to(tl.int64)
    if e < 0:
        return
    r = tl.load(first_ptr + block) + tl.arange(0, BM)
    ok = r < tl.load(last_ptr + block)
    place = r.to(tl.int64) if order_ptr is None else tl.load(order_ptr + r, ok, 0).to(tl.int64)
    source = place // TOP_K if UP else r.to(tl.int64)
    i = tl.arange(0, BN)
    if UP:
        HALF = N // 2
        column = tile * (BN // 2) + i // 2
        n_ok, n = column < HALF, ((i % 2) * HALF + column).to(tl.int64)
    else:
        n_ok, n = tile * BN + i < N, (tile * BN + i).to(tl.int64)
    coarse = n if map_ptr is None else tl.load(map_ptr + n, n_ok, 0).to(tl.int64)
    ws_at = e * ws_expert + (n if FORMAT == "nvfp4" else coarse) * ws_stride
    ws_row = None if ws_ptr is None else ws_ptr + ws_at
    zero_row = None if zero_ptr is None else zero_ptr + ws_at
    top_row = None if top_ptr is None else top_ptr + e * segments + coarse
    xs_row = None if xs_ptr is None else xs_ptr + source * xs_stride
    ws_pair = None
    if FORMAT == "fp8_block":  # a tile lies within one block of rows, of gate and of up
        block_row, base = tile * (BN // 2 if UP else BN) // 128, ws_ptr + e * ws_expert
        odd_row = block_row + (N // 2 + 127) // 128 if UP else block_row
        ws_pair = (base + block_row * ws_stride, base + odd_row * ws_stride)
    acc = product(x_ptr + source * x_stride, ok, xs_row, w_ptr + e * w_expert + n * w_stride, n_ok, ws_row, ws_pair,
                  zero_row, 0, K, K, FORMAT, GROUP, X_GROUPS, EIGHT, FLIP, BM, BN, BK)  # fmt: skip
    acc = scale_rows(acc, ws_row, top_row, n_ok, xs_ptr, xs_row, ok, FORMAT, X_GROUPS, X_ROWS, EIGHT,
                     FLIP)  # fmt: skip
    if bias_ptr is not None:
        acc += along(tl.load(bias_ptr + e * N + n, n_ok, 0.0).to(tl.float32), FLIP)
    if UP:
        acc = activated(acc, OAI, LIMIT, ALPHA, FLIP, BM, BN)
        half = tile * (BN // 2) + tl.arange(0, BN // 2)
        n, n_ok, row = half.to(tl.int64), half < N // 2, r.to(tl.int64)
    else:
        row = place
    at = across(row * y_stride, FLIP) + along(n, FLIP)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), across(ok, FLIP) & along(n_ok, FLIP))


@triton.jit
def activated(acc, OAI: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, FLIP: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr):  # fmt: skip
    """Gate and up alternate along the weight rows of the tile: half as many are left."""
    if FLIP:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BN // 2, 2, BM]), (0, 2, 1)))
    else:
        gate, up = tl.split(tl.reshape(acc, [BM, BN // 2, 2]))
    return join(gate, up, OAI, LIMIT, ALPHA)


@triton.jit
def combine_kernel(y_ptr, ids_ptr, weights_ptr, out_ptr, D, A: tl.constexpr, BLOCK: tl.constexpr):
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for a in range(A):
        chosen = tl.load(ids_ptr + t * A + a) >= 0
        y = tl.load(y_ptr + (t * A + a) * D + d, (d < D) & chosen, 0.0).to(tl.float32)
        total += tl.where(chosen, tl.load(weights_ptr + t * A + a), 0.0) * y
    tl.store(out_ptr + t * D + d, total.to(out_ptr.dtype.element_ty), d < D)


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    out = torch.empty(len(ids_TA), w.w2.shape[-2], dtype=x.dtype, device=x.data.device)
    if not ids_TA.numel():
        return out
    ids = ids_TA.contiguous()
    return combine(expert_rows(x, w, ids), ids, weights_TA.contiguous(), out)


def expert_rows(x: Rows, w: ExpertWeights, ids_TA: Tensor) -> Tensor:
    """What expert ids[t, a] makes of row t, at t A + a; undefined for ids of -1. At least one row. -> [R, D]."""
    w.must_be("plain")
    blocks = blocks_of(ids_TA, w)
    hidden = first_product(x, w, blocks, ids_TA.shape[1])
    return second_product(encode_rows(hidden, w.between, w.between_scale, blocks.total, x.dtype), w, blocks)


def blocks_of(ids_TA: Tensor, w: ExpertWeights) -> Blocks:
    """A single token needs no sorting, unless a scale in between spans all rows: then none may hold just anything."""
    experts_ = w.w13.shape[0]
    height = height_of(ids_TA.numel(), experts_)
    if len(ids_TA) == 1 and (w.between.name != "fp8_tensor" or w.between.static):
        return single(ids_TA, height)
    return sort(ids_TA, experts_, height)


def experts_slotted(x: Rows, w: ExpertWeights, counts_E: Tensor) -> Tensor:
    """Layout `slotted`: rows [E, C, D] of which the first counts[e] are in use -> [E, C, D] in x.dtype, unweighted.

    Rows behind counts[e] of the result are undefined. A dynamic tensor-wide scale in between has no meaning over slots.
    """
    experts_, capacity = x.data.shape[:2]
    blocks = slots(counts_E, capacity, height_of(experts_ * capacity, experts_))
    hidden = first_product(x, w, blocks, 1)
    rows = encode_rows(hidden, w.between, w.between_scale, None, x.dtype)
    return second_product(rows, w, blocks).view(experts_, capacity, -1)


def first_product(x: Rows, w: ExpertWeights, blocks: Blocks, top_k: int) -> Tensor:
    """Activated rows in sorted order [R, I]: FP32 if they are encoded next."""
    plain = w.between.name == "bf16"
    y = torch.empty(blocks.rows, w.w2.columns, dtype=x.dtype if plain else torch.float32, device=x.data.device)
    multiply(x, w.w13, w.biases[0] if w.biases else None, blocks, y, top_k, w.activation)
    return y


def second_product(x: Rows, w: ExpertWeights, blocks: Blocks) -> Tensor:
    """Sorted rows [R, I] -> [R, D] in the rows' places before sorting. Rows that were in no list are undefined."""
    y = torch.empty(blocks.rows, w.w2.shape[-2], dtype=x.dtype, device=x.data.device)
    multiply(x, w.w2, w.biases[1] if w.biases else None, blocks, y, 1, None)
    return y


def multiply(x: Rows, w: QuantTensor, bias_EN: Tensor | None, blocks: Blocks, y: Tensor, top_k: int,
             activation: Activation | None) -> None:  # fmt: skip
    """activation: of the first product, which has one; None for the second."""
    n, given, up = w.shape[-2], operands(x, w), activation is not None
    how = activation or Activation()
    tile = tile_of(blocks.height, given, few=len(blocks.expert_B) * n <= PROGRAMS * 128)
    expert_kernel[(cdiv(n, tile.bn), len(blocks.expert_B))](
        **given.pointers, bias_ptr=bias_EN, y_ptr=y, y_stride=y.stride(0), expert_ptr=blocks.expert_B,
        first_ptr=blocks.first_B, last_ptr=blocks.last_B, order_ptr=blocks.order_R, N=n,
        TOP_K=top_k, UP=up, OAI=how.kind == "swiglu_oai",
        LIMIT=how.limit, ALPHA=how.alpha, **tile.arguments(), **given.constants,
    )  # fmt: skip


def combine(y_RD: Tensor, ids_TA: Tensor, weights_TA: Tensor, out_TD: Tensor) -> Tensor:
    """Writes sum over a of weights[t, a] y[t A + a] where ids[t, a] >= 0; returns out."""
    (tokens, top_k), size = ids_TA.shape, out_TD.shape[1]
    block = min(power(size), 1024)
    combine_kernel[(tokens, cdiv(size, block))](
        y_RD, ids_TA, weights_TA, out_TD, size, A=top_k, BLOCK=block, num_warps=max(1, block // 256)
    )
    return out_TD


def height_of(rows: int, experts_: int) -> int:
    """BM: half as many again as an expert's mean, so that most experts fit one block; 128 only where the mean is over
    64 (measured)."""
    mean = cdiv(rows, max(1, experts_))
    return min(max(power(cdiv(3 * mean, 2)), 16), 64 if mean <= 64 else 128)
