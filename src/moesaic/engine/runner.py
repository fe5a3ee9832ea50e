"""Runs one step on the model: tensors in, sampled tokens out. R sampled rows, D hidden size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.engine.batch import make_input
from moesaic.engine.graphs import DecodeGraphs
from moesaic.engine.sampler import Row, Sampled, TokenLogprobs, prompt_logprobs, sample
from moesaic.engine.scheduler import Chunk, Step
from moesaic.engine.tapes import DecodeTapes
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput
from moesaic.models.decoder import Decoder


@dataclass(frozen=True)
class StepResult:
    """sampled: one entry per sampling chunk, in their order. prompt: per request id, the position of the first entry
    and log-probs of the prompt tokens from there on (a row predicts the token after it)."""

    sampled: Sampled
    prompt: dict[str, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)


class Runner:
    """Owns the model and its KV pool. count_near_ties: report choices that a rounding could have turned.

    graphs: captured decoding steps, or None.
    """

    def __init__(self, model: Decoder, pool: KVPool, device: torch.device, count_near_ties: bool = False,
                 graphs: DecodeGraphs | DecodeTapes | None = None) -> None:  # fmt: skip
        self.model, self.pool, self.device, self.count_near_ties = model, pool, device, count_near_ties
        self.graphs = graphs

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        if self.graphs and self.graphs.fits(step):
            rows = [sampler_row(chunk) for chunk in step.chunks]
            return StepResult(sample(self.graphs.run(step), rows, count_near_ties=self.count_near_ties))
        inputs = make_input(step, self.pool, self.device)
        hidden_TD = self.model(inputs)
        pairs = zip(step.chunks, inputs.attention.spans, strict=True)
        sampling = [(chunk, span) for chunk, span in pairs if chunk.sample]
        prompt = self.prompt_logprobs(step, inputs, hidden_TD)
        if not sampling:
            return StepResult(Sampled([], [], [], []), prompt)
        if len(sampling) < len(hidden_TD):
            last_R = torch.tensor([span.start + span.count - 1 for _, span in sampling], device=self.device)
            hidden_TD = hidden_TD.index_select(0, last_R)
        rows = [sampler_row(chunk) for chunk, _ in sampling]
        return StepResult(sample(self.model.logits(hidden_TD), rows, count_near_ties=self.count_near_ties), prompt)

    def prompt_logprobs(
        self, step: Step, inputs: StepInput, hidden_TD: Tensor
    ) -> dict[str, tuple[int, list[TokenLogprobs]]]:
        """For the chunks whose request asked: row at position p predicts the prompt token p + 1."""
        found: dict[str, tuple[int, list[TokenLogprobs]]] = {}
        for chunk, span in zip(step.chunks, inputs.attention.spans, strict=True):
            request, top = chunk.request, chunk.request.params.prompt_logprobs
            targets = request.prompt[chunk.start + 1 : chunk.start + chunk.count + 1]
            if top is not None and targets:
                rows_RD = hidden_TD[span.start : span.start + len(targets)]
                targets_R = torch.tensor(targets, device=self.device)
                entries = prompt_logprobs(self.model.logits(rows_RD), targets_R, top)
                found[request.id] = chunk.start + 1, entries
        return found


def sampler_row(chunk: Chunk) -> Row:
    """What the sampler needs of a request. Token lists are handed over only where a penalty reads them."""
    request = chunk.request
    params = request.params
    penalised = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    output: Sequence[int] = request.output if penalised else range(request.num_output)
    return Row(params, request.prompt, output, request.seed, request.eos_token_ids, request.guide)
