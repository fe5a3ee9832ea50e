"""`/v1/completions`: prompts as they are, text or token ids."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from moesaic.serving.answers import usage
from moesaic.serving.logprobs import text_logprobs
from moesaic.serving.schema import CompletionRequest
from moesaic.serving.wire import Logprob, Piece
from moesaic.text.tokenizer import Tokenizer


class TextChoice:
    """One completion as it grows."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.length = 0  # of the tokens' texts, for offsets
        self.cached = 0
        self.finish: str | None = None
        self.stop: int | str | None = None

    def add(self, piece: Piece) -> None:
        self.tokens += piece.tokens
        if piece.finish is not None:
            self.finish, self.stop = piece.finish, piece.stop
        self.cached = max(self.cached, piece.cached)


class TextWriter:
    """Answers of `/v1/completions`. index: of each engine id; prompts: token ids, `n` completions each."""

    def __init__(self, request: CompletionRequest, name: str, tokenizer: Tokenizer, index: dict[str, int],
                 prompts: Sequence[Sequence[int]]) -> None:  # fmt: skip
        self.request, self.tokenizer, self.index, self.prompts = request, tokenizer, index, prompts
        self.choices = [TextChoice() for _ in index]
        self.id = f"cmpl-{next(iter(index))}-{time.time_ns():x}"
        self.base = {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": name}
        self.with_usage = request.stream_options is not None and request.stream_options.include_usage
        self.head = "data: " + json.dumps(self.base)[:-1] + ', "choices": ['
        self.end = '], "usage": null}\n\n' if self.with_usage else "]}\n\n"

    def chunk(self, piece: Piece) -> str:
        number = self.index[piece.id]
        choice = self.choices[number]
        first = not choice.tokens
        choice.add(piece)
        if piece.finish is None and not piece.logprobs and not self.request.return_token_ids:
            if not piece.text:
                return ""
            body = f'{{"index": {number}, "text": {json.dumps(piece.text)}, "logprobs": null, "finish_reason": null}}'
            return f"{self.head}{body}{self.end}"
        found: dict[str, Any] = {"index": number, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}
        if piece.finish is not None:
            found["stop_reason"] = piece.stop
        if piece.logprobs:
            found["logprobs"] = self.logprobs(choice, piece.logprobs)
        if self.request.return_token_ids:
            found["token_ids"] = list(piece.tokens)
            if first:
                found["prompt_token_ids"] = list(self.prompts[number // (self.request.n or 1)])
        return f"{self.head}{json.dumps(found)}{self.end}"

    def logprobs(self, choice: TextChoice, entries: Sequence[Logprob]) -> dict[str, Any]:
        found = text_logprobs(self.tokenizer, entries, choice.length)
        choice.length += sum(map(len, found["tokens"]))
        return found

    def tail(self) -> str:
        if not self.with_usage:
            return ""
        return f"data: {json.dumps({**self.base, 'choices': [], 'usage': self.usage()})}\n\n"

    def take(self, piece: Piece) -> None:
        choice = self.choices[self.index[piece.id]]
        choice.add(piece)
        choice.texts.append(piece.text)
        choice.logprobs += piece.logprobs

    def whole(self) -> dict[str, Any]:
        found = []
        for number, choice in enumerate(self.choices):
            entry: dict[str, Any] = {"index": number, "text": "".join(choice.texts), "finish_reason": choice.finish,
                                     "stop_reason": choice.stop, "logprobs": None}  # fmt: skip
            if self.request.logprobs is not None:
                entry["logprobs"] = text_logprobs(self.tokenizer, choice.logprobs, 0)
            if self.request.return_token_ids:
                entry["token_ids"] = choice.tokens
                entry["prompt_token_ids"] = list(self.prompts[number // (self.request.n or 1)])
            found.append(entry)
        return {**self.base, "choices": found, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        n = self.request.n or 1
        cached = [max(c.cached for c in self.choices[i : i + n]) for i in range(0, len(self.choices), n)]
        return usage(sum(map(len, self.prompts)), sum(len(c.tokens) for c in self.choices), sum(cached))
