"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.serving.wire import Logprob
from moesaic.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON has not."""


def finite(value: float) -> float:
    return value if value > LEAST else LEAST  # a NaN becomes LEAST too


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[Logprob]) -> dict[str, Any]:
    return {"content": [chat_entry(tokenizer, each) for each in entries], "refusal": None}


def chat_entry(tokenizer: Tokenizer, entry: Logprob) -> dict[str, Any]:
    top = [named(tokenizer, token, value) for token, value in entry.top]
    return {**named(tokenizer, entry.token, entry.logprob), "top_logprobs": top}


def named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {"token": tokenizer.token_text(token), "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token))}  # fmt: skip


def text_logprobs(tokenizer: Tokenizer, entries: Sequence[Logprob], offset: int) -> dict[str, Any]:
    """offset: characters of the answer before the first of these tokens. Two tokens of one text keep the likelier."""
    texts = [tokenizer.token_text(each.token) for each in entries]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    tops: list[dict[str, float]] = []
    for entry in entries:
        top: dict[str, float] = {}
        for token, value in entry.top:
            top.setdefault(tokenizer.token_text(token), finite(value))
        tops.append(top)
    return {"tokens": texts, "token_logprobs": [finite(each.logprob) for each in entries], "top_logprobs": tops,
            "text_offset": offsets}  # fmt: skip
