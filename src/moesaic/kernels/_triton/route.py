"""Expert choice: one token per program. Experts lie in a [GROUPS, SIZE] tile, so that a group's best are row sums.

Letters: G groups, M members of a group (both padded to powers of two), A choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.spec import RouterSpec
from moesaic.kernels._triton.launch import power

NOBODY = tl.constexpr(1 << 30)


@triton.jit
def best(choice, free, index):
    """(the highest value among the free, the lowest index that has it). Works for -inf; something must be free."""
    top = tl.max(tl.max(tl.where(free, choice, float("-inf")), 1), 0)
    return top, tl.min(tl.min(tl.where(free & (choice == top), index, NOBODY), 1), 0)


@triton.jit
def group_scores(choice, real, index, TWO: tl.constexpr):
    """[G]: the largest of each group, or the sum of its two largest; -inf for groups that are padding."""
    masked = tl.where(real, choice, float("-inf"))
    first = tl.max(masked, 1)
    if TWO:
        at = tl.min(tl.where(real & (masked == first[:, None]), index, NOBODY), 1)
        second = tl.max(tl.where(index == at[:, None], float("-inf"), masked), 1)
        return first + second
    else:
        return first


@triton.jit
def keep_groups(score, real, KEEP: tl.constexpr, BG: tl.constexpr):
    """[G]: which groups are among the KEEP best; the lower one of equals."""
    g = tl.arange(0, BG)
    kept = tl.zeros([BG], tl.int32)
    free = real
    for _ in range(KEEP):
        top = tl.max(tl.where(free, score, float("-inf")), 0)
        at = tl.min(tl.where(free & (score == top), g, NOBODY), 0)
        kept = tl.where(g == at, 1, kept)
        free = free & (g != at)
    return kept != 0


@triton.jit
def scores_of(logits, real, SIGMOID: tl.constexpr):
    if SIGMOID:
        return tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
    else:
        shares = tl.where(real, tl.exp(logits - tl.max(tl.max(tl.where(real, logits, float("-inf")), 1), 0)), 0.0)
        return tl.div_rn(shares, tl.zeros_like(shares) + tl.sum(tl.sum(shares, 1), 0))


@triton.jit
def route_kernel(logits_ptr, bias_ptr, ids_ptr, weights_ptr, stride, scale, E: tl.constexpr, GROUPS: tl.constexpr,
                 BG: tl.constexpr, BM: tl.constexpr, KEEP: tl.constexpr, TWO: tl.constexpr, A: tl.constexpr,
                 BA: tl.constexpr, SIGMOID: tl.constexpr, LATE: tl.constexpr, BIAS: tl.constexpr,
                 RENORM: tl.constexpr):  # fmt: skip
    """LATE: chosen by logits, then weighted by the softmax of the chosen."""
    t = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = E // GROUPS
    g, m = tl.arange(0, BG), tl.arange(0, BM)
    real = (g < GROUPS)[:, None] & (m < SIZE)[None, :]
    index = g[:, None] * SIZE + m[None, :]
    logits = tl.load(logits_ptr + t * stride + index, real, 0.0).to(tl.float32)
    scores = logits if LATE else scores_of(logits, real, SIGMOID)
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + index, real, 0.0).to(tl.float32)
    choice = tl.where(choice != choice, float("inf"), choice)  # a NaN is chosen, and seen in its weight
    if GROUPS > 1:
        kept = keep_groups(group_scores(choice, real, index, TWO), g < GROUPS, KEEP, BG)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    a = tl.arange(0, BA)
    ids, weights, free = tl.zeros([BA], tl.int32), tl.zeros([BA], tl.float32), real
    for i in range(A):
        _, at = best(choice, free, index)
        weight = tl.sum(tl.sum(tl.where(index == at, scores, 0.0), 1), 0)
        ids = tl.where(a == i, at, ids)
        weights = tl.where(a == i, weight, weights)
        free = free & (index != at)
    if LATE:
        shares = tl.where(a < A, tl.exp(weights - tl.max(tl.where(a < A, weights, float("-inf")), 0)), 0.0)
        weights = tl.div_rn(shares, tl.zeros_like(shares) + tl.sum(shares, 0))
    if RENORM:
        weights = tl.div_rn(weights, tl.zeros_like(weights) + (tl.sum(weights, 0) + 1e-20))
    tl.store(ids_ptr + t * A + a, ids, a < A)
    tl.store(weights_ptr + t * A + a, weights * scale, a < A)


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    logits = logits_TE if logits_TE.stride(-1) == 1 else logits_TE.contiguous()
    ids_TA = torch.empty(len(logits), spec.top_k, dtype=torch.int32, device=logits.device)
    weights_TA = torch.empty(ids_TA.shape, dtype=torch.float32, device=logits.device)
    if len(logits):
        groups, members = power(spec.groups), power(spec.experts // spec.groups)
        route_kernel[(len(logits),)](
            logits, logits if bias_E is None else bias_E, ids_TA, weights_TA, logits.stride(0), spec.scale,
            E=spec.experts, GROUPS=spec.groups, BG=groups, BM=members, KEEP=spec.top_groups,
            TWO=spec.group_score == "top2_sum", A=spec.top_k, BA=power(spec.top_k), SIGMOID=spec.scoring == "sigmoid",
            LATE=spec.scoring == "softmax_topk", BIAS=bias_E is not None, RENORM=spec.renormalize,
            num_warps=1 if groups * members <= 512 else 4,
        )  # fmt: skip
    return ids_TA, weights_TA
