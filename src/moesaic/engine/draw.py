"""The choice of one token per row, from processed logits. Row-independent: no result depends on the rest of a batch.

Greedy rows take the highest logit, the lower id on ties. Sampled rows (temperature > 0), with w = exp((l - max l) / T):

    top-k      the k first tokens in the order (higher logit, then lower id): exactly k, so top-k 1 is greedy
    top-p      the shortest prefix of those whose mass reaches p of their total; at least one token
    min-p      the tokens with w >= min_p, that is at least min_p times as likely as the likeliest
    draw       argmax over what is left of w / exponential(seed, position, token): a sample in proportion to w
               (the exponential race, which is the Gumbel trick without its second logarithm)

The order is that of Hugging Face's warpers (vLLM's V1 applies min-p before top-k and top-p: only a request which sets
both min-p and top-p can tell). Because the noise belongs to the token id, only candidates need any: a row with a small
top-k never touches the rest of its vocabulary again, and top-p alone first tries the `NARROW` likeliest tokens,
reporting SHORT (never guessing) when their mass does not reach p.

Legend: R rows, C rows of a chunk, V vocabulary, K candidates of a row.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moesaic.engine.noise import exponentials, row_key
from moesaic.engine.params import SamplingParams
from moesaic.engine.ranking import best, chunk_rows, mass_bits, masses, order_keys
from moesaic.engine.rows import Row, upload, upload_words
from moesaic.kernels.ops import Ops

FAILED = -1  # in place of a token: no finite maximum, nothing can be chosen
SHORT = -2  # in place of a token: the candidates were too few, draw again with Strategy.WIDE
NARROW = 1024
NEAR_TIE = 0.02  # in logits
# A temperature outside this range is brought into it: FP32 divides by it without overflow or 0/0.
_COLDEST, _HOTTEST = 2.0**-120, 2.0**120


class Strategy(enum.Enum):
    """How a row is chosen; decided by its own parameters alone."""

    GREEDY = enum.auto()
    FREE = enum.auto()  # no order needed: every token is a candidate
    NARROW = enum.auto()  # the few first tokens suffice, certainly (top-k) or probably (top-p)
    WIDE = enum.auto()  # the whole vocabulary is sorted


def strategy(params: SamplingParams, vocab_size: int) -> Strategy:
    if params.greedy:
        return Strategy.GREEDY
    if 0 < params.top_k < vocab_size:
        return Strategy.NARROW if params.top_k <= NARROW else Strategy.WIDE
    return Strategy.NARROW if params.top_p < 1 else Strategy.FREE


def may_be_short(params: SamplingParams, vocab_size: int) -> bool:
    """Whether the NARROW candidates of such a row may turn out to be too few."""
    return strategy(params, vocab_size) is Strategy.NARROW and not 0 < params.top_k < vocab_size


def greedy(logits_RV: Tensor, count_near_ties: bool) -> Tensor:
    """int64 [2, R]: the token (or FAILED), and 1 where the second-best logit is closer than NEAR_TIE.

    A NaN counts as the maximum for argmax, so one look at the maximum finds every row that must fail.
    """
    token_R = logits_RV.argmax(dim=1)  # documented to return the first of equal maxima
    peak_R = logits_RV.gather(1, token_R[:, None]).squeeze(1)
    gap_R = None
    if count_near_ties:
        best_R, next_R = _best_two(logits_RV, token_R)
        gap_R = best_R - next_R
    return _packed(torch.where(peak_R.isfinite(), token_R, FAILED), gap_R)


def pick(ops: Ops, scores_RV: Tensor) -> Tensor | None:
    """`greedy` of scores in any dtype, near ties counted, where the kernels have an op for it."""
    if not hasattr(ops, "top_two"):
        return None
    token_R, best_R, next_R = ops.top_two(scores_RV)
    return _packed(torch.where(best_R.isfinite(), token_R, FAILED), best_R - next_R)


def draw(logits_RV: Tensor, rows: Sequence[Row], how: Strategy, count_near_ties: bool) -> Tensor:
    """int64 [2, R]: the token (or FAILED or SHORT), and 1 where the race was won by less than NEAR_TIE in logits.

    `logits_RV` is read only. Peak extra memory is a few times `chunk_rows` rows.
    """
    vocab_size = logits_RV.shape[1]
    knobs = _knobs(rows, vocab_size, logits_RV.device)
    width = vocab_size
    if how is Strategy.NARROW:
        width = max(k if k < vocab_size else NARROW for k in (row.params.top_k or vocab_size for row in rows))
    full_mass = how is not Strategy.FREE and any(not 0 < row.params.top_k < vocab_size for row in rows)
    step = chunk_rows(vocab_size, logits_RV.device)
    parts = []
    for start in range(0, len(rows), step):
        part = knobs.rows(start, start + step)
        chunk_CV = logits_RV[start : start + step]
        parts.append(_draw_chunk(chunk_CV, part, None if how is Strategy.FREE else (width, full_mass), count_near_ties))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True)
class _Knobs:
    """The parameters of sampled rows on the device, each [R]: FP64 but for the int64 noise keys and top_k."""

    temperature_R: Tensor
    top_p_R: Tensor  # infinity is off
    min_p_R: Tensor  # 0 is off
    top_k_R: Tensor  # V is off
    key_R: Tensor

    def rows(self, start: int, stop: int) -> _Knobs:
        cut = slice(start, stop)
        return _Knobs(self.temperature_R[cut], self.top_p_R[cut], self.min_p_R[cut], self.top_k_R[cut], self.key_R[cut])


def _knobs(rows: Sequence[Row], vocab_size: int, device: torch.device) -> _Knobs:
    params = [row.params for row in rows]
    values = np.array(
        [
            [min(max(p.temperature, _COLDEST), _HOTTEST) for p in params],
            [p.top_p if p.top_p < 1 else math.inf for p in params],
            [p.min_p for p in params],
        ]
    )
    temperature_R, top_p_R, min_p_R = upload(values, torch.float64, device)
    top_k_R = upload([min(p.top_k or vocab_size, vocab_size) for p in params], torch.int64, device)
    key_R = upload_words([row_key(row.seed, len(row.output)) for row in rows], device)
    return _Knobs(temperature_R, top_p_R, min_p_R, top_k_R, key_R)


def _draw_chunk(logits_CV: Tensor, knobs: _Knobs, ranked: tuple[int, bool] | None, count_near_ties: bool) -> Tensor:
    """`draw` for rows few enough to hold several int64 copies of. ranked: how many candidates, and whether the mass
    of the whole vocabulary is needed; None keeps every token, unordered."""
    peak_C = logits_CV.amax(dim=1)
    relative_CV = (logits_CV - peak_C[:, None]).div_(knobs.temperature_R.float()[:, None])
    short_C: Tensor | None = None
    if ranked is None:
        id_CK = torch.arange(logits_CV.shape[1], device=logits_CV.device)[None]
        weight_CK = relative_CV.double().exp_()
    else:
        width, full_mass = ranked
        id_CK = best(order_keys(logits_CV), width)
        weight_CK, keep_CK, short_C = _truncate(relative_CV, id_CK, knobs, full_mass)
        weight_CK = torch.where(keep_CK, weight_CK, 0.0)
    weight_CK = torch.where(weight_CK >= knobs.min_p_R[:, None], weight_CK, 0.0)
    score_CK = weight_CK.div_(exponentials(knobs.key_R, id_CK))
    place_C = score_CK.argmax(dim=1)
    token_C = id_CK.expand_as(score_CK).gather(1, place_C[:, None]).squeeze(1)
    if short_C is not None:
        token_C = torch.where(short_C, SHORT, token_C)
    gap_C = None
    if count_near_ties:
        best_C, next_C = _best_two(score_CK, place_C)
        gap_C = (best_C.log() - next_C.log()) * knobs.temperature_R
    return _packed(torch.where(peak_C.isfinite(), token_C, FAILED), gap_C)


def _truncate(relative_CV: Tensor, id_CK: Tensor, knobs: _Knobs, full_mass: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of the ranked candidates, FP64 [C, K]; those that top-k and top-p keep, bool [C, K]; and the rows
    that have too few candidates, bool [C]. full_mass: some row has no top-k, so its total is the whole vocabulary's."""
    vocab_size, width = relative_CV.shape[1], id_CK.shape[1]
    bits = mass_bits(vocab_size)
    weight_CK = relative_CV.gather(1, id_CK).double().exp_()
    within_CK = torch.arange(width, device=id_CK.device) < knobs.top_k_R[:, None]
    mass_CK = torch.where(within_CK, masses(weight_CK, bits), 0)
    reached_CK = mass_CK.cumsum(dim=1)
    total_C = reached_CK[:, -1]
    if full_mass and width < vocab_size:
        full_C = masses(relative_CV.double().exp_(), bits).sum(dim=1)
        total_C = torch.where(knobs.top_k_R >= vocab_size, full_C, total_C)
    limit_C = total_C.double() * knobs.top_p_R
    keep_CK = within_CK & ((reached_CK - mass_CK).double() < limit_C[:, None])
    short_C = (knobs.top_k_R > width) & (reached_CK[:, -1].double() < limit_C)
    return weight_CK, keep_CK, short_C


def _best_two(score_RK: Tensor, place_R: Tensor) -> tuple[Tensor, Tensor]:
    """The best score, at `place_R`, and the next, [R] each; -inf if there is no next. `score_RK` ends unchanged."""
    best_R1 = score_RK.gather(1, place_R[:, None])
    score_RK.scatter_(1, place_R[:, None], -torch.inf)
    next_R = score_RK.amax(dim=1)
    score_RK.scatter_(1, place_R[:, None], best_R1)
    return best_R1.squeeze(1), next_R


def _packed(token_R: Tensor, gap_R: Tensor | None) -> Tensor:
    near_R = torch.zeros_like(token_R) if gap_R is None else (gap_R < NEAR_TIE).long()
    return torch.stack([token_R, near_R])
