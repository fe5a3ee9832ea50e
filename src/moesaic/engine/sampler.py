"""From the logits of a step to its tokens.

    raw logits -> (log-probs are of these) -> process (bias, penalties, min_tokens) -> greedy or draw -> tokens

The formulas are beside the code: `processors`, `draw`, `logprobs`; the randomness is in `noise`. A row's token depends
on that row alone: not on the batch around it, its place in it, or how often it was recomputed. Rows without a
processor cost nothing for those that have one; a batch of plain greedy rows is one argmax and one copy to the host.

Legend: R rows, L rows that want log-probs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.engine.draw import FAILED, SHORT, Strategy, draw, greedy, may_be_short, strategy
from moesaic.engine.logprobs import TokenLogprobs, entries, prompt_logprobs, report, token_logprobs
from moesaic.engine.params import SamplingParams, require
from moesaic.engine.processors import process
from moesaic.engine.rows import Fetch, Row, upload

__all__ = ["Row", "Sampled", "Sampling", "TokenLogprobs", "begin", "prompt_logprobs", "sample", "validate"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry per row. tokens[i] is -1, and logprobs[i] None, for each i in `failed`.

    logprobs: None where not asked for.  near_tie: the choice was made by less than 0.02 in logits (between the two
    best processed logits of a greedy row, the two best logit + T * noise of a sampled one); all False if not counted.
    failed: rows whose logits hold a NaN or +inf, or nothing above -inf; the other rows are not affected.
    late: rows whose token was not among `Sampling.tokens_R`.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    near_tie: list[bool]
    failed: list[int]
    late: list[int] = field(default_factory=list, compare=False)


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
    return begin(logits_RV, rows, count_near_ties=count_near_ties).finish()


def begin(logits_RV: Tensor, rows: Sequence[Row], *, count_near_ties: bool = False, fleeting: bool = False) -> Sampling:
    """`sample` without waiting for the device. fleeting: the logits may be overwritten before `finish` is called."""
    if logits_RV.shape[:1] != (len(rows),) or logits_RV.ndim != 2 or logits_RV.dtype != torch.float32:
        raise ValueError(f"logits must be FP32 [{len(rows)}, V], not {logits_RV.dtype} {list(logits_RV.shape)}")
    asking = [r for r, row in enumerate(rows) if row.params.logprobs is not None]
    wide = [r for r, row in enumerate(rows) if may_be_short(row.params, logits_RV.shape[1])]
    processed = any(row.processed for row in rows)
    raw_LV = _select(logits_RV, asking, copy=processed or bool(fleeting and wide)) if asking else None
    if processed:
        process(logits_RV, rows)
    packed_2R = _choose(logits_RV, rows, count_near_ties)
    kept_WV = _select(logits_RV, wide, copy=fleeting) if wide else None
    return Sampling(packed_2R, rows, Logits(asking, raw_LV, wide, kept_WV), count_near_ties)


@dataclass(frozen=True, slots=True)
class Logits:
    """What is still needed of a step's logits: raw ones of the rows `asking` for log-probs; processed ones of the rows
    `wide`, which may have to choose among more tokens than were looked at."""

    asking: list[int]
    raw_LV: Tensor | None
    wide: list[int]
    kept_WV: Tensor | None


NO_LOGITS = Logits([], None, [], None)


class Sampling:
    """Tokens that are being chosen. tokens_R: INT64, on the device; negative where there is none (yet)."""

    def __init__(self, packed_2R: Tensor, rows: Sequence[Row], logits: Logits = NO_LOGITS,
                 count_near_ties: bool = True) -> None:  # fmt: skip
        """packed_2R: tokens, and flags of near ties. count_near_ties: of those that are still to be drawn."""
        self.tokens_R, self.rows, self.logits, self.count_near_ties = packed_2R[0], rows, logits, count_near_ties
        self.packed, self.report = Fetch(packed_2R), None
        if logits.raw_LV is not None:
            at_L = upload(logits.asking, torch.int64, packed_2R.device)
            chosen_L = self.tokens_R.index_select(0, at_L).clamp_(min=0)
            self.report = Fetch(report(logits.raw_LV, chosen_L, self.tops()))

    def tops(self) -> list[int]:
        return [self.rows[r].params.logprobs or 0 for r in self.logits.asking]

    @torch.inference_mode()
    def finish(self) -> Sampled:
        """Waits for the device. The same answer each time it is called."""
        tokens, near = self.packed.read()
        found = entries(self.report.read(), self.tops()) if self.report else []
        late = [r for r in self.logits.wide if tokens[r] == SHORT]
        if late:
            self.redraw(late, tokens, near)
            found = self.reported_again(tokens)
        logprobs: list[TokenLogprobs | None] = [None] * len(self.rows)
        for r, entry in zip(self.logits.asking, found, strict=True):
            logprobs[r] = entry if tokens[r] != FAILED else None
        failed = [r for r, token in enumerate(tokens) if token == FAILED]
        return Sampled(tokens, logprobs, [flag != 0 for flag in near], failed, late)

    def redraw(self, late: list[int], tokens: list[int], near: list[int]) -> None:
        """From the whole vocabulary, for rows whose nucleus had more tokens than were looked at."""
        assert self.logits.kept_WV is not None, "rows that may be short are kept"
        places = [self.logits.wide.index(r) for r in late]
        logits_SV = _select(self.logits.kept_WV, places, copy=False)
        drawn = draw(logits_SV, [self.rows[r] for r in late], Strategy.WIDE, self.count_near_ties).tolist()
        for r, token, flag in zip(late, *drawn, strict=True):
            tokens[r], near[r] = token, flag

    def reported_again(self, tokens: list[int]) -> list[TokenLogprobs]:
        if self.logits.raw_LV is None:
            return []
        chosen_L = upload([max(tokens[r], 0) for r in self.logits.asking], torch.int64, self.logits.raw_LV.device)
        return token_logprobs(self.logits.raw_LV, chosen_L, self.tops())


def _choose(logits_RV: Tensor, rows: Sequence[Row], count_near_ties: bool) -> Tensor:
    """INT64 [2, R]: tokens (FAILED or SHORT where there is none) and near-tie flags, row by row."""
    groups: dict[Strategy, list[int]] = {}
    for r, row in enumerate(rows):
        groups.setdefault(strategy(row.params, logits_RV.shape[1]), []).append(r)
    parts = [_group(logits_RV, rows, members, how, count_near_ties) for how, members in groups.items()]
    if not parts:
        return torch.empty(2, 0, dtype=torch.int64, device=logits_RV.device)
    if len(parts) == 1:
        return parts[0]
    order = [r for members in groups.values() for r in members]
    packed_2R = torch.cat(parts, dim=1)
    return torch.empty_like(packed_2R).index_copy_(1, upload(order, torch.int64, logits_RV.device), packed_2R)


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
