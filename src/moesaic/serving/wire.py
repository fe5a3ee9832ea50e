"""What the two processes say to each other. Torch-free: the HTTP side never imports torch.

To the engine:    ["start", {model, options, experts}]   once, first
                  ["add", [[id, index] ...], prompt ids, {sampling}, [kind, text] of a grammar or None]
                  ["abort", [id ...]]    ["stats", token]    ["flush", token]
From the engine:  ["ready", {...}] or ["failed", exit code, line]    once, first
                  ["pieces", [piece ...]]    one message per step
                  ["refused", [id ...], {status, what, where, remedy}]
                  ["stats", token, {...}]    ["flushed", token, problem or None]
                  ["log", level, text]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from moesaic.engine.params import SamplingParams


class Logprob(NamedTuple):
    """`TokenLogprobs` as plain values: the token, its natural log-probability, and the likeliest pairs."""

    token: int
    logprob: float
    top: Sequence[Sequence[Any]]


class Piece(NamedTuple):
    """`Delta` as plain values: what one step added to one completion. On the wire the tail of defaults is cut off."""

    id: str
    text: str
    tokens: Sequence[int]
    finish: str | None = None
    stop: int | str | None = None
    cached: int = 0
    logprobs: Sequence[Logprob] = ()
    prompt_logprobs: Sequence[Logprob | None] | None = None
    error: str | None = None
    status: int = 500


def piece_to_wire(delta: Any) -> list[Any]:
    """From an engine's `Delta`. Most deltas are three values."""
    plain = [delta.request_id, delta.text, delta.tokens]
    if delta.finish_reason is None and not delta.logprobs and delta.prompt_logprobs is None:
        return plain
    prompt = delta.prompt_logprobs
    return [
        *plain, delta.finish_reason and str(delta.finish_reason), delta.stop_reason, delta.cached_tokens,
        [_logprob(each) for each in delta.logprobs],
        None if prompt is None else [None if each is None else _logprob(each) for each in prompt], delta.error,
        delta.status,
    ]  # fmt: skip


def piece_from_wire(values: list[Any]) -> Piece:
    if len(values) == 3:
        return Piece(*values)
    values[6] = [Logprob(*each) for each in values[6]]
    if values[7] is not None:
        values[7] = [None if each is None else Logprob(*each) for each in values[7]]
    return Piece(*values)


def _logprob(entry: Any) -> list[Any]:
    return [entry.token, entry.logprob, entry.top]


def params_to_wire(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    found = {}
    for field in fields(params):
        value = getattr(params, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default:
            found[field.name] = dict(value) if isinstance(value, Mapping) else value
    return found
