"""Expert choice: one token per program. Experts lie in a [GROUPS, SIZE] tile, so that a group's best are row sums.

A score and the place of its expert become one integer that orders as they do: the largest is the choice, and of equal
scores the lower expert's.
Letters: G groups, M members of a group (both padded to powers of two), A choices, P terms of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.spec import RouterSpec
from moesaic.kernels._triton.launch import power
from moesaic.kernels._triton.pdl import options, wait
from moesaic.kernels._triton.top_two import LOW, ordered, value_of

NOBODY = tl.constexpr(1 << 30)
TAKEN = tl.constexpr(-(1 << 63))


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
def to_bf16_grid(x):
    """FP32 -> the nearest BF16 value, ties to even, in FP32; by its bits, as the interpreter's own cast truncates."""
    bits = x.to(tl.int32, bitcast=True)
    found = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, found)


@triton.jit
def route_kernel(logits_ptr, part, row, bias_ptr, live_ptr, counts_ptr, ids_ptr, weights_ptr, scale, P: tl.constexpr,
                 E: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr, KEEP: tl.constexpr,
                 TWO: tl.constexpr, A: tl.constexpr, BA: tl.constexpr, SIGMOID: tl.constexpr, LATE: tl.constexpr,
                 RENORM: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Logits: the sum of P terms, rounded to BF16 if ROUND. LATE: chosen by logits, then weighted by the softmax of the
    chosen."""
    t = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = E // GROUPS
    g, m = tl.arange(0, BG), tl.arange(0, BM)
    real = (g < GROUPS)[:, None] & (m < SIZE)[None, :]
    index = g[:, None] * SIZE + m[None, :]
    wait(PDL)
    logits = tl.load(logits_ptr + t * row + index, real, 0.0).to(tl.float32)
    for p in tl.static_range(1, P):
        logits += tl.load(logits_ptr + p * part + t * row + index, real, 0.0)
    if ROUND:
        logits = to_bf16_grid(logits)
    scores = logits if LATE else scores_of(logits, real, SIGMOID)
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + index, real, 0.0).to(tl.float32)
    if GROUPS > 1:
        choice = tl.where(choice != choice, float("inf"), choice)  # a NaN is chosen, and seen in its weight
        kept = keep_groups(group_scores(choice, real, index, TWO), g < GROUPS, KEEP, BG)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    key = tl.where(real, ordered(choice, index), TAKEN)
    a = tl.arange(0, BA)
    ids, weights = tl.zeros([BA], tl.int32), tl.zeros([BA], tl.float32)
    for i in range(A):
        best = tl.max(tl.max(key, 1), 0)
        at = ((best & LOW) ^ LOW).to(tl.int32)
        if GROUPS == 1 and bias_ptr is None:
            weight = value_of(best)
        else:
            weight = tl.sum(tl.sum(tl.where(index == at, scores, 0.0), 1), 0)
        ids = tl.where(a == i, at, ids)
        weights = tl.where(a == i, weight, weights)
        key = tl.where(key == best, TAKEN, key)
    if LATE:
        shares = tl.where(a < A, tl.exp(weights - tl.max(tl.where(a < A, weights, float("-inf")), 0)), 0.0)
        weights = tl.div_rn(shares, tl.zeros_like(shares) + tl.sum(shares, 0))
    if RENORM:
        weights = tl.div_rn(weights, tl.zeros_like(weights) + (tl.sum(weights, 0) + 1e-20))
    used = a < A
    if live_ptr is not None:
        live = tl.load(live_ptr + t) != 0
        ids = tl.where(live, ids, -1)
        used = used & live
    tl.store(ids_ptr + t * A + a, ids, a < A)
    tl.store(weights_ptr + t * A + a, weights * scale, a < A)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr + ids, tl.full([BA], 1, tl.int64), used, sem="relaxed")


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    return choose(logits_TE[None], bias_E, spec)


def choose(logits_PTE: Tensor, bias_E: Tensor | None, spec: RouterSpec, live_T: Tensor | None = None,
           counts_E: Tensor | None = None, rounded: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`route` of the sum of terms, rounded to BF16 or not; see `gate` in ops.py for the rest."""
    logits = logits_PTE if logits_PTE.stride(2) == 1 else logits_PTE.contiguous()
    parts, tokens, _ = logits.shape
    ids_TA = torch.empty(tokens, spec.top_k, dtype=torch.int32, device=logits.device)
    weights_TA = torch.empty(ids_TA.shape, dtype=torch.float32, device=logits.device)
    if tokens:
        groups, members = power(spec.groups), power(spec.experts // spec.groups)
        route_kernel[(tokens,)](
            logits, logits.stride(0), logits.stride(1), bias_E, live_T, counts_E, ids_TA, weights_TA, spec.scale,
            P=parts, E=spec.experts, GROUPS=spec.groups, BG=groups, BM=members, KEEP=spec.top_groups,
            TWO=spec.group_score == "top2_sum", A=spec.top_k, BA=power(spec.top_k), SIGMOID=spec.scoring == "sigmoid",
            LATE=spec.scoring == "softmax_topk", RENORM=spec.renormalize, ROUND=rounded,
            num_warps=1 if groups * members <= 512 else 4, **options(logits.device),
        )  # fmt: skip
    return ids_TA, weights_TA
