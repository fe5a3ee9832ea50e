"""Gate product and expert choice. Few tokens: in one kernel, whose last program of a block of tokens chooses; else the
product's parts are added up where the experts are chosen.

Letters: M tokens of a block, E experts, A choices, P parts of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.spec import RouterSpec
from moesaic.kernels._triton.last import counters, last_of
from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.linear import STEP, share_of, wide_terms, wide_tile
from moesaic.kernels._triton.pdl import options, prefetch, wait
from moesaic.kernels._triton.route import TAKEN, choose, to_bf16_grid
from moesaic.kernels._triton.top_two import LOW, ordered, value_of

FEW = 64
"""Tokens up to which one kernel is the shorter way."""
BLOCK, COLUMNS = 16, 32
"""Tokens and experts of a program."""


@triton.jit
def scores_of_rows(logits, real, SIGMOID: tl.constexpr):
    """[M, E]; `route.scores_of` by row."""
    if SIGMOID:
        return tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
    else:
        top = tl.max(tl.where(real, logits, float("-inf")), 1)
        shares = tl.where(real, tl.exp(logits - top[:, None]), 0.0)
        return tl.div_rn(shares, tl.zeros_like(shares) + tl.sum(shares, 1)[:, None])


@triton.jit
def choose_rows(logits, bias_ptr, live_ptr, counts_ptr, ids_ptr, weights_ptr, t, t_ok, scale, E: tl.constexpr,
                BE: tl.constexpr, BM: tl.constexpr, A: tl.constexpr, BA: tl.constexpr, SIGMOID: tl.constexpr,
                LATE: tl.constexpr, RENORM: tl.constexpr):  # fmt: skip
    """What `route_kernel` does of one group of experts, for a block of tokens t."""
    e, a = tl.arange(0, BE)[None, :], tl.arange(0, BA)[None, :]
    real = (e < E) & (tl.zeros_like(logits) == 0)
    scores = logits if LATE else scores_of_rows(logits, real, SIGMOID)
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + e, e < E, 0.0).to(tl.float32)
    key = tl.where(real, ordered(choice, e), TAKEN)
    ids, weights = tl.zeros([BM, BA], tl.int32), tl.zeros([BM, BA], tl.float32)
    for i in range(A):
        best = tl.max(key, 1)[:, None]
        at = ((best & LOW) ^ LOW).to(tl.int32)
        weight = value_of(best) if bias_ptr is None else tl.sum(tl.where(e == at, scores, 0.0), 1)[:, None]
        ids = tl.where(a == i, at, ids)
        weights = tl.where(a == i, weight, weights)
        key = tl.where(key == best, TAKEN, key)
    if LATE:
        top = tl.max(tl.where(a < A, weights, float("-inf")), 1)[:, None]
        shares = tl.where(a < A, tl.exp(weights - top), 0.0)
        weights = tl.div_rn(shares, tl.zeros_like(shares) + tl.sum(shares, 1)[:, None])
    if RENORM:
        weights = tl.div_rn(weights, tl.zeros_like(weights) + (tl.sum(weights, 1)[:, None] + 1e-20))
    stored = t_ok[:, None] & (a < A)
    used = stored
    if live_ptr is not None:
        live = tl.load(live_ptr + t, t_ok, 0)[:, None] != 0
        ids = tl.where(live, ids, -1)
        used = used & live
    at = t.to(tl.int64)[:, None] * A + a
    tl.store(ids_ptr + at, ids, stored)
    tl.store(weights_ptr + at, weights * scale, stored)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr + ids, tl.full([BM, BA], 1, tl.int64), used, sem="relaxed")


@triton.jit
def gate_kernel(x_ptr, x_stride, w_ptr, w_stride, logit_bias_ptr, part_ptr, done_ptr, bias_ptr, live_ptr, counts_ptr,
                ids_ptr, weights_ptr, M, K, share, scale, E: tl.constexpr, BE: tl.constexpr, P: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, A: tl.constexpr, BA: tl.constexpr,
                SIGMOID: tl.constexpr, LATE: tl.constexpr, RENORM: tl.constexpr, EXACT: tl.constexpr,
                NARROW: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    part, w_row = tl.program_id(2), w_ptr + n.to(tl.int64) * w_stride
    begin, end = part * share, tl.minimum(part * share + share, K)
    if PDL:
        prefetch(w_row + begin, n < E, end - begin, 64 if NARROW else 32, 8)
    wait(PDL)
    x_row = x_ptr + m.to(tl.int64)[:, None] * x_stride
    acc = wide_tile(x_row, w_row[:, None], m < M, n < E, begin, end, K, BM, BN, BK, EXACT, NARROW)
    if logit_bias_ptr is not None:
        acc += tl.load(logit_bias_ptr + n, (n < E) & (part == 0), 0.0).to(tl.float32)[None, :]
    tl.store(part_ptr + (part * M + m)[:, None] * E + n[None, :], acc, (m < M)[:, None] & (n < E)[None, :])
    if last_of(done_ptr + tl.program_id(0), tl.num_programs(1) * P):
        e = tl.arange(0, BE)[None, :]
        ok = (m < M)[:, None] & (e < E)
        logits = tl.zeros([BM, BE], tl.float32)
        for p in tl.static_range(P):
            logits += tl.load(part_ptr + (p * M + m)[:, None] * E + e, ok, 0.0, cache_modifier=".cg")
        if NARROW:
            logits = to_bf16_grid(logits)
        choose_rows(logits, bias_ptr, live_ptr, counts_ptr, ids_ptr, weights_ptr, m, m < M, scale, E, BE, BM, A, BA,
                    SIGMOID, LATE, RENORM)  # fmt: skip


def gate(x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, bias_E: Tensor | None, spec: RouterSpec,
         live_T: Tensor | None = None, counts_E: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    if 0 < len(x_TD) <= FEW and spec.groups == 1:
        return at_once(x_TD, w_ED, (logit_bias_E, bias_E), spec, live_T, counts_E)
    terms = wide_terms(x_TD, w_ED, logit_bias_E)
    return choose(terms, bias_E, spec, live_T, counts_E, rounded=w_ED.dtype == torch.bfloat16)


def at_once(x_TD: Tensor, w_ED: Tensor, biases: tuple[Tensor | None, Tensor | None], spec: RouterSpec,
            live_T: Tensor | None, counts_E: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """biases: of the logits, and of the choice."""
    x = x_TD if w_ED.dtype == torch.float32 else x_TD.to(w_ED.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, k), experts = x.shape, len(w_ED)
    blocks, tiles = cdiv(tokens, BLOCK), cdiv(experts, COLUMNS)
    share = share_of(blocks * tiles, k)
    parts = x.new_empty(cdiv(k, share), tokens, experts, dtype=torch.float32)
    ids_TA = torch.empty(tokens, spec.top_k, dtype=torch.int32, device=x.device)
    weights_TA = torch.empty(ids_TA.shape, dtype=torch.float32, device=x.device)
    gate_kernel[(blocks, tiles, len(parts))](
        x, x.stride(0), w_ED, w_ED.stride(0), biases[0], parts, counters(x.device), biases[1], live_T, counts_E,
        ids_TA, weights_TA, tokens, k, share, spec.scale, E=experts, BE=power(experts), P=len(parts), BM=BLOCK,
        BN=COLUMNS, BK=STEP, A=spec.top_k, BA=power(spec.top_k), SIGMOID=spec.scoring == "sigmoid",
        LATE=spec.scoring == "softmax_topk", RENORM=spec.renormalize, EXACT=x.dtype == torch.bfloat16,
        NARROW=w_ED.dtype == torch.bfloat16, num_warps=4, num_stages=3, **options(x.device),
    )  # fmt: skip
    return ids_TA, weights_TA
