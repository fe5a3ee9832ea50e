"""From the logits of a step to its tokens.

    raw logits -> (log-probs are of these) -> process (bias, penalties, min_tokens) -> greedy or draw -> tokens

The formulas are beside the code: `processors`, `draw`, `logprobs`; the randomness is in `noise`. A row's token depends
on that row alone: not on the batch around it, its place in it, or how often it was recomputed. Rows without a
processor cost nothing for those that have one; a batch of plain greedy rows is one argmax and one copy to the host.

Legend: R rows, L rows that want log-probs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.engine.draw import FAILED, SHORT, Strategy, draw, greedy, strategy
from moesaic.engine.logprobs import TokenLogprobs, prompt_logprobs, token_logprobs
from moesaic.engine.params import SamplingParams, require
from moesaic.engine.processors import process
from moesaic.engine.rows import Row, upload

__all__ = ["Row", "Sampled", "TokenLogprobs", "prompt_logprobs", "sample", "validate"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry per row. tokens[i] is -1, and logprobs[i] None, for each i in `failed`.

    logprobs: None where not asked for.  near_tie: the choice was made by less than 0.02 in logits (between the two
    best processed logits of a greedy row, the two best logit + T * noise of a sampled one); all False if not counted.
    failed: rows whose logits hold a NaN or +inf, or nothing above -inf; the other rows are not affected.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    near_tie: list[bool]
    failed: list[int]


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Call when a request is added. Raises RequestError if a token id it names is not in the vocabulary."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        wrong = [token for token in ids if not 0 <= token < vocab_size]
        require(not wrong, name, f"token ids in [0, {vocab_size}), not {wrong[:5]}")


def sample(logits_RV: Tensor, rows: Sequence[Row], *, count_near_ties: bool = False) -> Sampled:
    """Choose one token per row. logits_RV: FP32, contiguous rows; its contents are spoilt.

    Host synchronisations: one; one more if log-probs are wanted; one more if a top-p nucleus has over 1,024 tokens.
    Raises ValueError on a wrong shape or dtype; never because of what the logits hold (see `Sampled.failed`).
    """
    if logits_RV.shape[:1] != (len(rows),) or logits_RV.ndim != 2 or logits_RV.dtype != torch.float32:
        raise ValueError(f"logits must be FP32 [{len(rows)}, V], not {logits_RV.dtype} {list(logits_RV.shape)}")
    if not rows:
        return Sampled([], [], [], [])
    asking = [r for r, row in enumerate(rows) if row.params.logprobs is not None]
    processed = any(row.processed for row in rows)
    raw_LV = _select(logits_RV, asking, copy=processed) if asking else None
    if processed:
        process(logits_RV, rows)
    tokens, near = _choose(logits_RV, rows, count_near_ties)
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    if raw_LV is not None:
        chosen_L = upload([max(tokens[r], 0) for r in asking], torch.int64, logits_RV.device)
        found = token_logprobs(raw_LV, chosen_L, [rows[r].params.logprobs or 0 for r in asking])
        for r, entry in zip(asking, found, strict=True):
            logprobs[r] = entry if tokens[r] != FAILED else None
    failed = [r for r, token in enumerate(tokens) if token == FAILED]
    return Sampled(tokens, logprobs, [flag != 0 for flag in near], failed)


def _choose(logits_RV: Tensor, rows: Sequence[Row], count_near_ties: bool) -> tuple[list[int], list[int]]:
    """Tokens (FAILED where there is none) and near-tie flags, row by row."""
    groups: dict[Strategy, list[int]] = {}
    for r, row in enumerate(rows):
        groups.setdefault(strategy(row.params, logits_RV.shape[1]), []).append(r)
    order = [r for members in groups.values() for r in members]
    parts = [_group(logits_RV, rows, members, how, count_near_ties) for how, members in groups.items()]
    token_G, near_G = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).tolist()
    tokens, near = [0] * len(rows), [0] * len(rows)
    for r, token, flag in zip(order, token_G, near_G, strict=True):
        tokens[r], near[r] = token, flag
    short = [r for r in order if tokens[r] == SHORT]
    if short:
        token_S, near_S = _group(logits_RV, rows, short, Strategy.WIDE, count_near_ties).tolist()
        for r, token, flag in zip(short, token_S, near_S, strict=True):
            tokens[r], near[r] = token, flag
    return tokens, near


def _group(logits_RV: Tensor, rows: Sequence[Row], members: list[int], how: Strategy, count_near_ties: bool) -> Tensor:
    logits_GV = _select(logits_RV, members, copy=False)
    if how is Strategy.GREEDY:
        return greedy(logits_GV, count_near_ties)
    return draw(logits_GV, [rows[r] for r in members], how, count_near_ties)


def _select(logits_RV: Tensor, members: list[int], copy: bool) -> Tensor:
    """The rows `members` (ascending); the tensor itself if these are all rows and no copy is needed."""
    if len(members) == logits_RV.shape[0]:
        return logits_RV.clone() if copy else logits_RV
    return logits_RV.index_select(0, upload(members, torch.int64, logits_RV.device))
