"""The engine's loop: schedule -> run -> commit -> say what is new. One thread at a time.

On a GPU the loop runs ahead of itself: while a step runs, the next one is scheduled, prepared and queued behind it, and
only then are the first one's tokens read. The device never waits for the host, unless the next step cannot be made
without these tokens (grammars, penalties) or without giving somebody's blocks away. What a request gets is the same.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.engine.output import Delta, OutputState
from moesaic.engine.params import SamplingParams
from moesaic.engine.request import FinishReason, Request
from moesaic.engine.runner import Flight, Runner, StepResult
from moesaic.engine.sampler import TokenLogprobs, validate
from moesaic.engine.scheduler import Scheduler, Step
from moesaic.errors import RequestError
from moesaic.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moesaic.engine.grammar import Guide

log = logging.getLogger("moesaic.engine")


@dataclass
class Stats:
    """Counts since the engine was made; prompt_tokens and cached_tokens include recomputation after preemption.

    near_ties: choices that a rounding of the logits could have turned.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    near_ties: int = 0


class Engine:
    """Requests in, deltas out. `tokenizer` None means token ids only: no text, no stop strings.

    overlap: run ahead.  flying: the step that was launched and not read yet.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: Tokenizer | None, eos_token_ids: frozenset[int],
                 seed: int = 0, deterministic: bool = False, overlap: bool = False) -> None:  # fmt: skip
        self.scheduler, self.runner, self.tokenizer, self.eos_token_ids = scheduler, runner, tokenizer, eos_token_ids
        self.vocab = runner.model.spec.vocab
        self.stats = Stats()
        self.states: dict[str, OutputState] = {}
        self.seed, self.seeds, self.deterministic = seed, random.Random(seed), deterministic
        self.overlap = overlap
        self.flying: Flight | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.flying is not None

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams, index: int = 0,
            guide: Callable[[frozenset[int]], Guide] | None = None) -> Request:  # fmt: skip
        """Queues one completion. index: which of `n` completions, so that one seed gives n different ones.
        guide: makes the guide of a grammar, given the tokens that end the answer.

        Raises RequestError for what this model or cache can never serve; then nothing was queued.
        """
        validate(params, self.vocab)
        wrong = next((token for token in prompt if type(token) is not int or not 0 <= token < self.vocab), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong!r:.40} is no integer in [0, {self.vocab})", where="prompt",
                               remedy="Check the ids.")  # fmt: skip
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer", where="stop", remedy="Use stop_token_ids.")
        seed = self.own_seed(prompt) if params.seed is None else params.seed
        request = Request(request_id, prompt, params, self.eos_token_ids, mix(seed, index))
        if guide is not None:
            if not request.stops:
                raise RequestError("an answer held to a grammar ends with an end token", where="ignore_eos",
                                   remedy="Leave it out, or give stop_token_ids.")  # fmt: skip
            request.guide = guide(request.stops)
        state = OutputState(request, self.tokenizer)
        self.scheduler.add(request)
        self.states[request_id] = state
        return request

    def own_seed(self, prompt: Sequence[int]) -> int:
        """For a request that brings none. In deterministic mode it must not depend on who came before."""
        if not self.deterministic:
            return self.seeds.getrandbits(62)
        digest = hashlib.sha256(repr((self.seed, tuple(prompt))).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 2

    def abort(self, request_id: str) -> None:
        """Frees the request at once; it yields nothing more. Unknown or ended ids are ignored."""
        self.scheduler.abort(request_id)
        self.states.pop(request_id, None)

    def step(self) -> list[Delta]:
        """One forward pass. Returns what is new, empty where there was nothing to do."""
        flying = self.flying = self.flying or self.launch()
        if flying is None:
            return []
        self.flying = self.launch_ahead(flying) if self.overlap else None
        try:
            result = flying.finish()
        except BaseException:
            if self.flying is not None:
                self.scheduler.discard(self.flying.step)
                self.flying = None
            self.scheduler.discard(flying.step)
            raise
        return self.commit(flying.step, result)

    def launch(self) -> Flight | None:
        """Schedules and launches the next step, if there is one."""
        step = self.scheduler.schedule()
        if step is None:
            return None
        try:
            return self.runner.launch(step)
        except BaseException:
            self.scheduler.discard(step)
            raise

    def launch_ahead(self, flying: Flight) -> Flight | None:
        """The step behind the one that flies. One that fails to launch is made again once this one has landed: if it
        then fails too, it fails where requests can be told apart."""
        if flying.sampling is not None and not all(row.settled for row in flying.sampling.rows):
            return None
        self.scheduler.advance(flying.step)
        try:
            return self.launch()
        except Exception:
            log.exception("a step could not be launched ahead")
            return None

    def commit(self, step: Step, result: StepResult) -> list[Delta]:
        """Records a step that ran and turns it into deltas."""
        sampling, sampled = [chunk for chunk in step.chunks if chunk.sample], result.sampled
        counts = [self.alive(chunk.request) and self.scheduler.counts(step, chunk.request) for chunk in sampling]
        deltas = [self.fail(sampling[i].request) for i in sampled.failed if counts[i]]
        for request, start, found in result.prompt:
            if self.alive(request):
                self.states[request.id].add_prompt_logprobs(start, found)
        self.scheduler.commit(step, sampled.tokens)
        for i in sampled.late:
            if counts[i]:  # else the step behind this one was scheduled in the knowledge that this one is void
                self.scheduler.void(sampling[i].request)
        for chunk, token, logprobs, one in zip(sampling, sampled.tokens, sampled.logprobs, counts, strict=True):
            if one and self.alive(chunk.request):
                deltas.append(self.say(chunk.request, token, logprobs))
        self.count(step, counts, result)
        return deltas

    def alive(self, request: Request) -> bool:
        """Whether anybody still waits for its tokens. Ids may come again, so it is the request itself that is asked."""
        state = self.states.get(request.id)
        return state is not None and state.request is request

    def say(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> Delta:
        """`delta`, or the end of that one request where its text cannot be made: the step's others are not lost."""
        try:
            if request.guide is not None:
                request.guide.accept(token)
            return self.delta(request, token, logprobs)
        except Exception:  # whatever it is, it is this request's
            log.exception("the text of request %s cannot be made", request.id)
            return self.fail(request, "the text of the answer could not be made")

    def delta(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> Delta:
        """The request's new token as text; ends the request at a stop string."""
        state = self.states[request.id]
        text, hit = state.push(token)
        if hit is not None and request.finish_reason is None:
            self.scheduler.finish(request, FinishReason.STOP, hit)
        if request.finish_reason is not None and hit is None:
            rest, hit = state.finish()
            text += rest
        if request.finish_reason is not None:
            del self.states[request.id]
        return Delta(
            request.id, text, (token,), () if logprobs is None else (logprobs,), state.take_prompt_logprobs(),
            FinishReason.STOP if hit else request.finish_reason, hit or request.stop_reason,
            request.cached_prompt_tokens,
        )  # fmt: skip

    def fail(self, request: Request, why: str = "the model produced no valid logits", status: int = 500) -> Delta:
        """Ends one request (by default one whose logits are not numbers); the others go on."""
        self.scheduler.finish(request, FinishReason.ERROR)
        self.states.pop(request.id, None)
        return Delta(request.id, "", (), finish_reason=FinishReason.ERROR, error=why, status=status)

    def count(self, step: Step, counts: list[bool], result: StepResult) -> None:
        """counts: which of the sampled chunks yielded a token for somebody."""
        stats = self.stats
        stats.steps += 1
        stats.generated_tokens += sum(counts)
        if not step.decode:
            stats.prompt_tokens += sum(min(c.count, max(0, c.request.num_prompt - c.start)) for c in step.chunks)
        stats.preemptions += len(step.preempted)
        stats.cached_tokens = self.scheduler.blocks.hits
        if self.runner.count_near_ties:
            stats.near_ties += sum(near for near, one in zip(result.sampled.near_tie, counts, strict=True) if one)

    def check(self) -> None:
        """Every invariant of scheduler and cache; AssertionError where one is broken."""
        self.scheduler.check()


def mix(seed: int, index: int) -> int:
    """Distinct streams for the completions of one request."""
    return (seed + index * 0x9E3779B97F4A7C15) % (1 << 63)
