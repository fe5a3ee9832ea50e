"""Runs one step on the model: tensors in, sampled tokens out. R sampled rows, D hidden size.

A step is launched, and its tokens are read later: on a GPU it then still runs, and the next one may be launched behind
it. What the next step needs of this one's tokens stays on the device (`feed.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.engine.batch import make_input
from moesaic.engine.draw import pick
from moesaic.engine.feed import Feed
from moesaic.engine.graphs import DecodeGraphs
from moesaic.engine.logprobs import TokenLogprobs, entries, report
from moesaic.engine.request import Request
from moesaic.engine.rows import Fetch, Row, upload
from moesaic.engine.sampler import Sampled, Sampling, begin
from moesaic.engine.scheduler import Chunk, Step
from moesaic.engine.tapes import DecodeTapes
from moesaic.kernels.ops import Span
from moesaic.layers.kv_pool import KVPool
from moesaic.models.decoder import Decoder


@dataclass(frozen=True)
class StepResult:
    """sampled: one entry per sampling chunk, in their order. prompt: requests that asked for it, with the position of
    the first entry and log-probs of the prompt tokens from there on (a row predicts the token after it)."""

    sampled: Sampled
    prompt: tuple[tuple[Request, int, list[TokenLogprobs]], ...] = ()


@dataclass(frozen=True)
class Flight:
    """A step that was launched. prompt: (request, position, alternatives, report) of prompt log-probs."""

    step: Step
    sampling: Sampling | None
    prompt: tuple[tuple[Request, int, list[int], Fetch], ...] = ()

    def finish(self) -> StepResult:
        """Waits for it."""
        sampled = self.sampling.finish() if self.sampling else Sampled([], [], [], [])
        found = [(request, start, entries(fetch.read(), tops)) for request, start, tops, fetch in self.prompt]
        return StepResult(sampled, tuple(found))


class Runner:
    """Owns the model and its KV pool. count_near_ties: report choices that a rounding could have turned.

    most: chunks of the largest step.  graphs: captured decoding steps, or None.
    """

    def __init__(self, model: Decoder, pool: KVPool, feed: Feed, count_near_ties: bool = False,
                 graphs: DecodeGraphs | DecodeTapes | None = None) -> None:  # fmt: skip
        self.model, self.pool, self.feed, self.count_near_ties = model, pool, feed, count_near_ties
        self.device, self.graphs = feed.device, graphs

    def run(self, step: Step) -> StepResult:
        return self.launch(step).finish()

    @torch.inference_mode()
    def launch(self, step: Step) -> Flight:
        """Queues a step behind whatever runs."""
        meter = self.model.meter
        if self.graphs and self.graphs.fits(step):
            meter.steps += self.graphs.metered
            scores_RV, packed_2R = self.graphs.run(step)
            chunks = step.chunks if step.decode else [chunk for chunk in step.chunks if chunk.sample]
            if not chunks:
                self.feed.keep((), self.feed.chosen_R[:0])
                return Flight(step, None)
            return Flight(step, self.sample(chunks, scores_RV, packed_2R, fleeting=True))
        meter.steps += meter.on
        inputs = make_input(step, self.pool, self.feed)
        hidden_TD = self.model(inputs)
        prompt = self.prompt_logprobs(step, inputs.attention.spans, hidden_TD)
        pairs = zip(step.chunks, inputs.attention.spans, strict=True)
        sampling = [(chunk, span) for chunk, span in pairs if chunk.sample]
        if not sampling:
            self.feed.keep((), self.feed.chosen_R[:0])
            return Flight(step, None, prompt)
        if len(sampling) < len(hidden_TD):
            last_R = upload([span.start + span.count - 1 for _, span in sampling], torch.int64, self.device)
            hidden_TD = hidden_TD.index_select(0, last_R)
        chunks = [chunk for chunk, _ in sampling]
        return Flight(step, self.sample(chunks, self.model.scores(hidden_TD)), prompt)

    def sample(self, chunks: Sequence[Chunk], scores_RV: Tensor, packed_2R: Tensor | None = None, *,
               fleeting: bool = False) -> Sampling:  # fmt: skip
        """packed_2R: the greedy choice, where it has been made already.  fleeting: both may soon be overwritten."""
        rows = [sampler_row(chunk) for chunk in chunks]
        plain = all(row.plain for row in rows)
        if plain and packed_2R is None:
            packed_2R = pick(self.model.ops, scores_RV)
        if plain and packed_2R is not None:
            sampling = Sampling(packed_2R, rows)
        else:
            logits_RV = scores_RV.float()
            fleeting &= logits_RV is scores_RV
            sampling = begin(logits_RV, rows, count_near_ties=self.count_near_ties, fleeting=fleeting)
        self.feed.keep((chunk.request for chunk in chunks), sampling.tokens_R)
        return sampling

    def prompt_logprobs(
        self, step: Step, spans: Sequence[Span], hidden_TD: Tensor
    ) -> tuple[tuple[Request, int, list[int], Fetch], ...]:
        """For the chunks whose request asked: row at position p predicts the prompt token p + 1."""
        found = []
        for chunk, span in zip(step.chunks, spans, strict=True):
            request, top = chunk.request, chunk.request.params.prompt_logprobs
            targets = request.prompt[chunk.start + 1 : chunk.start + chunk.count + 1]
            if top is not None and targets:
                logits_TV = self.model.logits(hidden_TD[span.start : span.start + len(targets)])
                tops = [top] * len(targets)
                reported = report(logits_TV, upload(targets, torch.int64, self.device), tops)
                found.append((request, chunk.start + 1, tops, Fetch(reported)))
        return tuple(found)


def sampler_row(chunk: Chunk) -> Row:
    """What the sampler needs of a request. Token lists are handed over only where a penalty reads them."""
    request = chunk.request
    params = request.params
    penalised = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    output: Sequence[int] = request.output if penalised else range(request.num_output)
    return Row(params, request.prompt, output, request.seed, request.eos_token_ids, request.guide)
