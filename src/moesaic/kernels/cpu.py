"""The CPU backend: torch's own fused and threaded kernels, arranged so that few of them run.

Experts: rows sorted by expert, one GEMM pair per touched expert. Decode attention: one gather of pool rows, two batched
products. Matrix products go to oneDNN / MKL, which use AVX-512 BF16 (or AMX) for BF16 where the chip has it.
Shape letters as in `ops.py`; R is T x A routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.contracts.contract import Contract, path_of
from moesaic.contracts.scheme import KV_FORMATS, Encoding
from moesaic.contracts.spec import Activation, RouterSpec
from moesaic.formats import kv
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import AttentionBatch, Context, ExpertWeights, KVView
from moesaic.kernels.reference import keep_best_groups, scores, visible

PADDING = 2.5
"""Rows computed over rows wanted, up to which batched products beat one by one (measured: two cores, width 128)."""
ROW_WISE = ("rms_norm", "add_rms_norm", "rotate")
BATCHED = ("linear", "activate", "route", "experts", "attend_paged", "attend_dense")
CONTRACTS = (
    *(Contract(op, "cpu", frozenset({"cpu"}), frozenset({"float32", "bfloat16"}), batch_invariant=op in ROW_WISE,
               rank=10, activations=frozenset({"silu", "swiglu_oai"}), expert_bias=True, sinks=True,
               kv=frozenset(KV_FORMATS), path=path_of(op))
      for op in ROW_WISE + BATCHED),
    Contract("encode", "cpu", frozenset({"cpu"}), frozenset({"float32", "bfloat16"}), batch_invariant=True, rank=10),
)  # fmt: skip
TAPED = frozenset({"encode"})
PLAIN = Encoding("bf16")


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return F.linear(x_TD, w_ND, bias_N)


def encode(x_TD: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
    """Only `bf16`: the rows as they are."""
    return Rows(PLAIN, {"data": x_TD}, x_TD.dtype)


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    if x_TD.dtype != torch.float32:
        return F.rms_norm(x_TD, (x_TD.shape[-1],), w_D, eps)
    # Half the passes of torch's own composition: x^2 is never written, and sqrt(D) goes into the small factor.
    size = x_TD.shape[-1]
    norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
    y_TD: Tensor = norm_T1.square_().div_(size).add_(eps).rsqrt_() * x_TD * w_D
    return y_TD


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total_TD = x_TD + residual_TD
    return rms_norm(total_TD, w_D, eps), total_TD


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    first, second = (x_THD[..., 0::2], x_THD[..., 1::2]) if interleaved else x_THD.chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned if turned.dtype == x_THD.dtype else turned.to(x_THD.dtype)


def activate(gate_up_TI: Tensor, activation: Activation) -> Tensor:
    half = gate_up_TI.shape[-1] // 2
    if activation.kind == "swiglu_oai":
        gate = gate_up_TI[..., :half].float().clamp_(max=activation.limit)
        up = gate_up_TI[..., half:].float().clamp_(-activation.limit, activation.limit)
        return gate.mul_(torch.sigmoid(gate * activation.alpha)).mul_(up.add_(1)).to(gate_up_TI.dtype)
    if gate_up_TI.dtype == torch.float32:
        return F.silu(gate_up_TI[..., :half]).mul_(gate_up_TI[..., half:])
    wide = gate_up_TI.float()  # rounded once, not after each of three operations
    return F.silu(wide[..., :half]).mul_(wide[..., half:]).to(gate_up_TI.dtype)


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    return choose(scores(logits_TE.float(), spec.scoring), bias_E, spec)


def choose(scores_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Scores -> (ids INT32 [T, A], weights FP32 [T, A]); nothing here looks beyond a row."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if spec.groups > 1:
        choice_TE = keep_best_groups(choice_TE, spec)
    ids_TA = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_k]
    weights_TA = scores_TE.gather(1, ids_TA)
    if spec.scoring == "softmax_topk":
        weights_TA = torch.softmax(weights_TA, -1)
    if spec.renormalize:
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True).add_(1e-20)
    if spec.scale != 1.0:
        weights_TA = weights_TA * spec.scale
    return ids_TA.to(torch.int32), weights_TA


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    w.must_be("plain")
    experts_ = len(w.w13.plain)
    order_R, x_RD, counts = sort_rows(x.data, ids_TA, experts_)
    padded = 0 < max(counts[1:]) * experts_ <= PADDING * len(x_RD)
    y_RD = padded_experts(x_RD, w, counts) if padded else touched_experts(x_RD, w, counts)
    return weigh_and_sum(y_RD, order_R, weights_TA)


def touched_experts(x_RD: Tensor, w: ExpertWeights, counts: list[int]) -> Tensor:
    """One GEMM pair per expert that has rows."""
    w13_EID, w2_EDI, y_RD = w.w13.plain, w.w2.plain, torch.empty_like(x_RD)
    at = counts[0]
    y_RD[:at] = 0
    for e, count in enumerate(counts[1:]):
        if count:
            rows = slice(at, at + count)
            bias13, bias2 = (w.biases[0][e], w.biases[1][e]) if w.biases else (None, None)
            hidden = activate(F.linear(x_RD[rows], w13_EID[e], bias13), w.activation)
            torch.mm(hidden, w2_EDI[e].t(), out=y_RD[rows])
            if bias2 is not None:
                y_RD[rows] += bias2
            at += count
    return y_RD


def padded_experts(x_RD: Tensor, w: ExpertWeights, counts: list[int]) -> Tensor:
    """Two batched GEMMs over all experts, each padded to the busiest: more arithmetic, but all threads work at once."""
    counts_E = torch.tensor(counts[1:])
    busiest, first_E = max(counts[1:]), counts_E.cumsum(0) - counts_E
    place_R = torch.arange(len(x_RD) - counts[0])
    expert_R = torch.repeat_interleave(counts_E)
    place_R += expert_R * busiest - first_E.index_select(0, expert_R)
    x_ECD = x_RD.new_zeros(len(counts_E) * busiest, x_RD.shape[1]).index_copy_(0, place_R, x_RD[counts[0] :])
    gate_up = torch.bmm(x_ECD.view(len(counts_E), busiest, -1), w.w13.plain.transpose(1, 2))
    if w.biases:
        gate_up += w.biases[0][:, None]
    y_ECD = torch.bmm(activate(gate_up, w.activation), w.w2.plain.transpose(1, 2))
    if w.biases:
        y_ECD += w.biases[1][:, None]
    return F.pad(y_ECD.flatten(0, 1).index_select(0, place_R), (0, 0, counts[0], 0))


def sort_rows(x_TD: Tensor, ids_TA: Tensor, experts_: int) -> tuple[Tensor, Tensor, list[int]]:
    """(order [R], x gathered in that order [R, D], row counts per expert after a leading count of padding rows)."""
    flat_R = ids_TA.reshape(-1)
    order_R = flat_R.argsort(stable=True)
    counts = torch.bincount(flat_R + 1, minlength=experts_ + 1).tolist()
    return order_R, x_TD.index_select(0, order_R // ids_TA.shape[1]), counts


def weigh_and_sum(y_RD: Tensor, order_R: Tensor, weights_TA: Tensor) -> Tensor:
    """Rows in expert order -> token order, weighted and reduced over A in FP32, in the rows' dtype."""
    tokens, top_k = weights_TA.shape
    back_TAD = torch.empty_like(y_RD).index_copy_(0, order_R, y_RD).view(tokens, top_k, y_RD.shape[1])
    if y_RD.dtype == torch.float32:
        return torch.bmm(weights_TA[:, None], back_TAD)[:, 0]
    return (back_TAD.float() * weights_TA[..., None]).sum(1).to(y_RD.dtype)


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    how = Softmax(scale, window, sinks_H)
    if batch.decodes == len(q_THK):
        return decode(q_THK, pool_PW, batch, view, how)
    out_THV = q_THK.new_empty(*q_THK.shape[:2], view.value_dim)
    if batch.decodes:
        out_THV[: batch.decodes] = decode(q_THK[: batch.decodes], pool_PW, batch, view, how)
    for s in range(batch.decodes, len(batch.spans)):
        span = batch.spans[s]
        k_LGK, v_LGV = context(cached(pool_PW, batch.slots_SL[s, : span.length], view, q_THK.dtype), view)
        rows = slice(span.start, span.start + span.count)
        out_THV[rows] = attend_dense(q_THK[rows], k_LGK, v_LGV, scale, window, sinks_H)
    return out_THV


@dataclass(frozen=True, slots=True)
class Softmax:
    """How scores become shares: their scale, how far back they reach, and the sink logit of each head."""

    scale: float
    window: int | None
    sinks_H: Tensor | None

    def shares(self, scores_XHYL: Tensor) -> Tensor:
        """FP32 scores with the heads second [X, H, (Y,) L] -> shares of the same shape, which sinks keep below 1."""
        if self.sinks_H is None:
            return torch.softmax(scores_XHYL, -1)
        shape = (-1, *(1,) * (scores_XHYL.dim() - 2))
        sinks = self.sinks_H.float().view(shape).expand(*scores_XHYL.shape[:-1], 1)
        return torch.softmax(torch.cat([scores_XHYL, sinks], -1), -1)[..., :-1]


def cached(pool_PW: Tensor, slots: Tensor, view: KVView, dtype: torch.dtype) -> Tensor:
    """The rows of some slots; those of an FP8 cache decoded."""
    rows = pool_PW.index_select(0, slots)
    return kv.decode(rows, view.parts).to(dtype) if pool_PW.dtype == torch.uint8 else rows


def context(rows_LW: Tensor, view: KVView) -> tuple[Tensor, Tensor]:
    """Pool rows [..., W] -> (keys [..., G, K], values [..., G, V]); views, nothing is copied."""
    values = slice(view.value_at, view.value_at + view.kv_heads * view.value_dim)
    k = rows_LW[..., : view.kv_heads * view.key_dim].unflatten(-1, (view.kv_heads, view.key_dim))
    return k, rows_LW[..., values].unflatten(-1, (view.kv_heads, view.value_dim))


def decode(q_SHK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax) -> Tensor:
    """One query per sequence: contexts are gathered, padded to the longest and masked, in groups of like length."""
    lengths = [span.length for span in batch.spans[: len(q_SHK)]]
    groups = like_lengths(lengths)
    if len(groups) == 1:
        return decode_group(q_SHK, pool_PW, batch.narrow(slice(0, len(lengths)), max(lengths)), view, how)
    out_SHV = q_SHK.new_empty(*q_SHK.shape[:2], view.value_dim)
    for group in groups:
        part = batch.narrow(torch.tensor(group), max(lengths[s] for s in group))
        out_SHV[group] = decode_group(q_SHK[group], pool_PW, part, view, how)
    return out_SHV


def like_lengths(lengths: list[int]) -> list[list[int]]:
    """Sequences in groups whose padded area is at most twice what they hold: a long one must not inflate the others."""
    if len(lengths) * max(lengths) <= 2 * sum(lengths):
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    for s in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or lengths[s] > 2 * lengths[groups[-1][0]] + 32:
            groups.append([])
        groups[-1].append(s)
    return groups


def decode_group(q_SHK: Tensor, pool_PW: Tensor, part: Context, view: KVView, how: Softmax) -> Tensor:
    sequences, heads, _ = q_SHK.shape
    slots_SL, lengths_S, hidden_SL = part
    rows_SLW = cached(pool_PW, slots_SL.reshape(-1), view, q_SHK.dtype).view(*slots_SL.shape, -1)
    k_SLGK, v_SLGV = context(rows_SLW, view)
    if how.window is not None:
        too_old_SL = torch.arange(slots_SL.shape[1]) < lengths_S[:, None] - how.window
        hidden_SL = hidden_SL.masked_fill(too_old_SL, float("-inf"))
    if view.kv_heads == 1 and how.sinks_H is None and q_SHK.dtype == torch.float32:
        scores = torch.baddbmm(hidden_SL[:, None], q_SHK, k_SLGK[:, :, 0].transpose(1, 2), alpha=how.scale)
        return torch.bmm(torch.softmax(scores, -1), v_SLGV[:, :, 0])
    q_SGRK = q_SHK.view(sequences, view.kv_heads, heads // view.kv_heads, -1)
    scores = torch.matmul(q_SGRK, k_SLGK.permute(0, 2, 3, 1)).float().mul_(how.scale)
    scores += hidden_SL[:, None, None]
    probabilities = how.shares(scores.flatten(1, 2)).view(scores.shape).to(q_SHK.dtype)
    return torch.matmul(probabilities, v_SLGV.permute(0, 2, 1, 3)).view(sequences, heads, -1)


def attend_dense(q_THK: Tensor, k_LHK: Tensor, v_LHV: Tensor, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    if sinks_H is not None:
        return attend_with_sinks(q_THK, k_LHK, v_LHV, Softmax(scale, window, sinks_H))
    queries, length = len(q_THK), len(k_LHK)
    causal = queries == length and window is None
    mask = None if causal else visible(queries, length, window, q_THK.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_LHK, v_LHV))
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y[0].transpose(0, 1)


def attend_with_sinks(q_THK: Tensor, k_LGK: Tensor, v_LGV: Tensor, how: Softmax) -> Tensor:
    """torch's fused attention knows no sinks, so the scores are written out."""
    (queries, heads, _), (length, groups, _) = q_THK.shape, k_LGK.shape
    q_GRTK = q_THK.view(queries, groups, heads // groups, -1).permute(1, 2, 0, 3)
    scores = torch.matmul(q_GRTK, k_LGK.permute(1, 2, 0)[:, None]).float().mul_(how.scale)
    scores.masked_fill_(~visible(queries, length, how.window, q_THK.device), float("-inf"))
    shares = how.shares(scores.view(1, heads, queries, length)).view(scores.shape).to(q_THK.dtype)
    return torch.matmul(shares, v_LGV.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).reshape(queries, heads, -1)
