"""How often a model's draft layer would have guessed right: replayed on finished answers. T tokens, D hidden size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.layers.step import StepInput
from moesaic.models.decoder import Decoder


@torch.inference_mode()
def acceptance(model: Decoder, answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[int, int]:
    """(drafts made, drafts right) of the first draft layer over (prompt, greedy answer) pairs.

    At each position the draft sees the state that produced an answer token and that token, and guesses the next one;
    speculative decoding with one draft token accepts exactly the right guesses. Every position is counted, so the
    rate is that of drafting at every token. Raises ValueError where the model has no draft layer.
    """
    if not model.drafts:
        raise ValueError("the model has no draft layer")
    made = right = 0
    for prompt, answer in answers:
        if len(answer) < 2:
            continue
        tokens = [*prompt, *answer]
        last = len(tokens) - 1  # the last token has no successor to guess from
        hidden_TD = model(whole_sequence(model, tokens[:last]))
        step = whole_sequence(model, tokens[1:])
        logits_TV = model.logits(model.draft(0, step, hidden_TD)[len(prompt) - 1 : -1])
        guesses = logits_TV.argmax(-1).tolist()
        made += len(guesses)
        right += sum(guess == token for guess, token in zip(guesses, answer[1:], strict=True))
    return made, right


def whole_sequence(model: Decoder, tokens: Sequence[int]) -> StepInput:
    """One sequence from its beginning, with a KV pool of its own."""
    count = len(tokens)
    at_T = torch.arange(count)
    pool = model.pool(1, count, drafts=True)
    batch = AttentionBatch.of((Span(0, count, count),), 0, at_T[None])
    return StepInput(torch.tensor(tokens), at_T, at_T, batch, pool)
