"""Teacher forcing: what a model says along texts that are given, and how far two models are apart there.

The gauge sees what accuracy does not: every position counts, whether or not its most likely token changes.

    KL(p || q) = sum over the vocabulary of p (log p - log q)        p the sound model's, q the other's, in nats

Letters: T tokens, D hidden size, A answer tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import UnsupportedError
from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.layers.step import StepInput
from moesaic.models.decoder import Decoder

Text = tuple[Sequence[int], Sequence[int]]
"""(prompt, answer): token ids, neither empty."""


def forced_logits(model: Decoder, texts: Sequence[Text], budget: int = 2048) -> Iterator[Tensor]:
    """For each text, in order, FP32 logits [A, V]: row a is what the model says before answer token a.

    Texts go through the model together, whole, as many as fit into `budget` tokens a pass.
    Raises UnsupportedError where the logits are not finite.
    """
    for batch in packed(texts, budget):
        yield from run_batch(model, batch)


@torch.inference_mode()
def run_batch(model: Decoder, texts: Sequence[Text]) -> list[Tensor]:
    sequences = [[*prompt, *answer][:-1] for prompt, answer in texts]  # nobody asks what follows the last token
    hidden_TD, at, found = model(whole_sequences(model, sequences)), 0, []
    for (_, answer), sequence in zip(texts, sequences, strict=True):
        at += len(sequence)
        found.append(model.logits(hidden_TD[at - len(answer) : at]))
        if not bool(torch.isfinite(found[-1]).all()):
            raise UnsupportedError("the model produces logits that are not finite", where=model.spec.architecture)
    return found


def packed(texts: Sequence[Text], budget: int) -> Iterator[list[Text]]:
    """Consecutive texts of at most `budget` tokens together; a longer text goes alone."""
    batch: list[Text] = []
    room = budget
    for text in texts:
        size = len(text[0]) + len(text[1]) - 1
        if batch and size > room:
            yield batch
            batch, room = [], budget
        batch.append(text)
        room -= size
    if batch:
        yield batch


def whole_sequences(model: Decoder, sequences: Sequence[Sequence[int]]) -> StepInput:
    """Sequences from their beginnings, with a KV pool of their own. Slot 0 stays zero: padding points at it."""
    like = model.embed.weight_VD
    lengths = [len(sequence) for sequence in sequences]
    total = sum(lengths)
    ends = torch.tensor(lengths, device=like.device).cumsum(0)
    firsts_S = ends - torch.tensor(lengths, device=like.device)
    spans = tuple(Span(int(first), count, count) for first, count in zip(firsts_S.tolist(), lengths, strict=True))
    slots_SL = 1 + firsts_S[:, None] + torch.arange(max(lengths), device=like.device)
    positions_T = torch.cat([torch.arange(count, device=like.device) for count in lengths])
    tokens_T = torch.tensor([token for sequence in sequences for token in sequence], device=like.device)
    pool = model.pool(1, total + 1)
    slots_T = torch.arange(1, total + 1, device=like.device)
    return StepInput(tokens_T, positions_T, slots_T, AttentionBatch.of(spans, 0, slots_SL), pool)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a model is from the sound one along one answer, as sums over its tokens.

    kl: nats.  logprob: magnitudes of the differences of the answer tokens' log-probabilities.  logits: norm of the
    difference of the logits over their norm, both without their mean, which changes no probability.  same: positions
    where both have the same most likely token.
    """

    tokens: int
    kl: float
    logprob: float
    logits: float
    same: int


def distance(sound_AV: Tensor, other_AV: Tensor, answer: Sequence[int]) -> Distance:
    """Between the logits of two models. In FP64: small divergences are differences of near-equals."""
    sound_AV, other_AV = sound_AV.double(), other_AV.to(sound_AV.device).double()
    p_AV, q_AV = torch.log_softmax(sound_AV, -1), torch.log_softmax(other_AV, -1)
    answer_A1 = torch.tensor(answer, device=p_AV.device)[:, None]
    level_AV, apart_AV = sound_AV - sound_AV.mean(1, keepdim=True), sound_AV - other_AV
    apart_AV = apart_AV - apart_AV.mean(1, keepdim=True)
    return Distance(
        tokens=len(answer),
        kl=float((p_AV.exp() * (p_AV - q_AV)).sum()),
        logprob=float((p_AV - q_AV).gather(1, answer_A1).abs().sum()),
        logits=float((apart_AV.norm(dim=1) / level_AV.norm(dim=1)).sum()),
        same=int((sound_AV.argmax(-1) == other_AV.argmax(-1)).sum()),
    )


def means(distances: Sequence[Distance]) -> dict[str, float]:
    """Over all tokens of several answers; zeros of none. `kl`, `logprob`: nats; `logits`, `same`: shares.

    `kl_error`: the standard error of `kl`, answers being what is drawn (a ratio of sums, linearised); a few tokens
    often make most of a divergence.
    """
    tokens = max(1, sum(d.tokens for d in distances))
    kl = math.fsum(d.kl for d in distances) / tokens
    spread = math.fsum((d.kl - kl * d.tokens) ** 2 for d in distances)
    return {
        "kl": kl, "kl_error": math.sqrt(spread) / tokens,
        "logprob": math.fsum(d.logprob for d in distances) / tokens,
        "logits": math.fsum(d.logits for d in distances) / tokens,
        "same": sum(d.same for d in distances) / tokens,
    }  # fmt: skip
