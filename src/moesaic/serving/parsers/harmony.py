"""The answers of gpt-oss: messages on channels. `analysis` is reasoning, `final` is content, calls go to functions.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json
    <|message|>{...}<|call|>
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from moesaic.serving.parsers.base import Part, Splitter, arguments

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
RECIPIENT = re.compile(r"to=functions\.([A-Za-z0-9_.\-]+)")


class Harmony:
    """tools: read calls; else what is said to a function is content as it was written."""

    def __init__(self, *, tools: bool, reasoning: bool = True) -> None:
        self.tools, self.separate = tools, reasoning
        self.splitter = Splitter([START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS])
        self.header: str | None = ""  # of the message whose text has not begun; None inside a text
        self.channel = ""
        self.function: str | None = None
        self.said: list[str] = []  # to a function

    @property
    def reasoning(self) -> bool:
        return self.header is None and self.channel == "analysis"

    def push(self, text: str) -> Sequence[Part]:
        return [part for mark, piece in self.splitter.push(text) for part in self.take(mark, piece)]

    def end(self) -> Sequence[Part]:
        """The end of an answer ends its message: the token that ended it has no text."""
        parts = [*self.take(False, self.splitter.end()), *self.close()]
        if self.header and CHANNEL not in self.header:  # no message at all: it is the answer as it stands
            parts.append(Part("content", self.header))
        self.header = ""
        return parts

    def take(self, mark: bool, piece: str) -> Sequence[Part]:
        if mark:
            return self.marked(piece)
        if self.header is not None:
            self.header += piece
            return ()
        if self.function is not None:
            self.said.append(piece)
            return ()
        kind = "reasoning" if self.channel == "analysis" and self.separate else "content"
        return (Part(kind, piece),) if piece else ()  # type: ignore[arg-type]  # it is one of the two

    def marked(self, marker: str) -> Sequence[Part]:
        if marker in ENDS or marker == START:
            parts = self.close()
            self.header = ""
            return parts
        if marker == MESSAGE and self.header is not None:
            recipient = RECIPIENT.search(self.header) if self.tools else None
            self.function = recipient[1] if recipient else None
            channel = re.search(rf"{re.escape(CHANNEL)}\s*(\w+)", self.header)
            self.channel, self.header = channel[1] if channel else "final", None
        elif self.header is not None:
            self.header += marker
        return ()

    def close(self) -> Sequence[Part]:
        """The end of a message: a call is whole now."""
        if self.function is None:
            return ()
        name, self.function = self.function, None
        said, self.said = "".join(self.said), []
        found = arguments(said)
        return [Part("content", said)] if found is None else [Part("tool", found, name)]
