"""The CPU ops whose result for a row never depends on the rows beside it: what `--deterministic` runs.

Matrix libraries pick another kernel (another order of summation) for a handful of rows; from `FLOOR` rows on, a row's
result was the same for every row count, position and thread count measured (see tests/test_invariance.py). So every
product here has at least FLOOR rows. Elementwise kernels evaluate exp in vectors, and the few elements left over one
by one, with another last bit; `in_vectors` leaves nothing over. Attention walks the context in blocks of fixed size
from position 0, whatever the length of the batch's longest context, whether the query is a prompt's or a decoded
token's. Shape letters as in `ops.py`; B is BLOCK, M padded query rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.contracts.contract import Contract, path_of
from moesaic.contracts.scheme import KV_FORMATS
from moesaic.contracts.spec import Activation, RouterSpec
from moesaic.formats.encodings import Rows
from moesaic.kernels.cpu import cached, choose, context, sort_rows
from moesaic.kernels.ops import AttentionBatch, ExpertWeights, KVView
from moesaic.kernels.reference import scores

FLOOR = 16
BLOCK = 256
PIECE = 1 << 14  # elements; torch splits a loop between threads from 2^15 on, at any element
CONTRACTS = tuple(
    Contract(op, "cpu_invariant", frozenset({"cpu"}), frozenset({"float32", "bfloat16"}), batch_invariant=True, rank=20,
             activations=frozenset({"silu", "swiglu_oai"}), expert_bias=True, sinks=True, kv=frozenset(KV_FORMATS),
             path=path_of(op))
    for op in ("linear", "activate", "route", "experts", "attend_paged", "attend_dense")
)  # fmt: skip


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    if len(x_TD) >= FLOOR:
        return F.linear(x_TD, w_ND, bias_N)
    return F.linear(F.pad(x_TD, (0, 0, 0, FLOOR - len(x_TD))), w_ND, bias_N)[: len(x_TD)]


def in_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function of an FP32 tensor, in pieces that one thread computes in whole vectors."""
    flat = x.reshape(-1)
    padded = F.pad(flat, (0, -len(flat) % 64))
    pieces = [function(piece) for piece in padded.split(PIECE)]
    return torch.cat(pieces)[: len(flat)].view(x.shape)


def activate(gate_up_TI: Tensor, activation: Activation) -> Tensor:
    gate, up = gate_up_TI.float().chunk(2, -1)
    if activation.kind == "swiglu_oai":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit) + 1
        return in_vectors(torch.sigmoid, gate * activation.alpha).mul_(gate).mul_(up).to(gate_up_TI.dtype)
    return in_vectors(F.silu, gate).mul_(up).to(gate_up_TI.dtype)


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    logits = logits_TE.float()
    sigmoid = spec.scoring == "sigmoid"
    return choose(in_vectors(torch.sigmoid, logits) if sigmoid else scores(logits, spec.scoring), bias_E, spec)


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    w.must_be("plain")
    w13_EID, w2_EDI = w.w13.plain, w.w2.plain
    order_R, x_RD, counts = sort_rows(x.data, ids_TA, len(w13_EID))
    y_RD = torch.zeros_like(x_RD)
    at = counts[0]
    for e, count in enumerate(counts[1:]):
        if count:
            rows = slice(at, at + count)
            bias13, bias2 = (w.biases[0][e], w.biases[1][e]) if w.biases else (None, None)
            y_RD[rows] = linear(activate(linear(x_RD[rows], w13_EID[e], bias13), w.activation), w2_EDI[e], bias2)
            at += count
    back_TAD = torch.empty_like(y_RD).index_copy_(0, order_R, y_RD).view(*weights_TA.shape, x_RD.shape[1])
    total_TD = back_TAD[:, 0].float() * weights_TA[:, 0, None]
    for a in range(1, weights_TA.shape[1]):
        total_TD += back_TAD[:, a].float() * weights_TA[:, a, None]
    return total_TD.to(x.dtype)


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    out_THV = q_THK.new_empty(*q_THK.shape[:2], view.value_dim)
    for s, span in enumerate(batch.spans):
        k_LGK, v_LGV = context(cached(pool_PW, batch.slots_SL[s, : span.length], view, q_THK.dtype), view)
        rows = slice(span.start, span.start + span.count)
        out_THV[rows] = attend_dense(q_THK[rows], k_LGK, v_LGV, scale, window, sinks_H)
    return out_THV


def attend_dense(q_THK: Tensor, k_LHK: Tensor, v_LHV: Tensor, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    """As in `ops.py`; also takes fewer kv heads than query heads. Online softmax over blocks of the context."""
    (queries, heads, _), (length, groups, _) = q_THK.shape, k_LHK.shape
    repeat = heads // groups
    q_GMK = q_THK.view(queries, groups, repeat, -1).transpose(0, 1).reshape(groups, queries * repeat, -1)
    q_GMK = F.pad(q_GMK, (0, 0, 0, max(0, FLOOR - q_GMK.shape[1])))
    at_M = torch.arange(length - queries, length).repeat_interleave(repeat)
    at_M = F.pad(at_M, (0, q_GMK.shape[1] - len(at_M)), value=length - 1)
    start = start_of(sinks_H, q_GMK, queries)
    total, out = fold_blocks(q_GMK, at_M, (k_LHK, v_LHV), start, scale, window)
    y_GMV = (out / total)[:, : queries * repeat].to(q_THK.dtype)
    return y_GMV.view(groups, queries, repeat, -1).transpose(0, 1).reshape(queries, heads, -1)


def start_of(sinks_H: Tensor | None, q_GMK: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """(running maximum, sum of exponentials) before any key, [G, M, 1]: nothing, or the sink of each head."""
    groups, rows = q_GMK.shape[:2]
    if sinks_H is None:
        top_GM1 = torch.full((groups, rows, 1), -1e30)
        return top_GM1, torch.zeros_like(top_GM1)
    sinks_GM = sinks_H.float().view(groups, -1).repeat(1, queries)
    top_GM1 = F.pad(sinks_GM, (0, rows - sinks_GM.shape[1]))[..., None]
    return top_GM1, torch.ones_like(top_GM1)


def fold_blocks(q_GMK: Tensor, at_M: Tensor, keys_values: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor],
                scale: float, window: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum of exponentials, weighted values) in FP32, relative to the running maximum.

    A block hidden from a row leaves its state bit for bit as it was, so it does not matter how far beyond a query the
    context reaches.
    """
    (k_LGK, v_LGV), (top, total) = keys_values, start
    out = torch.zeros(*q_GMK.shape[:2], v_LGV.shape[-1])
    for begin in range(0, len(k_LGK), BLOCK):
        k_GBK, v_GBV = (whole_block(x[begin : begin + BLOCK]) for x in (k_LGK, v_LGV))
        at_B = torch.arange(begin, begin + BLOCK)
        seen_MB = at_B <= at_M[:, None]
        if window is not None:
            seen_MB &= at_B > at_M[:, None] - window
        scores = torch.bmm(q_GMK, k_GBK.transpose(1, 2)).float() * scale
        scores = scores.masked_fill(~seen_MB, float("-inf"))
        peak = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, fade = in_vectors(torch.exp, scores - peak), in_vectors(torch.exp, top - peak)
        total = total * fade + weights.sum(-1, keepdim=True)
        out = out * fade + torch.bmm(weights.to(v_GBV.dtype), v_GBV).float()
        top = peak
    return total, out


def whole_block(x_LGK: Tensor) -> Tensor:
    """[L <= BLOCK, G, K] -> [G, BLOCK, K], zeros after L."""
    return F.pad(x_LGK, (0, 0, 0, 0, 0, BLOCK - len(x_LGK))).transpose(0, 1).contiguous()
