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

from moesaic.contracts.contract import Contract
from moesaic.contracts.spec import RouterSpec
from moesaic.kernels.cpu import choose, context, sort_rows
from moesaic.kernels.ops import AttentionBatch, KVView

FLOOR = 16
BLOCK = 256
PIECE = 1 << 14  # elements; torch splits a loop between threads from 2^15 on, at any element
CONTRACTS = tuple(
    Contract(op, "cpu_invariant", frozenset({"cpu"}), frozenset({"float32", "bfloat16"}), batch_invariant=True, rank=20)
    for op in ("linear", "silu_mul", "route", "experts", "attend_paged", "attend_dense")
)


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


def silu_mul(gate_up_TI: Tensor) -> Tensor:
    gate, up = gate_up_TI.float().chunk(2, -1)
    return in_vectors(F.silu, gate).mul_(up).to(gate_up_TI.dtype)


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    logits = logits_TE.float()
    softmax = spec.scoring == "softmax"
    return choose(torch.softmax(logits, -1) if softmax else in_vectors(torch.sigmoid, logits), bias_E, spec)


def experts(x_TD: Tensor, w13_EID: Tensor, w2_EDI: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    order_R, x_RD, counts = sort_rows(x_TD, ids_TA, len(w13_EID))
    y_RD = torch.zeros_like(x_RD)
    at = counts[0]
    for e, count in enumerate(counts[1:]):
        if count:
            rows = slice(at, at + count)
            y_RD[rows] = linear(silu_mul(linear(x_RD[rows], w13_EID[e])), w2_EDI[e])
            at += count
    back_TAD = torch.empty_like(y_RD).index_copy_(0, order_R, y_RD).view(*weights_TA.shape, x_TD.shape[1])
    total_TD = back_TAD[:, 0].float() * weights_TA[:, 0, None]
    for a in range(1, weights_TA.shape[1]):
        total_TD += back_TAD[:, a].float() * weights_TA[:, a, None]
    return total_TD.to(x_TD.dtype)


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None) -> Tensor:  # fmt: skip
    out_THV = q_THK.new_empty(*q_THK.shape[:2], view.value_dim)
    for s, span in enumerate(batch.spans):
        k_LGK, v_LGV = context(pool_PW.index_select(0, batch.slots_SL[s, : span.length]), view)
        rows = slice(span.start, span.start + span.count)
        out_THV[rows] = attend_dense(q_THK[rows], k_LGK, v_LGV, scale, window)
    return out_THV


def attend_dense(q_THK: Tensor, k_LGK: Tensor, v_LGV: Tensor, scale: float, window: int | None = None) -> Tensor:
    """As in `ops.py`; also takes fewer kv heads than query heads. Online softmax over blocks of the context."""
    (queries, heads, _), (length, groups, _) = q_THK.shape, k_LGK.shape
    repeat = heads // groups
    q_GMK = q_THK.view(queries, groups, repeat, -1).transpose(0, 1).reshape(groups, queries * repeat, -1)
    q_GMK = F.pad(q_GMK, (0, 0, 0, max(0, FLOOR - q_GMK.shape[1])))
    at_M = torch.arange(length - queries, length).repeat_interleave(repeat)
    at_M = F.pad(at_M, (0, q_GMK.shape[1] - len(at_M)), value=length - 1)
    total, out = fold_blocks(q_GMK, at_M, k_LGK, v_LGV, scale, window)
    y_GMV = (out / total)[:, : queries * repeat].to(q_THK.dtype)
    return y_GMV.view(groups, queries, repeat, -1).transpose(0, 1).reshape(queries, heads, -1)


def fold_blocks(q_GMK: Tensor, at_M: Tensor, k_LGK: Tensor, v_LGV: Tensor, scale: float,
                window: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum of exponentials, weighted values) in FP32, relative to the running maximum.

    A block hidden from a row leaves its state bit for bit as it was, so it does not matter how far beyond a query the
    context reaches.
    """
    top = torch.full((*q_GMK.shape[:2], 1), -1e30)
    total = torch.zeros_like(top)
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
