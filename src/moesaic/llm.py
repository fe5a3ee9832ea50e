"""The Python API: `LLM`, its results, and `SamplingParams`.

    from moesaic import LLM, SamplingParams
    llm = LLM("path/or/hub-id", max_model_len=4096)
    print(llm.generate("Hello", SamplingParams(temperature=0, max_tokens=32))[0].text)
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.config import EngineConfig
from moesaic.engine.launch import launch
from moesaic.engine.output import Delta
from moesaic.engine.params import SamplingParams
from moesaic.engine.request import FinishReason
from moesaic.engine.sampler import TokenLogprobs
from moesaic.errors import RequestError
from moesaic.models.checkpoint import Checkpoint
from moesaic.text.chat import ChatTemplate
from moesaic.text.tokenizer import Tokenizer

__all__ = ["LLM", "Completion", "Delta", "Result", "SamplingParams"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass
class Completion:
    """One answer. logprobs: one per token if asked for. error: why it failed, with finish_reason `error`."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def cumulative_logprob(self) -> float:
        return sum(entry.logprob for entry in self.logprobs)


@dataclass
class Result:
    """All completions of one prompt. prompt_logprobs: None for the first token, then one per prompt token."""

    prompt: str | None
    prompt_tokens: list[int]
    completions: list[Completion]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text

    @property
    def tokens(self) -> list[int]:
        """The first completion's token ids."""
        return self.completions[0].tokens


class LLM:
    """A model, loaded and ready. Options are those of `EngineConfig`; an unknown one is an OptionError.

    Not thread-safe: one call at a time. A stream that is not read to its end is aborted.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = EngineConfig.of(options)
        with Checkpoint.open(model, self.config.revision) as checkpoint:
            self.tokenizer = Tokenizer.from_directory(checkpoint.path)
            self.template = ChatTemplate.from_directory(checkpoint.path, self.tokenizer.special_tokens)
            self.launched = launch(checkpoint, self.config, self.tokenizer)
            self.defaults = default_params(checkpoint.generation_config)
        self.engine = self.launched.engine
        self.ids = itertools.count()

    @property
    def max_model_len(self) -> int:
        return self.launched.max_model_len

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[Result]:  # fmt: skip
        """One Result per prompt (a string or token ids), in order. `params`: one for all, or one per prompt.

        Raises RequestError before anything runs if one of them can never be served.
        """
        many = as_prompts(prompts)
        each = self.params_for(params, len(many))
        tokens = [self.encode(prompt, p) for prompt, p in zip(many, each, strict=True)]
        results = [
            Result(prompt if isinstance(prompt, str) else None, ids, [Completion(i) for i in range(p.n)])
            for prompt, ids, p in zip(many, tokens, each, strict=True)
        ]
        self.run(results, each)
        return results

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template: Any,
    ) -> list[Result]:
        """Answers one conversation or several. `template`: options of `ChatTemplate.render` (tools, variables ...)."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        return self.generate([self.chat_tokens(each, **template) for each in conversations], params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Yields each Delta of one prompt as it comes. Closing the iterator aborts the request."""
        params = self.params_for(params, 1)[0]
        if params.n != 1:
            raise RequestError("a stream has one completion", where="n", remedy="Use n=1, or generate().")
        request_id = f"stream-{next(self.ids)}"
        self.engine.add(request_id, self.encode(prompt, params), params)
        try:
            while request_id in self.engine.states:
                yield from (delta for delta in self.engine.step() if delta.request_id == request_id)
        finally:
            self.engine.abort(request_id)

    def chat_tokens(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """The prompt of a conversation, by the checkpoint's own template."""
        text = self.template.render(messages, **template)
        return self.tokenizer.encode(text, add_special_tokens=False, max_tokens=self.max_model_len)

    def encode(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """Token ids of a prompt. Raises RequestError where it is empty or cannot fit."""
        if not isinstance(prompt, str):
            return list(prompt)
        ids = self.tokenizer.encode(prompt, max_tokens=self.max_model_len)
        if not prompt or not ids:
            raise RequestError("is empty", where="prompt", remedy="Give at least one token.")
        return ids

    def params_for(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.defaults] * count
        if len(params) != count:
            raise RequestError(
                f"{len(params)} for {count} prompts", where="params", remedy="Give one, or one per prompt."
            )
        return list(params)

    def run(self, results: list[Result], params: list[SamplingParams]) -> None:
        """Queues every completion, runs to the end and fills the results in."""
        live: dict[str, tuple[Result, Completion]] = {}
        try:
            for result, p in zip(results, params, strict=True):
                for completion in result.completions:
                    request_id = f"run-{next(self.ids)}"
                    self.engine.add(request_id, result.prompt_tokens, p, completion.index)
                    live[request_id] = (result, completion)
            self.drain(live)
        finally:
            for request_id in live:
                self.engine.abort(request_id)

    def drain(self, live: dict[str, tuple[Result, Completion]]) -> None:
        from tqdm import tqdm

        show = self.config.progress and len(live) > 1 and sys.stderr.isatty()
        with tqdm(total=len(live), desc="generating", unit="answer", disable=not show) as bar:
            while live:
                for delta in self.engine.step():
                    if delta.request_id in live:
                        record(*live[delta.request_id], delta)
                        if delta.finish_reason is not None:
                            del live[delta.request_id]
                            bar.update()


def record(result: Result, completion: Completion, delta: Delta) -> None:
    """Adds a delta to the completion that it continues."""
    completion.text += delta.text
    completion.tokens += delta.tokens
    completion.logprobs += delta.logprobs
    completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
    completion.error = delta.error
    result.cached_tokens = delta.cached_tokens
    if delta.prompt_logprobs is not None:
        result.prompt_logprobs = delta.prompt_logprobs


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A string, or a sequence of ids, is one prompt; anything else is several."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [each for each in prompts if isinstance(each, int)]
    texts = [each for each in prompts if not isinstance(each, int)]
    if ids and texts:
        raise RequestError("mixes token ids and prompts", where="prompts", remedy="Give one prompt's ids, or a list.")
    return [ids] if ids else texts


def default_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What the checkpoint recommends: greedy unless it says do_sample; its limit of new tokens if it has one."""
    limit = generation_config.get("max_new_tokens")
    limit = limit if isinstance(limit, int) and limit > 0 else None
    if not generation_config.get("do_sample"):
        return SamplingParams(temperature=0.0, max_tokens=limit)
    known = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "top_k": 0}
    given: dict[str, Any] = {**known, **{k: v for k, v in generation_config.items() if k in known and v is not None}}
    return SamplingParams(**given, max_tokens=limit)
