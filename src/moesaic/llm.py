"""The Python API: `LLM`, its results, and `SamplingParams`.

    from moesaic import LLM, SamplingParams
    llm = LLM("path/or/hub-id", max_model_len=4096)
    print(llm.generate("Hello", SamplingParams(temperature=0, max_tokens=32))[0].text)
"""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.assets import embedded_model
from moesaic.config import EngineConfig
from moesaic.engine.launch import launch
from moesaic.engine.output import Delta
from moesaic.engine.params import SamplingParams
from moesaic.engine.request import FinishReason
from moesaic.engine.sampler import TokenLogprobs
from moesaic.errors import CheckpointError, RequestError
from moesaic.models.build import spec_of
from moesaic.models.checkpoint import Checkpoint
from moesaic.text.byte_tokenizer import byte_tokenizer
from moesaic.text.chat import ChatTemplate
from moesaic.text.tokenizer import TOKENIZER_FILES, Tokenizer

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

    Not thread-safe. Several streams may be read in turn; one that is not read to its end is aborted when closed.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        """model: a directory or a hub id; None is the embedded model."""
        self.config = EngineConfig.of(options)
        weights = self.config.load_format != "dummy"
        with Checkpoint.open(model or embedded_model(), self.config.revision, weights=weights) as checkpoint:
            self.path = checkpoint.path
            self.tokenizer = tokenizer_of(checkpoint)
            self.template = ChatTemplate.from_directory(checkpoint.path, self.tokenizer.special_tokens)
            self.launched = launch(checkpoint, self.config, self.tokenizer)
            self.defaults = default_params(checkpoint.generation_config)
        self.engine = self.launched.engine
        self.ids = itertools.count()
        self.inbox: dict[str, list[Delta]] = {}

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
        tokens = [self.encode(prompt) for prompt in many]
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
        if not messages:
            raise RequestError("is empty", where="messages", remedy="Give at least one message.")
        single = isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        return self.generate([self.chat_tokens(each, **template) for each in conversations], params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Yields each Delta of one prompt as it comes. Closing the iterator aborts the request."""
        params = self.params_for(params, 1)[0]
        if params.n != 1:
            raise RequestError("a stream has one completion", where="n", remedy="Use n=1, or generate().")
        request_id = f"stream-{next(self.ids)}"
        self.engine.add(request_id, self.encode(prompt), params)
        box = self.inbox[request_id] = []
        try:
            while box or request_id in self.engine.states:
                if not box:
                    self.step()
                ready, box[:] = list(box), []
                yield from ready
        finally:
            del self.inbox[request_id]
            self.engine.abort(request_id)

    def step(self) -> list[Delta]:
        """One engine step. What belongs to an open stream is also kept for its reader."""
        deltas = self.engine.step()
        for delta in deltas:
            if delta.request_id in self.inbox:
                self.inbox[delta.request_id].append(delta)
        return deltas

    def chat_tokens(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """The prompt of a conversation, by the checkpoint's own template. Raises RequestError for an unknown option."""
        known = list(inspect.signature(self.template.render).parameters)[1:]
        for name in template:
            if name not in known:
                remedy = f"Options of a template: {', '.join(known)}. How to sample belongs into SamplingParams."
                raise RequestError("unknown option of chat", where=name, remedy=remedy)
        text = self.template.render(messages, **template)
        return self.tokenizer.encode(text, add_special_tokens=False, max_tokens=self.max_model_len)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises RequestError where it is empty, cannot fit, or holds something else."""
        if not isinstance(prompt, str):
            try:
                return [operator.index(token) for token in prompt]
            except (TypeError, ValueError, RuntimeError):
                what = "is neither text nor token ids"
                raise RequestError(what, where="prompt", remedy="Give a string or ids.") from None
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
                for delta in self.step():
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
    many: list[Any] = list(prompts)  # told apart by what they can do, not by type
    single = [is_index(each) for each in many]
    if any(single) and not all(single):
        raise RequestError("mixes token ids and prompts", where="prompts", remedy="Give one prompt's ids, or a list.")
    return [many] if many and single[0] else many


def is_index(value: object) -> bool:
    """Whether this is an integer: Python's, NumPy's, or a tensor of one."""
    try:
        operator.index(value)  # type: ignore[arg-type]  # that is the question
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's; one that was opened without weights may lack it, and gets bytes for tokens."""
    if checkpoint.files or any((checkpoint.path / name).is_file() for name in TOKENIZER_FILES):
        return Tokenizer.from_directory(checkpoint.path)
    return byte_tokenizer(spec_of(checkpoint.config).vocab)


def default_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What the checkpoint recommends: greedy unless it says do_sample; its limit of new tokens if it has one.

    Raises CheckpointError where it recommends what cannot be.
    """
    known = ("temperature", "top_p", "min_p", "repetition_penalty", "top_k", "max_new_tokens")
    given = {name: generation_config[name] for name in known if generation_config.get(name) is not None}
    if not generation_config.get("do_sample"):
        given["temperature"] = 0.0
    if isinstance(top_k := given.get("top_k"), int):
        given["top_k"] = max(0, top_k)  # -1 is another spelling of off
    try:
        return SamplingParams(max_tokens=given.pop("max_new_tokens", None), **given)
    except RequestError as error:
        raise CheckpointError(
            error.what, where=f"generation_config.json: {error.where}", remedy="Correct the file."
        ) from None
