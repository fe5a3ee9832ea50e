"""Reasoning between `<think>` and `</think>`, and, for families that have them, tool calls between markers.

A call that cannot be read is given back as it was written: an answer never loses text silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from moesaic.serving.parsers.base import Part, Splitter, arguments

BEGIN, END = "<think>", "</think>"

Read = Callable[[str], Sequence[Part] | None]
"""The calls in the text between a family's markers, or None where it cannot be read."""


class Think:
    """reasoning: the prompt has opened it already.  tools: (begin marker, end marker, reader)."""

    def __init__(self, reasoning: bool = False, tools: tuple[str, str, Read] | None = None, *,
                 think: bool = True) -> None:  # fmt: skip
        self.reasoning, self.tools, self.think = reasoning, tools, think
        markers = [BEGIN, END] if think else []
        self.splitter = Splitter([*markers, *(tools[:2] if tools else ())])
        self.inside: list[str] | None = None  # of a tool block, from its begin marker on
        self.fresh = reasoning  # white space at the beginning of a part is the template's, not the model's

    def push(self, text: str) -> Sequence[Part]:
        return [part for mark, piece in self.splitter.push(text) for part in self.take(mark, piece)]

    def end(self) -> Sequence[Part]:
        parts = list(self.take(False, self.splitter.end()))
        if self.inside is not None:
            parts.append(Part("content", "".join(self.inside)))
            self.inside = None
        return parts

    def take(self, mark: bool, piece: str) -> Sequence[Part]:
        if self.inside is not None:
            return self.in_tools(mark, piece)
        if mark and self.think and piece in (BEGIN, END):
            self.reasoning, self.fresh = piece == BEGIN, True
            return ()
        if mark and self.tools and not self.reasoning and piece in self.tools[:2]:  # in reasoning it is talk of a call
            self.inside = [piece] if piece == self.tools[0] else None
            return ()
        if self.fresh:
            piece = piece.lstrip()
            self.fresh = not piece
        return (Part("reasoning" if self.reasoning else "content", piece),) if piece else ()

    def in_tools(self, mark: bool, piece: str) -> Sequence[Part]:
        assert self.inside is not None
        assert self.tools is not None
        self.inside.append(piece)
        if not (mark and piece == self.tools[1]):
            return ()
        whole, self.inside, self.fresh = "".join(self.inside), None, True
        calls = self.tools[2](whole[len(self.tools[0]) : -len(self.tools[1])])
        return [Part("content", whole)] if calls is None else calls


class Unsure:
    """An answer held to a form, after a prompt that has opened the reasoning: reasoning only if that ends.

    The form may leave no room for an end; its text is then the answer.
    """

    def __init__(self, parser: Think) -> None:
        self.parser, self.text, self.sure = parser, "", False

    @property
    def reasoning(self) -> bool:
        return self.sure and self.parser.reasoning

    def push(self, text: str) -> Sequence[Part]:
        if self.sure:
            return self.parser.push(text)
        seen = max(0, len(self.text) - len(END))
        self.text += text
        self.sure = self.text.find(END, seen) >= 0
        return self.parser.push(self.text) if self.sure else ()

    def end(self) -> Sequence[Part]:
        if self.sure:
            return self.parser.end()
        self.parser.reasoning = self.parser.fresh = False
        return [*self.parser.push(self.text), *self.parser.end()]


# --- DeepSeek --------------------------------------------------------------------------------------------------------

CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL = re.compile(r"\s*<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL)
FENCED = re.compile(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", re.DOTALL)


def deepseek_calls(text: str) -> Sequence[Part] | None:
    """`function<sep>NAME` and fenced JSON (V3, R1), or `NAME<sep>{JSON}` (V3.1)."""
    calls, at = [], 0
    for match in CALL.finditer(text):
        if match.start() != at:
            return None
        at = match.end()
        fenced = FENCED.fullmatch(match[2]) if match[1].strip() == "function" else None
        name, given = (fenced[1], fenced[2]) if fenced else (match[1].strip(), match[2])
        found = arguments(given)
        if found is None or not name:
            return None
        calls.append(Part("tool", found, name))
    return calls if calls and not text[at:].strip() else None
