"""Log-probabilities of the model's own distribution: log softmax of the raw logits.

Raw means before bias, penalties, temperature and truncation (what vLLM calls `raw_logprobs`, its default), so numbers
compare across requests with different sampling parameters. A rank is the place in the order (higher logit, then lower
id), 1 being the most likely; ranks of different tokens differ, and `top[rank - 1]` is the chosen token if rank <= n.

    logprob(t) = (l[t] - max l) - log(sum over u of exp(l[u] - max l))        the sum in exact fixed point, see ranking

Legend: T positions, C positions of a chunk, V vocabulary, K reported alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.engine.ranking import best, chunk_rows, mass_bits, masses, order_keys


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token, its natural log-probability (an FP32 value), its rank, and the n likeliest (token, logprob) pairs.

    A logprob is -inf if the model's logit was, and NaN if the row held a NaN: JSON has neither.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def prompt_logprobs(logits_TV: Tensor, targets_T: Tensor, top: int) -> list[TokenLogprobs]:
    """What the model thought of each target. logits_TV: FP32, read only; targets_T: int64 in [0, V), same device."""
    return token_logprobs(logits_TV, targets_T, [top] * logits_TV.shape[0])


def token_logprobs(logits_TV: Tensor, targets_T: Tensor, tops: Sequence[int]) -> list[TokenLogprobs]:
    """As `prompt_logprobs`, with the number of alternatives per position. One host synchronisation."""
    return entries(report(logits_TV, targets_T, tops).tolist(), tops)


def report(logits_TV: Tensor, targets_T: Tensor, tops: Sequence[int]) -> Tensor:
    """What `entries` needs to know, FP64 [T, X], on the device."""
    width = min(max(tops, default=0), logits_TV.shape[1])
    step = chunk_rows(logits_TV.shape[1], logits_TV.device)
    parts = [
        _report(logits_TV[start : start + step], targets_T[start : start + step], width)
        for start in range(0, len(tops), step)
    ]
    return torch.cat(parts) if parts else logits_TV.new_empty(0, 3, dtype=torch.float64)


def entries(found: list[list[float]], tops: Sequence[int]) -> list[TokenLogprobs]:
    """One entry per row of a report; tops: as the report was asked for."""
    width = (len(found[0]) - 3) // 2 if found else 0
    return [
        TokenLogprobs(
            int(token),
            logprob,
            int(rank),
            tuple((int(t), p) for t, p in zip(rest[:top], rest[width : width + top], strict=True)),
        )
        for (token, logprob, rank, *rest), top in zip(found, [min(top, width) for top in tops], strict=True)
    ]


def _report(logits_CV: Tensor, target_C: Tensor, width: int) -> Tensor:
    """FP64 [C, 3 + 2 K]: token, logprob, rank, K ids, K logprobs. FP64 holds the integers exactly."""
    bits = mass_bits(logits_CV.shape[1])
    relative_CV = logits_CV.double().sub_(logits_CV.amax(dim=1, keepdim=True))
    total_C1 = masses(relative_CV.exp(), bits).sum(dim=1, keepdim=True)
    log_total_C1 = total_C1.double().log() - bits * math.log(2.0)
    key_CV = order_keys(logits_CV)
    ahead_C1 = (key_CV > key_CV.gather(1, target_C[:, None])).sum(dim=1, keepdim=True)
    top_CK = best(key_CV, width) if width else target_C[:, None][:, :0]
    asked_CK = torch.cat([target_C[:, None], top_CK], dim=1)
    logprob_CK = (relative_CV.gather(1, asked_CK) - log_total_C1).float().double()
    columns = [asked_CK[:, :1], logprob_CK[:, :1], ahead_C1 + 1, top_CK, logprob_CK[:, 1:]]
    return torch.cat([column.double() for column in columns], dim=1)
