"""The reference: a plain twin of every op, computed in FP32 (FP64 for FP64 inputs). Slow, simple, right.

It is the oracle of every other backend and the last candidate of every choice. Shape letters as in `ops.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.contract import Contract, path_of
from moesaic.contracts.scheme import ENCODINGS, FORMATS, KV_FORMATS, Encoding
from moesaic.contracts.spec import Activation, RouterSpec, Scoring
from moesaic.formats import encodings, kv
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import OP_NAMES, AttentionBatch, ExpertWeights, KVView

VARIANT = ("linear", "encode", "linear_quant", "experts", "attend_paged", "attend_dense")
CONTRACTS = tuple(
    Contract(op, "reference", frozenset({"cpu", "cuda"}), frozenset({"float32", "bfloat16", "float64"}),
             batch_invariant=op not in VARIANT, rank=1000, formats=frozenset(FORMATS), encodings=frozenset(ENCODINGS),
             activations=frozenset({"silu", "swiglu_oai"}), expert_bias=True, sinks=True, kv=frozenset(KV_FORMATS),
             path=path_of(op), capturable=op not in ("experts", "attend_paged"))  # these look at values
    for op in OP_NAMES
)  # fmt: skip


def wide(x: Tensor) -> Tensor:
    """FP32, or FP64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def row_values(x: Rows) -> Tensor:
    """What the codes stand for, in FP32, or in FP64 where that is the rows' dtype."""
    values = wide(x.data) if x.encoding.name == "bf16" else x.decode()
    return values.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def weight_values(w: QuantTensor, like: Tensor) -> Tensor:
    """What a stored weight stands for, in like's dtype."""
    return (w.plain if w.form.name == "bf16" else w.dequantize()).to(like.dtype)


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    y_TN = wide(x_TD) @ wide(w_ND).T
    return (y_TN if bias_N is None else y_TN + wide(bias_N)).to(x_TD.dtype)


def encode(x_TD: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
    return encodings.encode(x_TD, encoding, scale)


def linear_quant(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    x_TD = row_values(x)
    return linear(x_TD, weight_values(w, x_TD), bias_N).to(x.dtype)


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    x = wide(x_TD)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * wide(w_D)).to(x_TD.dtype)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total_TD = x_TD + residual_TD
    return rms_norm(total_TD, w_D, eps), total_TD


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
    x = wide(x_THD)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = cos_TD[:, None].to(x.dtype), sin_TD[:, None].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_THD.dtype)


def activate(gate_up_TI: Tensor, activation: Activation) -> Tensor:
    gate, up = wide(gate_up_TI).chunk(2, -1)
    if activation.kind == "swiglu_oai":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (gate * torch.sigmoid(gate * activation.alpha) * (up + 1)).to(gate_up_TI.dtype)
    return (gate * torch.sigmoid(gate) * up).to(gate_up_TI.dtype)


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    scores_TE = scores(wide(logits_TE), spec.scoring)
    choice_TE = scores_TE if bias_E is None else scores_TE + wide(bias_E)
    if spec.groups > 1:
        choice_TE = keep_best_groups(choice_TE, spec)
    # A stable descending sort puts equal scores in order of id; torch.topk promises no order.
    ids_TA = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_k]
    weights_TA = scores_TE.gather(1, ids_TA)
    if spec.scoring == "softmax_topk":
        weights_TA = torch.softmax(weights_TA, -1)
    if spec.renormalize:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
    return ids_TA.to(torch.int32), weights_TA.float() * spec.scale


def scores(logits_TE: Tensor, scoring: Scoring) -> Tensor:
    """What experts are chosen by."""
    if scoring == "softmax_topk":
        return logits_TE
    return torch.softmax(logits_TE, -1) if scoring == "softmax" else torch.sigmoid(logits_TE)


def keep_best_groups(choice_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Selection scores with the experts outside the best groups at -inf (not 0: biased scores can be negative)."""
    grouped = choice_TE.view(len(choice_TE), spec.groups, spec.experts // spec.groups)
    best = grouped.topk(2, -1).values.sum(-1) if spec.group_score == "top2_sum" else grouped.amax(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_groups]
    mask = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(mask[..., None], float("-inf")).flatten(1)


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    rows_R, places_R = torch.where(ids_TA >= 0)
    y_RD = expert_rows(x, w, rows_R, ids_TA[rows_R, places_R])
    weighted_RD = y_RD * weights_TA[rows_R, places_R, None].to(y_RD.dtype)
    return y_RD.new_zeros(len(ids_TA), y_RD.shape[1]).index_add_(0, rows_R, weighted_RD).to(x.dtype)


def expert_rows(x: Rows, w: ExpertWeights, rows_R: Tensor, ids_R: Tensor) -> Tensor:
    """What expert ids[r] makes of row rows[r] of x, not yet rounded. -> [R, D]."""
    w.must_be("plain")
    gate_up_RJ = expert_products(row_values(x)[rows_R], w.w13, ids_R, w.biases[0] if w.biases else None)
    # Encoded all at once: a dynamic scale that spans the tensor spans every routed row.
    hidden = encode(activate(gate_up_RJ, w.activation), w.between, w.between_scale)
    return expert_products(row_values(hidden), w.w2, ids_R, w.biases[1] if w.biases else None)


def expert_products(x_RK: Tensor, w_ENK: QuantTensor, ids_R: Tensor, bias_EN: Tensor | None) -> Tensor:
    """Each row times its own expert's weight, plus its bias. -> [R, N]."""
    y_RN = x_RK.new_zeros(len(x_RK), w_ENK.shape[-2])
    for e in torch.unique(ids_R).tolist():
        at = ids_R == e
        y_RN[at] = linear(x_RK[at], weight_values(w_ENK[e], x_RK), None if bias_EN is None else bias_EN[e])
    return y_RN


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    out = q_THK.new_empty(*q_THK.shape[:2], view.value_dim)
    repeat = q_THK.shape[1] // view.kv_heads
    for s, span in enumerate(batch.spans):
        rows_LW = pool_rows(pool_PW, batch.slots_SL[s, : span.length], view).to(q_THK.dtype)
        k = rows_LW[:, : view.kv_heads * view.key_dim].unflatten(1, (view.kv_heads, view.key_dim))
        v = rows_LW[:, view.value_at : view.value_at + view.kv_heads * view.value_dim]
        v = v.unflatten(1, (view.kv_heads, view.value_dim))
        rows = slice(span.start, span.start + span.count)
        out[rows] = attend_dense(
            q_THK[rows], k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), scale, window, sinks_H
        )
    return out


def pool_rows(pool_PW: Tensor, slots: Tensor, view: KVView) -> Tensor:
    """The rows of some slots as numbers, whatever they are cached in."""
    rows = pool_PW[slots]
    return kv.decode(rows, view.parts) if pool_PW.dtype == torch.uint8 else rows


def attend_dense(q_THK: Tensor, k_LHK: Tensor, v_LHV: Tensor, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    scores_HTL = torch.einsum("thk,lhk->htl", wide(q_THK), wide(k_LHK)) * scale
    scores_HTL = scores_HTL.masked_fill(~visible(len(q_THK), len(k_LHK), window, q_THK.device), float("-inf"))
    if sinks_H is not None:
        sink_HT1 = wide(sinks_H).to(scores_HTL.dtype)[:, None, None].expand(-1, len(q_THK), 1)
        scores_HTL = torch.cat([scores_HTL, sink_HT1], -1)
    shares_HTL = torch.softmax(scores_HTL, -1)[..., : len(k_LHK)]
    return torch.einsum("htl,lhv->thv", shares_HTL, wide(v_LHV)).to(q_THK.dtype)


def visible(queries: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [T, L]: may the query at position L - T + t see position l?"""
    at = torch.arange(length, device=device)
    query_at = at[length - queries :, None]
    mask = at <= query_at
    return mask if window is None else mask & (at > query_at - window)
