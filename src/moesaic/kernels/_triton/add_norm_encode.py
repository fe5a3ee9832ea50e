"""Sum with the residual, RMS norm, and the norm's rows in the encoding in which they are multiplied next: one pass.

A row per program. The rows may come as FP32 terms of a sum [P, T, D] (a product whose K was shared out), or as the
results of a token's experts with their weights: they are added up here, in order, and need no kernel of their own. A
sum of experts is rounded where a kernel of its own would have stored it, so that nothing depends on who adds it up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.emit import emit_row, emitting, parts_for, rows_of
from moesaic.kernels._triton.pdl import options, wait
from moesaic.kernels.ops import ExpertTerms

PER_WARP = 128
"""Elements of a row for which there is a warp, up to 16 of these. A row takes as long as a thread's instructions."""
REGISTERS = 128
"""That a thread may have for the rows of experts: left alone, the assembler saves some by waiting for row after row."""


@triton.jit
def sum_of_experts(x_ptr, x_part, ids_ptr, weights_ptr, d, ok, A: tl.constexpr):
    """As `combine_kernel` in experts.py. No row waits for its id: all are on their way at once. What lies in the row of
    an id of -1 is dropped, whatever it is."""
    rows, ids, weights = (), (), ()
    for a in tl.static_range(A):
        rows += (tl.load(x_ptr + a * x_part + d, ok, 0.0),)  # type: ignore[assignment]
        ids += (tl.load(ids_ptr + a),)  # type: ignore[assignment]
        weights += (tl.load(weights_ptr + a),)  # type: ignore[assignment]
    total = tl.zeros(d.shape, tl.float32)
    for a in tl.static_range(A):
        y, weight = tl.where(ids[a] >= 0, rows[a].to(tl.float32), 0.0), tl.where(ids[a] >= 0, weights[a], 0.0)
        total += weight * y
    return total.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def add_norm_encode_kernel(x_ptr, x_part, x_row, ids_ptr, weights_ptr, onto_ptr, residual_ptr, w_ptr, y_ptr, sum_ptr,
                           eps, data_ptr, scale_ptr, exact_ptr, top_ptr, P: tl.constexpr, D: tl.constexpr,
                           ENCODING: tl.constexpr, STATIC: tl.constexpr, BG: tl.constexpr, S: tl.constexpr,
                           PDL: tl.constexpr):  # fmt: skip
    r, g = tl.program_id(0).to(tl.int64), tl.arange(0, BG)
    d = g[:, None] * S + tl.arange(0, S)[None, :]
    ok = d < D
    w = tl.load(w_ptr + d, ok, 0.0).to(tl.float32)
    wait(PDL)
    residual = None if residual_ptr is None else tl.load(residual_ptr + r * D + d, ok, 0.0).to(tl.float32)
    if weights_ptr is not None:
        x = sum_of_experts(x_ptr + r * x_row, x_part, ids_ptr + r * P, weights_ptr + r * P, d, ok, P)
        if onto_ptr is not None:
            x += tl.load(onto_ptr + r * D + d, ok, 0.0).to(tl.float32)
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    else:
        x = tl.load(x_ptr + r * x_row + d, ok, 0.0).to(tl.float32)
        for p in tl.static_range(1, P):
            x += tl.load(x_ptr + p * x_part + r * x_row + d, ok, 0.0).to(tl.float32)
    if residual_ptr is not None:
        x += residual
    if sum_ptr is not None:
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)  # the norm is of the sum as it is stored
        tl.store(sum_ptr + r * D + d, x.to(sum_ptr.dtype.element_ty), ok)
    factor = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / D + eps)
    y = (x * factor * w).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + r * D + d, y, ok)
    emit_row(y.to(tl.float32), r, g, data_ptr, scale_ptr, exact_ptr, top_ptr, D, ENCODING, STATIC, BG, S)


def add_norm_encode(x: Tensor | ExpertTerms, residual_TD: Tensor | None, w_D: Tensor, eps: float, encoding: Encoding,
                    scale: Tensor | None = None) -> tuple[Tensor, Rows, Tensor]:  # fmt: skip
    terms, further = terms_of(x)
    parts, tokens, size = terms.shape
    y = w_D.new_empty(tokens, size)
    total = x if isinstance(x, Tensor) and x.dim() == 2 and residual_TD is None else torch.empty_like(y)
    residual = None if residual_TD is None else residual_TD.contiguous()
    stored = {} if encoding.name == "bf16" else parts_for(encoding, tokens, size, y, scale)
    if y.numel():
        how = emitting(encoding, stored, size)
        room = {"maxnreg": REGISTERS} if isinstance(x, ExpertTerms) else {}
        add_norm_encode_kernel[(tokens,)](
            terms, terms.stride(0), terms.stride(1), *further, residual, w_D, y, None if total is x else total, eps,
            P=parts, D=size, num_warps=min(16, max(1, how["BG"] * how["S"] // PER_WARP)), **how, **room,
            **options(y.device),
        )  # fmt: skip
    return y, rows_of(encoding, stored, y), total


def terms_of(x: Tensor | ExpertTerms) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(terms [P, T, D], ids and weights of experts and what is added to their sum)."""
    if isinstance(x, ExpertTerms):
        onto = None if x.onto_TD is None else x.onto_TD.contiguous()
        return x.y_RD.view(*x.ids_TA.shape, x.y_RD.shape[1]).transpose(0, 1), (x.ids_TA, x.weights_TA, onto)
    terms = x if x.dim() == 3 else x[None]
    return terms if terms.stride(2) == 1 else terms.contiguous(), (None, None, None)
