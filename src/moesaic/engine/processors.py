"""What changes logits before the choice: grammars, bias, penalties, minimum length. All in place on the FP32 logits.

For token t of one row, in this order, with c(t) the times t occurs in the output:

    grammar              l = -inf for tokens that may not come next
    logit_bias           l += bias[t]
    repetition_penalty   l = l / r if l > 0 else l * r      for t in prompt or output (Keskar et al., "CTRL", 2019)
    presence, frequency  l -= presence * [c(t) > 0] + frequency * c(t)                             (OpenAI's formula)
    min_tokens           l = -inf for end tokens while len(output) < min_tokens, unless no other token is possible

Only the touched places are read and written: a row costs its history, not the vocabulary (a frequency penalty also
takes one counter per token). Arithmetic is FP64, rounded once to FP32, clamped to the finite range. A logit that
is not finite stays what it is, so a NaN of the model is still seen afterwards. Ids outside the vocabulary are
skipped: an index out of range on a GPU would end every request, not one.

Legend: R rows, V vocabulary, M touched places (row, token); places of one row may repeat unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.engine.rows import Row, upload

_FINITE = torch.finfo(torch.float32).max
Ids = npt.NDArray[np.int64]


def process(logits_RV: Tensor, rows: Sequence[Row]) -> None:
    """Apply each processor to the rows that ask for it; mutates `logits_RV`."""
    _apply_guides(logits_RV, rows)
    _apply_bias(logits_RV, rows)
    _apply_repetition(logits_RV, rows)
    _apply_counts(logits_RV, rows)
    _apply_min_tokens(logits_RV, rows)


def _apply_guides(logits_RV: Tensor, rows: Sequence[Row]) -> None:
    """G rows with a grammar, W words of 32 tokens."""
    chosen = [(r, row.guide) for r, row in enumerate(rows) if row.guide is not None]
    if not chosen:
        return
    words_GW = upload(np.stack([guide.allowed_W() for _, guide in chosen]), torch.int32, logits_RV.device)
    shifts = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    allowed_GV = ((words_GW[:, :, None] >> shifts) & 1).flatten(1)[:, : logits_RV.shape[1]].bool()
    rows_G = upload([r for r, _ in chosen], torch.int64, logits_RV.device)
    old_GV = logits_RV[rows_G]
    logits_RV[rows_G] = old_GV.masked_fill(old_GV.isfinite() & ~allowed_GV, -torch.inf)


def _apply_bias(logits_RV: Tensor, rows: Sequence[Row]) -> None:
    chosen = [(r, row) for r, row in enumerate(rows) if row.params.logit_bias]
    if not chosen:
        return
    bias_M = np.concatenate([_in_vocab_values(row, logits_RV.shape[1]) for _, row in chosen])
    places = _places(((r, list(row.params.logit_bias)) for r, row in chosen), logits_RV)
    add_M = upload(bias_M, torch.float64, logits_RV.device)
    _change(logits_RV, places, lambda old_M: old_M + add_M)


def _apply_repetition(logits_RV: Tensor, rows: Sequence[Row]) -> None:
    chosen = [(r, row) for r, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not chosen:
        return
    places = _places(((r, tokens) for r, row in chosen for tokens in (row.prompt, row.output)), logits_RV)
    penalty_M = _per_row(logits_RV, {r: row.params.repetition_penalty for r, row in chosen})[places[0]]
    _change(logits_RV, places, lambda old_M: torch.where(old_M > 0, old_M / penalty_M, old_M * penalty_M))


def _apply_counts(logits_RV: Tensor, rows: Sequence[Row]) -> None:
    chosen = [(r, row) for r, row in enumerate(rows) if row.params.presence_penalty or row.params.frequency_penalty]
    if not chosen:
        return
    places = _places(((r, row.output) for r, row in chosen), logits_RV)
    subtract_M = _per_row(logits_RV, {r: row.params.presence_penalty for r, row in chosen})[places[0]]
    frequent = {r: row.params.frequency_penalty for r, row in chosen if row.params.frequency_penalty}
    if frequent:
        subtract_M = subtract_M + _per_row(logits_RV, frequent)[places[0]] * _counts(places, logits_RV.shape)
    _change(logits_RV, places, lambda old_M: old_M - subtract_M)


def _apply_min_tokens(logits_RV: Tensor, rows: Sequence[Row]) -> None:
    chosen = [(r, sorted(row.end_ids)) for r, row in enumerate(rows) if row.too_short_to_end]
    if not chosen:
        return
    row_M, id_M = places = _places(chosen, logits_RV)
    old_M = logits_RV[places]
    logits_RV[places] = torch.where(old_M.isfinite(), -torch.inf, old_M)
    possible_R = logits_RV.amax(dim=1) != -torch.inf
    logits_RV[row_M, id_M] = torch.where(possible_R[row_M], logits_RV[places], old_M)


def _places(parts: Iterable[tuple[int, Sequence[int]]], logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(row, token) index pairs on the device of all tokens inside the vocabulary, in the order of `parts`."""
    kept = [(r, _in_vocab(tokens, logits_RV.shape[1])) for r, tokens in parts]
    row_M = np.repeat(np.array([r for r, _ in kept], dtype=np.int64), [len(ids) for _, ids in kept])
    both_2M = upload(np.stack([row_M, np.concatenate([ids for _, ids in kept])]), torch.int64, logits_RV.device)
    return both_2M[0], both_2M[1]


def _in_vocab(tokens: Sequence[int], vocab_size: int) -> Ids:
    ids = np.asarray(tokens, dtype=np.int64)
    return ids[(ids >= 0) & (ids < vocab_size)]


def _in_vocab_values(row: Row, vocab_size: int) -> npt.NDArray[np.float64]:
    bias = row.params.logit_bias
    return np.array([value for token, value in bias.items() if 0 <= token < vocab_size], dtype=np.float64)


def _per_row(logits_RV: Tensor, values: dict[int, float]) -> Tensor:
    """FP64 [R]: the value of each row named, zero elsewhere."""
    value_R = np.zeros(logits_RV.shape[0])
    value_R[list(values)] = list(values.values())
    return upload(value_R, torch.float64, logits_RV.device)


def _counts(places: tuple[Tensor, Tensor], shape: torch.Size) -> Tensor:
    """int32 [M]: how often each place occurs in `places`. Integers, so the order of additions does not matter."""
    count_RV = torch.zeros(shape, dtype=torch.int32, device=places[0].device)
    count_RV.index_put_(places, torch.ones_like(places[0], dtype=torch.int32), accumulate=True)
    return count_RV[places]


def _change(logits_RV: Tensor, places: tuple[Tensor, Tensor], rule: Callable[[Tensor], Tensor]) -> None:
    """Replace the finite logits at `places` by `rule` of them; a repeated place gets the same value each time."""
    old_M = logits_RV[places]
    new_M = rule(old_M.double()).clamp_(-_FINITE, _FINITE).float()
    logits_RV[places] = torch.where(old_M.isfinite(), new_M, old_M)
