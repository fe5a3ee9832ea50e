"""Chat messages as clients send them: checked, and copied into plain data that a template may see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.errors import RequestError

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # templates disagree on the name
MAX_DEPTH = 64


@dataclass(frozen=True)
class Habits:
    """What a template can read.  parts: content as a list of parts.  none: content that is None (it tests for it)."""

    parts: bool
    none: bool


def checked_messages(messages: Any, habits: Habits) -> list[dict[str, Any]]:
    """A deep copy of the messages, valid for a template with those habits.

    Each is a mapping with a `role` and a `content`: a string, or a list of {"type": "text", "text": ...} parts, which
    are joined by line breaks for a template that reads only strings. Content may be absent or None in a message with
    tool calls; a template that tests for None then gets None, all others the empty string, which they can read.
    Other fields pass through, None dropped. Raises RequestError naming the message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise _bad("messages", "must be a list of {role, content}")
    if not messages:
        raise _bad("messages", "must not be empty")
    return [_checked(message, f"messages[{i}]", habits) for i, message in enumerate(messages)]


def _checked(message: Any, where: str, habits: Habits) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _bad(where, f"must be an object with role and content, not {type(message).__name__}")
    copy = {key: value for key, value in plain(message, where).items() if value is not None}
    role = copy.get("role")
    if not isinstance(role, str) or not role:
        raise _bad(f"{where}.role", "must be a non-empty string")
    content = copy.get("content")
    if content is None:
        if not copy.get("tool_calls"):
            raise _bad(f"{where}.content", "must be a string or a list of text parts")
        copy["content"] = None if habits.none else ""
    elif isinstance(content, list):
        texts = [_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        copy["content"] = content if habits.parts else "\n".join(texts)
    elif not isinstance(content, str):
        raise _bad(f"{where}.content", f"must be a string or a list of text parts, not {type(content).__name__}")
    reasoning = next((copy[field] for field in REASONING_FIELDS if field in copy), None)
    return copy if reasoning is None else {"thinking": reasoning, **copy, "reasoning_content": reasoning}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise _bad(where, f'must be {{"type": "text", "text": ...}}, not {kind!r} (text is all that this server reads)')


def plain(value: Any, where: str = "variables", depth: int = 0) -> Any:
    """A deep copy made of dict, list, str, int, float, bool and None only, so that a template gets no live object."""
    if depth > MAX_DEPTH:
        raise _bad(where, f"is nested more than {MAX_DEPTH} deep")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise _bad(where, "must have strings as keys")
        return {str(key): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    raise _bad(where, f"must be JSON data, not {type(value).__name__}")


def _bad(where: str, what: str) -> RequestError:
    return RequestError(what, where=where, remedy="Correct the request.")
