"""From a client's request to what is asked of the engine. Everything that can be refused is refused here, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.engine.params import SamplingParams
from moesaic.errors import RequestError
from moesaic.serving.errors import HTTPError, invalid, unsupported
from moesaic.serving.limits import check_choices, check_regex, check_schema, only_one
from moesaic.serving.options import ServeConfig
from moesaic.serving.schema import ChatRequest, CompletionRequest, JSONFormat, Sampling, SchemaFormat

PASSED = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty",
    "min_tokens", "include_stop", "ignore_eos", "skip_special_tokens", "n",
)  # fmt: skip
"""Fields that mean the same, under the same name, to clients and to the engine."""


def sampling_of(request: Sampling, defaults: Mapping[str, Any], limits: ServeConfig) -> dict[str, Any]:
    """The fields of SamplingParams: the checkpoint's defaults with what the client chose. max_tokens: if chosen."""
    chosen: dict[str, Any] = {name: value for name in PASSED if (value := getattr(request, name)) is not None}
    if request.n is not None and request.n > limits.max_n:
        raise invalid("n", f"{request.n} completions, of at most {limits.max_n} (--max-n)")
    if request.seed is not None:
        chosen["seed"] = request.seed % 2**63
    if request.stop is not None:
        chosen["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        chosen["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias is not None:
        chosen["logit_bias"] = {int(token): float(value) for token, value in request.logit_bias.items()}
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "is for streams only; set stream to true")
    logprobs = top_logprobs(request)
    if logprobs is not None:
        if logprobs > limits.max_top_logprobs:
            raise invalid("top_logprobs", f"at most {limits.max_top_logprobs} (--max-top-logprobs)")
        chosen["logprobs"] = logprobs
    limit = token_limit(request)
    if limit is not None:
        chosen["max_tokens"] = limit
    return {**defaults, **chosen} if limit is not None else {**defaults, **chosen, "max_tokens": None}


def top_logprobs(request: Sampling) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    assert isinstance(request, ChatRequest)
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    return (request.top_logprobs or 0) if request.logprobs else None


def token_limit(request: Sampling) -> int | None:
    """max_tokens, under its old or its new name."""
    new = request.max_completion_tokens if isinstance(request, ChatRequest) else None
    if new is not None and request.max_tokens is not None and new != request.max_tokens:
        raise invalid("max_completion_tokens", "differs from max_tokens; give one of them")
    return new if new is not None else request.max_tokens


def params_for(chosen: Mapping[str, Any], prompt: Sequence[int], max_model_len: int, limits: ServeConfig,
               default: int | None) -> SamplingParams:  # fmt: skip
    """For one prompt. default: the checkpoint's own limit of new tokens, less where the prompt leaves less room."""
    most = min(limits.max_prompt_tokens or max_model_len, max_model_len - 1)
    if len(prompt) > most:
        raise HTTPError(400, f"the prompt has {len(prompt)} tokens, and at most {most} fit", param="prompt",
                        code="context_length_exceeded")  # fmt: skip
    room = max_model_len - len(prompt)
    fields = dict(chosen)
    if fields["max_tokens"] is None:
        fields["max_tokens"] = max(min(default or room, room), min(fields.get("min_tokens", 0), room))
    elif fields["max_tokens"] > room:
        what = f"{len(prompt)} prompt tokens leave room for {room} of {max_model_len}"
        raise HTTPError(400, f"max_tokens: {what}", param="max_tokens", code="context_length_exceeded")
    try:
        return SamplingParams(**fields)
    except RequestError as error:
        raise HTTPError.of(error) from None


def grammar_of(request: Sampling, limits: ServeConfig) -> tuple[str, str] | None:
    """What the answer is held to: (kind, text) for the engine."""
    form = request.response_format
    structured = form if isinstance(form, (JSONFormat, SchemaFormat)) else None
    kind = only_one({"response_format": structured, "regex": request.regex, "choice": request.choice})
    if kind is None:
        return None
    if request.ignore_eos or request.min_tokens:
        name = "ignore_eos" if request.ignore_eos else "min_tokens"
        raise unsupported(name, f"cannot be combined with {kind}")
    if kind == "regex":
        return "regex", check_regex(request.regex, "regex")
    if kind == "choice":
        return "choice", check_choices(request.choice or [], limits)
    if isinstance(structured, SchemaFormat):
        schema = structured.json_schema.schema_
        if schema is None:
            raise invalid("response_format.json_schema.schema", "is missing")
        return "json_schema", check_schema(schema, limits, "response_format.json_schema.schema")
    return "json_object", "{}"
