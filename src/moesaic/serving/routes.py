"""What the server answers, path by path."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from moesaic.errors import RequestError
from moesaic.serving.asking import grammar_of, sampling_of
from moesaic.serving.chat import ChatWriter
from moesaic.serving.completions import TextWriter
from moesaic.serving.errors import HTTPError, invalid, unsupported
from moesaic.serving.gate import send_bytes, send_json
from moesaic.serving.metrics import CONTENT_TYPE
from moesaic.serving.rendering import chat_prompt
from moesaic.serving.running import Writer, stream, watched, whole
from moesaic.serving.schema import ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, Strict, TokenizeRequest
from moesaic.serving.session import Ask, Job
from moesaic.serving.state import State
from moesaic.text.tokenizer import TooLongError

INLINE_CHARS = 20_000
"""Text up to this long is tokenised at once (2 ms); longer text in a thread, so that nobody waits for it."""
STATS_PATIENCE = 1.0
Body = TypeVar("Body", bound=Strict)


@dataclass(frozen=True)
class Call:
    """One HTTP request, as a handler sees it."""

    state: State
    scope: Scope
    receive: Receive
    send: Send

    def note(self, **fields: Any) -> None:
        """For the log line of this request."""
        self.scope["moesaic.note"].update(fields)

    async def answer(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        await send_json(self.send, value, status, headers)

    async def body(self, kind: type[Body]) -> Body:
        """Raises HTTPError: 415 no JSON, 413 too large, 400 malformed, unknown or out of range."""
        headers = dict(self.scope["headers"])
        media = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if media != b"application/json":
            raise HTTPError(415, "the body must be JSON, with content-type: application/json", code="unsupported_media")
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            raise HTTPError(415, "the body must be sent as it is, without content-encoding", code="unsupported_media")
        raw = await self.raw(headers.get(b"content-length", b"0"))
        try:
            return kind.model_validate_json(raw)
        except ValidationError as error:
            raise refused(error) from None

    async def raw(self, announced: bytes) -> bytes:
        limit = self.state.config.max_body
        large = HTTPError(413, f"the body has more than {limit} bytes (--max-body)", code="body_too_large")
        if announced.isdigit() and int(announced[:20]) > limit:
            raise large
        found = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise HTTPError(400, "the request ended before its body did")
            found += message.get("body", b"")
            if len(found) > limit:
                raise large
            if not message.get("more_body"):
                return bytes(found)


def refused(error: ValidationError) -> HTTPError:
    """The first thing wrong with a body, named."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = [each for each in found if each["type"] == "extra_forbidden"]
    first = (unknown or found)[0]
    if first["type"] == "json_invalid":
        return HTTPError(400, f"the body is not JSON ({first['msg']})", code="invalid_json")
    path = ".".join(str(part) for part in first["loc"]) or "body"
    name = str(first["loc"][0]) if first["loc"] else None
    if unknown:
        return HTTPError(400, f"{path}: is not supported by this server", param=name, code="unsupported_parameter")
    return HTTPError(400, f"{path}: {first['msg']}", param=name, code="invalid_value")


# --- generation ------------------------------------------------------------------------------------------------------


async def encode(state: State, text: str, where: str = "prompt", *, special: bool = True, beside: int = 0) -> list[int]:
    """Token ids. Raises HTTPError where the text is empty, too long, or not text. beside: characters of all prompts."""

    def work() -> list[int]:
        return state.tokenizer.encode(text, special, max_tokens=state.max_model_len)

    try:
        ids = work() if len(text) + beside <= INLINE_CHARS else await asyncio.to_thread(work)
    except RequestError as error:
        code = "context_length_exceeded" if isinstance(error, TooLongError) else "invalid_value"
        raise HTTPError(400, f"{where}: {error.what}. {error.remedy}", param=where, code=code) from None
    if not text or not ids:
        raise invalid(where, "is empty")
    return ids


async def completions(call: Call) -> None:
    request = await call.body(CompletionRequest)
    state = call.state
    state.check_model(request.model)
    chosen = sampling_of(request, state.defaults, state.config)
    grammar = grammar_of(request, state.config)
    given = request.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        many: list[Any] = [given]
    else:
        many = list(given)
    if len(many) * (request.n or 1) > state.session.capacity:
        raise invalid("prompt", f"too many completions in one request, of at most {state.session.capacity}")
    size = sum(len(each) for each in many if isinstance(each, str))
    prompts = [await encode(state, each, beside=size) if isinstance(each, str) else list(each) for each in many]
    call.note(user=request.user, **({"prompt": given} if state.config.log_prompts else {}))
    job = state.session.submit([Ask(p, state.params(chosen, p), grammar) for p in prompts])
    writer = TextWriter(request, state.name(request.model), state.tokenizer, job.index, prompts)
    await respond(call, request, job, writer)


async def chat(call: Call) -> None:
    request = await call.body(ChatRequest)
    state = call.state
    state.check_model(request.model)
    chosen = sampling_of(request, state.defaults, state.config)
    grammar = grammar_of(request, state.config)
    text, tools = await chat_prompt(state, request)
    prompt = await encode(state, text, "messages", special=False)
    call.note(user=request.user, **({"prompt": text} if state.config.log_prompts else {}))
    if state.reader.special(tools=tools is not None):
        if request.skip_special_tokens:
            raise unsupported("skip_special_tokens", "must be false here: the answer is read by its special tokens")
        chosen["skip_special_tokens"] = False
    job = state.session.submit([Ask(prompt, state.params(chosen, prompt), grammar)])

    def parser() -> Any:
        return state.reader.parser(text, tools, grammar[0] if grammar else None)

    writer = ChatWriter(request, state.name(request.model), state.tokenizer, job.index, prompt, parser)
    await respond(call, request, job, writer)


async def respond(call: Call, request: Sampling, job: Job, writer: Writer) -> None:
    """Streams or collects, and says in the log what it was."""
    state = call.state
    async with watched(job, call.receive, state.config.request_timeout):
        if request.stream:
            await stream(job, writer, call.scope, call.send, {})
        else:
            await call.answer(await whole(job, writer))
    counts = writer.usage()
    tokens = {name: counts[name] for name in ("prompt_tokens", "completion_tokens")}
    call.note(stream=bool(request.stream), **tokens)


# --- the rest --------------------------------------------------------------------------------------------------------


async def models(call: Call) -> None:
    await call.answer({"object": "list", "data": [call.state.model_card(name) for name in call.state.names]})


async def model(call: Call) -> None:
    name = call.scope["path_params"]["model"]
    call.state.check_model(name)
    await call.answer(call.state.model_card(name))


async def tokenize(call: Call) -> None:
    request, state = await call.body(TokenizeRequest), call.state
    state.session.check_open()
    if request.model is not None:
        state.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("prompt", "give a prompt or messages, not both")
    if request.messages is not None:
        text, _ = await chat_prompt(state, ChatRequest(model="", messages=request.messages))
        ids = await encode(state, text, "messages", special=False)
    else:
        text = request.prompt or ""
        ids = await encode(state, text, special=request.add_special_tokens) if text else []
    await call.answer({"tokens": ids, "count": len(ids), "max_model_len": state.max_model_len})


async def detokenize(call: Call) -> None:
    request, state = await call.body(DetokenizeRequest), call.state
    state.session.check_open()
    if request.model is not None:
        state.check_model(request.model)
    wrong = next((token for token in request.tokens if token >= state.session.info["vocab"]), None)
    if wrong is not None:
        raise invalid("tokens", f"{wrong} is not in [0, {state.session.info['vocab']})")
    await call.answer({"prompt": state.tokenizer.decode(request.tokens, request.skip_special_tokens)})


async def health(call: Call) -> None:
    """Whether the server should be kept: the engine lives, or is still being started."""
    dead = call.state.session.state == "dead"
    await call.answer({"status": "the engine has died" if dead else "ok"}, 503 if dead else 200)


async def ready(call: Call) -> None:
    """Whether requests are taken."""
    state = call.state.session.state
    await call.answer({"status": state}, 200 if state == "ready" else 503)


async def plan(call: Call) -> None:
    call.state.session.check_open()
    await call.answer({"model": call.state.names[0], "plan": call.state.session.info["plan"]})


async def metrics(call: Call) -> None:
    """The engine is asked for its counts; one in a long step, or dead, is shown as it last was."""
    session = call.state.session
    if session.state in ("ready", "draining"):
        try:
            session.metrics.engine.stats = await session.ask("stats", STATS_PATIENCE)
        except (TimeoutError, HTTPError):
            session.metrics.stale.inc()
    await send_bytes(call.send, session.metrics.text(), CONTENT_TYPE)


async def flush_cache(call: Call) -> None:
    """Forgets the prefix cache. 409 while requests hold parts of the pool."""
    problem = await call.state.session.ask("flush", 30.0)
    if problem is not None:
        raise HTTPError(409, problem, code="in_use")
    await call.answer({"status": "ok"})


async def openapi(call: Call) -> None:
    await send_bytes(call.send, json.dumps(call.state.document()).encode(), "application/json")


Handler = Callable[[Call], Awaitable[None]]
