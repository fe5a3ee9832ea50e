"""`/v1/chat/completions`: a conversation through the checkpoint's template; reasoning and tool calls told apart."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from moesaic.serving.answers import usage
from moesaic.serving.logprobs import chat_logprobs
from moesaic.serving.parsers.base import Parser, Part, Plain
from moesaic.serving.schema import ChatRequest
from moesaic.serving.wire import Logprob, Piece
from moesaic.text.tokenizer import Tokenizer


class ChatChoice:
    """One answer as it grows."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser
        self.plain = isinstance(parser, Plain)
        self.begun = False
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.thinking = self.cached = 0  # tokens
        self.finish: str | None = None
        self.stop: int | str | None = None

    def add(self, piece: Piece) -> Sequence[Part]:
        """What a piece adds to the message."""
        self.tokens += piece.tokens
        self.thinking += len(piece.tokens) if self.parser.reasoning else 0
        self.cached = max(self.cached, piece.cached)
        parts = list(self.parser.push(piece.text))
        if piece.finish is not None:
            parts += self.parser.end()
            self.finish, self.stop = piece.finish, piece.stop
        return parts

    def call(self, part: Part) -> dict[str, Any]:
        found = {"id": f"call_{secrets.token_hex(12)}", "type": "function",
                 "function": {"name": part.name, "arguments": part.text}}  # fmt: skip
        self.calls.append(found)
        return found

    @property
    def reason(self) -> str | None:
        return "tool_calls" if self.calls and self.finish == "stop" else self.finish


class ChatWriter:
    """Answers of `/v1/chat/completions`. parser: makes one per answer.  prompt: its token ids."""

    def __init__(self, request: ChatRequest, name: str, tokenizer: Tokenizer, index: dict[str, int],
                 prompt: Sequence[int], parser: Callable[[], Parser]) -> None:  # fmt: skip
        self.request, self.tokenizer, self.index, self.prompt = request, tokenizer, index, prompt
        self.choices = [ChatChoice(parser()) for _ in index]
        self.separate = not self.choices[0].plain
        self.id = f"chatcmpl-{next(iter(index))}-{time.time_ns():x}"
        self.base = {"id": self.id, "created": int(time.time()), "model": name}
        self.with_usage = request.stream_options is not None and request.stream_options.include_usage
        shown = {"id": self.id, "object": "chat.completion.chunk", "created": self.base["created"], "model": name}
        self.chunk_base = shown
        self.head = "data: " + json.dumps(shown)[:-1] + ', "choices": ['
        self.end = '], "usage": null}\n\n' if self.with_usage else "]}\n\n"

    def chunk(self, piece: Piece) -> str:
        number = self.index[piece.id]
        choice = self.choices[number]
        first = "" if choice.begun else self.first(number, choice)
        parts = choice.add(piece)
        quick = piece.finish is None and not piece.logprobs and not self.request.return_token_ids
        if quick and choice.plain:
            return first + (self.content(number, piece.text) if piece.text else "")
        deltas = [self.delta(choice, part) for part in parts]
        if quick:
            return first + "".join([self.event(number, delta) for delta in deltas])
        last = deltas.pop() if deltas else {}
        extra: dict[str, Any] = {}
        if piece.logprobs:
            extra["logprobs"] = chat_logprobs(self.tokenizer, piece.logprobs)
        if self.request.return_token_ids:
            extra["token_ids"] = list(piece.tokens)
        events = [self.event(number, delta) for delta in deltas]
        if last or extra:
            events.append(self.event(number, last, **extra))
        if piece.finish is not None:
            events.append(self.event(number, {}, finish_reason=choice.reason, stop_reason=choice.stop))
        return first + "".join(events)

    def first(self, number: int, choice: ChatChoice) -> str:
        choice.begun = True
        extra = {"prompt_token_ids": list(self.prompt)} if self.request.return_token_ids else {}
        return self.event(number, {"role": "assistant", "content": ""}, **extra)

    def content(self, number: int, text: str) -> str:
        """The event that there are most of."""
        return (f'{self.head}{{"index": {number}, "delta": {{"content": {json.dumps(text)}}}, "logprobs": null, '
                f'"finish_reason": null}}{self.end}')  # fmt: skip

    def event(self, number: int, delta: dict[str, Any], **more: Any) -> str:
        found = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return f"{self.head}{json.dumps(found)}{self.end}"

    def delta(self, choice: ChatChoice, part: Part) -> dict[str, Any]:
        if part.kind == "content":
            return {"content": part.text}
        if part.kind == "reasoning":
            return {"reasoning_content": part.text}
        at = len(choice.calls)
        return {"tool_calls": [{"index": at, **choice.call(part)}]}

    def tail(self) -> str:
        if not self.with_usage:
            return ""
        return f"data: {json.dumps({**self.chunk_base, 'choices': [], 'usage': self.usage()})}\n\n"

    def take(self, piece: Piece) -> None:
        choice = self.choices[self.index[piece.id]]
        for part in choice.add(piece):
            if part.kind == "tool":
                choice.call(part)
            else:
                (choice.texts if part.kind == "content" else choice.thoughts).append(part.text)
        choice.logprobs += piece.logprobs

    def whole(self) -> dict[str, Any]:
        found = {**self.base, "object": "chat.completion", "usage": self.usage(),
                 "choices": [self.choice(number, choice) for number, choice in enumerate(self.choices)]}  # fmt: skip
        if self.request.return_token_ids:
            found["prompt_token_ids"] = list(self.prompt)
        return found

    def choice(self, number: int, choice: ChatChoice) -> dict[str, Any]:
        text = "".join(choice.texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.thoughts:
            message["reasoning_content"] = "".join(choice.thoughts).rstrip()
        if choice.calls:
            message |= {"tool_calls": choice.calls, "content": text.strip() or None}
        logprobs = chat_logprobs(self.tokenizer, choice.logprobs) if self.request.logprobs else None
        entry = {"index": number, "message": message, "finish_reason": choice.reason, "stop_reason": choice.stop,
                 "logprobs": logprobs}  # fmt: skip
        if self.request.return_token_ids:
            entry["token_ids"] = choice.tokens
        return entry

    def usage(self) -> dict[str, Any]:
        thinking = sum(choice.thinking for choice in self.choices) if self.separate else None
        cached = max(choice.cached for choice in self.choices)
        return usage(len(self.prompt), sum(len(c.tokens) for c in self.choices), cached, thinking)
