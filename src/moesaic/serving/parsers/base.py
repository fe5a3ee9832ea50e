"""What parsers have in common: parts of an answer, and markers found in text that comes in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol


class Part(NamedTuple):
    """A part of an answer. kind `tool`: name and arguments of one call, whole; `text` is then its arguments (JSON)."""

    kind: Literal["content", "reasoning", "tool"]
    text: str
    name: str = ""


class Parser(Protocol):
    """One answer's. Parts of `push` and `end`, joined by kind, hold all of the text but the markers themselves."""

    def push(self, text: str) -> Sequence[Part]: ...

    def end(self) -> Sequence[Part]: ...

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        ...


class Plain:
    """Everything is content."""

    reasoning = False

    def push(self, text: str) -> Sequence[Part]:
        return (Part("content", text),) if text else ()

    def end(self) -> Sequence[Part]:
        return ()


class Splitter:
    """Cuts a stream into markers and the text between them; holds back only what may become a marker."""

    def __init__(self, markers: Sequence[str]) -> None:
        self.markers = sorted(markers, key=len, reverse=True)
        self.held = ""

    def push(self, text: str) -> Iterator[tuple[bool, str]]:
        """(is a marker, text)."""
        rest = self.held + text
        while True:
            found = [(at, marker) for marker in self.markers if (at := rest.find(marker)) >= 0]
            if not found:
                break
            at, marker = min(found, key=lambda each: each[0])
            if at:
                yield False, rest[:at]
            yield True, marker
            rest = rest[at + len(marker) :]
        keep = max((overlap(rest, marker) for marker in self.markers), default=0)
        self.held = rest[len(rest) - keep :]
        if len(rest) > keep:
            yield False, rest[: len(rest) - keep]

    def end(self) -> str:
        held, self.held = self.held, ""
        return held


def overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that `marker` begins with."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0


def arguments(text: str) -> str | None:
    """The text if it is a JSON object, with the white space around it cut off; else None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return text.strip() if isinstance(value, dict) else None
