"""Where prompts come from: the command line, a text file, a JSON Lines file, standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from moesaic.engine.params import SamplingParams
from moesaic.errors import RequestError

STDIN = "-"


@dataclass(frozen=True)
class Ask:
    """One prompt. where: named in errors.  messages: a conversation instead of a prompt.  fields: its own sampling."""

    where: str
    prompt: str | tuple[int, ...] = ""
    messages: tuple[Mapping[str, Any], ...] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def shown(self) -> Any:
        """The prompt as the user gave it, for output."""
        if self.messages is not None:
            return [dict(message) for message in self.messages]
        return self.prompt if isinstance(self.prompt, str) else list(self.prompt)


def from_arguments(prompts: list[str]) -> list[Ask]:
    many = len(prompts) > 1
    return [checked(Ask(f"--prompt {i}" if many else "--prompt", text)) for i, text in enumerate(prompts, 1)]


def from_file(name: str) -> list[Ask]:
    """One prompt per line; blank lines are passed over, and no other line is special. `.jsonl`: one object per line.

    Raises RequestError naming file and line, or the byte that is not UTF-8.
    """
    shown = "standard input" if name == STDIN else name
    lines = decoded(read(name), shown).split("\n")
    texts = [(f"{shown}:{i}", line.removesuffix("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise RequestError("holds no prompt", where=shown, remedy="Write one prompt per line.")
    if name.endswith(".jsonl"):
        return [checked(from_json(text, where)) for where, text in texts]
    return [checked(Ask(where, text)) for where, text in texts]


def read(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"cannot be read ({reason})", where=name, remedy="Check the path of --file.") from None


def decoded(raw: bytes, where: str) -> str:
    """UTF-8 text without its byte order mark. Raises RequestError naming the offset of the first wrong byte."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}", where=where, remedy="Save it as UTF-8."
        ) from None


def from_json(line: str, where: str) -> Ask:
    """`{"prompt": text or token ids, or "messages": [...], and any field of SamplingParams}`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"is not JSON ({error})", where=where, remedy="Write one object per line.") from None
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise RequestError("must be an object with a prompt, or with messages", where=where, remedy="Correct the line.")
    prompt, messages = value.pop("prompt", ""), value.pop("messages", None)
    if messages is not None and not (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
        raise RequestError("messages must be a list of objects", where=where, remedy="Correct the line.")
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str):
        raise RequestError("prompt must be text or a list of token ids", where=where, remedy="Correct the line.")
    return Ask(where, prompt, None if messages is None else tuple(messages), sampling_from_json(value, where))


def sampling_from_json(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of SamplingParams with the types that they must have; their ranges are checked when they are used."""
    known = {each.name for each in fields(SamplingParams)}
    types = get_type_hints(SamplingParams)
    for name, value in values.items():
        if name not in known:
            raise RequestError(f"unknown field {name!r:.60}", where=where, remedy=f"Known: {', '.join(sorted(known))}.")
        if not fits(value, types[name]):
            raise RequestError(f"{name} must not be {value!r:.60}", where=where, remedy="Correct the line.")
    return dict(values)


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of the type of a SamplingParams field."""
    if isinstance(kind, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if kind is NoneType:
        return value is None
    if kind is float:
        return type(value) in (int, float)
    if get_origin(kind) is tuple:
        one = get_args(kind)[0]
        return (one is str and isinstance(value, str)) or (isinstance(value, list) and all(fits(v, one) for v in value))
    if kind in (int, bool, str):
        return type(value) is kind
    # What is left is the logit bias: JSON has only strings as keys.
    return isinstance(value, dict) and all(
        key.removeprefix("-").isascii() and key.removeprefix("-").isdigit() and fits(v, float)
        for key, v in value.items()
    )


def checked(ask: Ask) -> Ask:
    if ask.messages is None and not ask.prompt:
        raise RequestError("the prompt is empty", where=ask.where, remedy="Give at least one character.")
    return ask
