"""Quantised products on a CPU: weights stay codes in memory, and are decoded tile by tile as they are multiplied.

Products accumulate in FP32, the factors of a row, a channel or a tensor and biases are applied to what came out, and
that is rounded once. Where both operands are BF16 numbers (MX; rows of a BF16 model), the result is rounded to BF16
anyway and there is nothing to apply, BF16 units multiply: the same number, up to the order of summation.

Experts: rows sorted by expert; touched experts are decoded a few at a time. Between the two products everything is
FP32, so that the codes of what is encoded there are the reference's.

A row's result does not depend on the rows beside it (see `cpu_invariant.py` for how), as far as its codes do not:
those of `fp8_tensor` with a dynamic scale do (`Encoding.by_row`).

Letters as in `ops.py`; R routed rows, sorted by expert, G of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.contracts.contract import FLOATS16, Contract, path_of
from moesaic.contracts.scheme import Encoding
from moesaic.formats import encodings
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels import cpu_invariant
from moesaic.kernels.cpu_decode import (
    ROWS,
    WEIGHTS,
    Decoded,
    decode_rows,
    experts_at_once,
    in_bf16,
    row_tiles,
    take_experts,
    take_rows,
)
from moesaic.kernels.cpu_invariant import FLOOR
from moesaic.kernels.ops import ExpertWeights

CONTRACTS = tuple(
    Contract(op, "cpu_quant", frozenset({"cpu"}), FLOATS16, batch_invariant=True, rank=30,
             formats=frozenset(WEIGHTS), encodings=frozenset(ROWS),
             activations=frozenset({"silu", "swiglu_oai"}), expert_bias=True, path=path_of(op))
    for op in ("encode", "linear_quant", "experts")
)  # fmt: skip


def encode(x_TD: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
    return encodings.encode(x_TD, encoding, scale)


def linear_quant(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    decoder, dtype = WEIGHTS[w.form.name], operand_dtype(x, w, bias_N, x.dtype)
    values_TK, factor_T1 = decode_rows(x)
    x_TK, factor_N = values_TK.to(dtype), decoder.factor(w)
    # Made first: small results that outlive their tile would lie between large temporaries, and keep the heap growing.
    y_TN = x_TK.new_empty(len(x_TK), w.shape[-2], dtype=x.dtype)
    for rows in row_tiles(w):
        part_TN = cpu_invariant.linear(x_TK, decoder.tile(w, rows).to(dtype))
        y_TN[:, rows] = finish(part_TN, (factor_T1, columns(factor_N, rows)), columns(bias_N, rows))
    return y_TN


def operand_dtype(x: Rows, w: QuantTensor, bias: Tensor | None, out: torch.dtype) -> torch.dtype:
    """BF16 where it holds both operands, and the product is rounded to it with nothing applied before."""
    exact = out == torch.bfloat16 and bias is None and WEIGHTS[w.form.name].bf16 and in_bf16(x)
    return torch.bfloat16 if exact else torch.float32


def columns(each_N: Tensor | None, rows: slice) -> Tensor | None:
    """What belongs to the output columns of a tile; one number for all stays."""
    return each_N if each_N is None or each_N.numel() == 1 else each_N[rows]


def finish(part_TN: Tensor, factors: tuple[Tensor | None, Tensor | None], bias_N: Tensor | None) -> Tensor:
    """Multiplies a product, in place, with what its rows and its columns have in common, and adds the bias."""
    for factor in factors:
        if factor is not None:
            part_TN.mul_(factor)
    return part_TN if bias_N is None else part_TN.add_(bias_N)


# --- experts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one touched expert among those sorted by expert."""

    expert: int
    rows: slice


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    w.must_be("plain")
    order_R, spans = sort_rows(ids_TA)
    values_TD, factor_T1 = decode_rows(x)
    token_R = order_R // ids_TA.shape[1]
    bias13, bias2 = w.biases or (None, None)

    def routed(rows: slice) -> Decoded:
        return values_TD.index_select(0, token_R[rows]), pick(factor_T1, token_R[rows])

    hidden_RI = torch.empty(len(order_R), w.w2.columns)
    for rows, gate_up in products(routed, w.w13, spans, bias13, torch.float32):
        hidden_RI[rows] = cpu_invariant.activate(gate_up, w.activation)
    between = encode(hidden_RI, w.between, w.between_scale)
    dtype = operand_dtype(between, w.w2, bias2, x.dtype)
    y_RD = torch.empty(len(order_R), w.w2.shape[-2], dtype=x.dtype)
    for rows, y_GD in products(lambda rows: decode_rows(take_rows(between, rows)), w.w2, spans, bias2, dtype):
        y_RD[rows] = y_GD
    return weigh_and_sum(y_RD, order_R, weights_TA)


def products(rows_of: Callable[[slice], Decoded], w: QuantTensor, spans: list[Span], bias_EN: Tensor | None,
             dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """(rows, their products [G, N]) of as many experts at a time as a decoded tile holds. dtype: of the operands."""
    step = experts_at_once(w)
    for first in range(0, len(spans), step):
        group = spans[first : first + step]
        rows = slice(group[0].rows.start, group[-1].rows.stop)
        values_GK, factor_G1 = rows_of(rows)
        yield rows, group_products((values_GK.to(dtype), factor_G1), w, group, bias_EN)


def group_products(x: Decoded, w: QuantTensor, group: list[Span], bias_EN: Tensor | None) -> Tensor:
    (x_GK, factor_G1), first, decoder = x, group[0].rows.start, WEIGHTS[w.form.name]
    codes = take_experts(w, [span.expert for span in group])
    y_GN = x_GK.new_empty(len(x_GK), w.shape[-2])
    for tile in row_tiles(w):
        wide_ENK = decoder.tile(codes, tile).to(x_GK.dtype)
        for span, wide_NK in zip(group, wide_ENK, strict=True):
            rows = slice(span.rows.start - first, span.rows.stop - first)
            if rows.stop - rows.start >= FLOOR:
                torch.mm(x_GK[rows], wide_NK.t(), out=y_GN[rows, tile])
            else:
                y_GN[rows, tile] = cpu_invariant.linear(x_GK[rows], wide_NK)
    of_G = torch.repeat_interleave(torch.tensor([span.rows.stop - span.rows.start for span in group]))
    bias_GN = None if bias_EN is None else bias_EN[[span.expert for span in group]].index_select(0, of_G)
    return finish(y_GN, (factor_G1, pick(decoder.factor(codes), of_G)), bias_GN)


def pick(factor: Tensor | None, index: Tensor) -> Tensor | None:
    """The factors of some rows or experts; one number for all stays."""
    return factor if factor is None or factor.ndim == 0 else factor.index_select(0, index)


def sort_rows(ids_TA: Tensor) -> tuple[Tensor, list[Span]]:
    """(indices into the flattened ids, sorted by expert, without those of no expert; the span of each touched one)."""
    flat = ids_TA.reshape(-1)
    padding, *counts = torch.bincount(flat + 1, minlength=1).tolist()
    spans, at = [], 0
    for expert, count in enumerate(counts):
        if count:
            spans.append(Span(expert, slice(at, at + count)))
            at += count
    return flat.argsort(stable=True)[padding:], spans


def weigh_and_sum(y_RD: Tensor, order_R: Tensor, weights_TA: Tensor) -> Tensor:
    """Rows in expert order -> token order, weighted and reduced over A in FP32, always in the order of the choices."""
    tokens, top_k = weights_TA.shape
    flat = y_RD.new_zeros(tokens * top_k, y_RD.shape[1]).index_copy_(0, order_R, y_RD)
    back_TAD = flat.view(tokens, top_k, y_RD.shape[1])
    total_TD = back_TAD[:, 0].float() * weights_TA[:, 0, None]
    for a in range(1, top_k):
        total_TD += back_TAD[:, a].float() * weights_TA[:, a, None]
    return total_TD.to(y_RD.dtype)
