"""What comes out of the engine, and the text side of a request: detokenising and stop strings."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.engine.request import FinishReason, Request
from moesaic.engine.sampler import TokenLogprobs
from moesaic.text.detokenize import IncrementalDetokenizer
from moesaic.text.stops import StopChecker
from moesaic.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one request. The last one of a request has a finish_reason.

    text: newly final text (a stop string's beginning and unfinished characters are held back).
    tokens: new ids.  logprobs: one per new id if asked for.  prompt_logprobs: with the first delta, if asked for: None
    for the first prompt token, then one per token.  error: why the request failed; status: whose fault it was, as HTTP
    says it.
    """

    request_id: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    error: str | None = None
    status: int = 500


class OutputState:
    """Per request: from sampled ids to final text."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.request = request
        self.detokenizer = (
            IncrementalDetokenizer(tokenizer, request.prompt, params.skip_special_tokens) if tokenizer else None
        )
        self.stops = StopChecker(params.stop, params.include_stop) if params.stop else None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]

    def push(self, token: int) -> tuple[str, str | None]:
        """(new final text, the stop string that was hit). The token that ends a request for good adds no text."""
        request = self.request
        if self.detokenizer is None or (request.finish_reason is FinishReason.STOP and token in request.stops):
            return "", None
        text = self.detokenizer.push((token,))
        if self.stops is None:
            return text, None
        return self.stops.push(text, active=request.num_output >= request.params.min_tokens)

    def finish(self) -> tuple[str, str | None]:
        """What was held back, once the request has ended without a stop string."""
        text, hit = (self.detokenizer.finish() if self.detokenizer else ""), None
        if self.stops is not None:
            text, hit = self.stops.push(text, active=self.request.num_output >= self.request.params.min_tokens)
            text += "" if hit else self.stops.flush()
        return text, hit

    def add_prompt_logprobs(self, start: int, found: list[TokenLogprobs]) -> None:
        """Entries from prompt position `start` on; those already known (recomputed after preemption) are skipped."""
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += found[len(self.prompt_logprobs) - start :]

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """The prompt's log-probs, once."""
        found, self.prompt_logprobs = self.prompt_logprobs, None
        return None if found is None else tuple(found)
