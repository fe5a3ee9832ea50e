"""The reference: a plain twin of every op, computed in FP32 (FP64 for FP64 inputs). Slow, simple, right.

It is the oracle of every other backend and the last candidate of every choice. Shape letters as in `ops.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.contract import Contract
from moesaic.contracts.spec import RouterSpec
from moesaic.kernels.ops import OP_NAMES, AttentionBatch, KVView

CONTRACTS = tuple(
    Contract(op, "reference", frozenset({"cpu", "cuda"}), frozenset({"float32", "bfloat16", "float64"}),
             batch_invariant=op not in ("linear", "experts", "attend_paged", "attend_dense"), rank=1000)
    for op in OP_NAMES
)  # fmt: skip


def wide(x: Tensor) -> Tensor:
    """FP32, or FP64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    y_TN = wide(x_TD) @ wide(w_ND).T
    return (y_TN if bias_N is None else y_TN + wide(bias_N)).to(x_TD.dtype)


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


def silu_mul(gate_up_TI: Tensor) -> Tensor:
    gate, up = wide(gate_up_TI).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up_TI.dtype)


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    logits = wide(logits_TE)
    scores_TE = torch.softmax(logits, -1) if spec.scoring == "softmax" else torch.sigmoid(logits)
    choice_TE = scores_TE if bias_E is None else scores_TE + wide(bias_E)
    if spec.groups > 1:
        choice_TE = keep_best_groups(choice_TE, spec)
    # A stable descending sort puts equal scores in order of id; torch.topk promises no order.
    ids_TA = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_k]
    weights_TA = scores_TE.gather(1, ids_TA)
    if spec.renormalize:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
    return ids_TA.to(torch.int32), weights_TA.float() * spec.scale


def keep_best_groups(choice_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Selection scores with the experts outside the best groups at -inf (not 0: biased scores can be negative)."""
    grouped = choice_TE.view(len(choice_TE), spec.groups, spec.experts // spec.groups)
    best = grouped.topk(2, -1).values.sum(-1) if spec.group_score == "top2_sum" else grouped.amax(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_groups]
    mask = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(mask[..., None], float("-inf")).flatten(1)


def experts(x_TD: Tensor, w13_EID: Tensor, w2_EDI: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    x, out = wide(x_TD), torch.zeros_like(wide(x_TD))
    for e in range(len(w13_EID)):
        rows, places = torch.where(ids_TA == e)
        if len(rows):
            hidden = silu_mul(x[rows] @ wide(w13_EID[e]).T)
            out.index_add_(0, rows, (hidden @ wide(w2_EDI[e]).T) * weights_TA[rows, places, None].to(x.dtype))
    return out.to(x_TD.dtype)


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None) -> Tensor:  # fmt: skip
    out = q_THK.new_empty(*q_THK.shape[:2], view.value_dim)
    repeat = q_THK.shape[1] // view.kv_heads
    for s, span in enumerate(batch.spans):
        rows_LW = pool_PW[batch.slots_SL[s, : span.length]]
        k = rows_LW[:, : view.kv_heads * view.key_dim].unflatten(1, (view.kv_heads, view.key_dim))
        v = rows_LW[:, view.value_at : view.value_at + view.kv_heads * view.value_dim]
        v = v.unflatten(1, (view.kv_heads, view.value_dim))
        rows = slice(span.start, span.start + span.count)
        out[rows] = attend_dense(
            q_THK[rows], k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), scale, window
        )
    return out


def attend_dense(q_THK: Tensor, k_LHK: Tensor, v_LHV: Tensor, scale: float, window: int | None = None) -> Tensor:
    scores_HTL = torch.einsum("thk,lhk->htl", wide(q_THK), wide(k_LHK)) * scale
    scores_HTL = scores_HTL.masked_fill(~visible(len(q_THK), len(k_LHK), window, q_THK.device), float("-inf"))
    return torch.einsum("htl,lhv->thv", torch.softmax(scores_HTL, -1), wide(v_LHV)).to(q_THK.dtype)


def visible(queries: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [T, L]: may the query at position L - T + t see position l?"""
    at = torch.arange(length, device=device)
    query_at = at[length - queries :, None]
    mask = at <= query_at
    return mask if window is None else mask & (at > query_at - window)
