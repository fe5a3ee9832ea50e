"""Which family a checkpoint belongs to, told by the markers in its chat template."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.config import one_of
from moesaic.serving.parsers.base import Parser, Plain
from moesaic.serving.parsers.harmony import Harmony
from moesaic.serving.parsers.think import BEGIN, CALLS, TOOL_CALL, Think, deepseek_calls, qwen_calls
from moesaic.text.chat import ChatTemplate

MARKS = {"gpt-oss": "<|channel|>", "deepseek": CALLS[0], "qwen": TOOL_CALL[0]}
"""What only a template of that family holds."""
TOOL_PARSERS = ("auto", "none", *MARKS)
REASONING_PARSERS = ("auto", "none", "think", "gpt-oss")


@dataclass(frozen=True)
class Reader:
    """How answers are read. tools: the family whose calls are known, or None.  reasoning: `think`, `gpt-oss`, None."""

    tools: str | None
    reasoning: str | None

    @classmethod
    def of(cls, template: ChatTemplate, tools: str = "auto", reasoning: str = "auto") -> Reader:
        """Raises OptionError for a name that is none."""
        one_of("tool_parser", tools, TOOL_PARSERS)
        one_of("reasoning_parser", reasoning, REASONING_PARSERS)
        found = next((family for family, mark in MARKS.items() if template.mentions(mark)), None)
        if reasoning == "auto":
            think = template.mentions(BEGIN) or template.mentions("</think>")
            reasoning = "gpt-oss" if found == "gpt-oss" else "think" if think else "none"
        family = found if tools == "auto" else None if tools == "none" else tools
        return cls(family, None if reasoning == "none" else reasoning)

    @property
    def arguments_as_text(self) -> bool:
        """Whether the template writes a call's arguments as they are; else it wants the object."""
        return self.tools == "deepseek"

    def special(self, *, tools: bool) -> bool:
        """Whether answers are read by their special tokens, which must then be in the text."""
        return self.reasoning is not None or (tools and self.tools is not None)

    def parser(self, prompt: str, *, tools: bool) -> Parser:
        """For one answer. prompt: the rendered one, which may have opened the reasoning already.  tools: read calls."""
        family = self.tools if tools else None
        if self.reasoning == "gpt-oss" or family == "gpt-oss":
            return Harmony(tools=family == "gpt-oss", reasoning=self.reasoning == "gpt-oss")
        blocks = {"deepseek": (*CALLS, deepseek_calls), "qwen": (*TOOL_CALL, qwen_calls)}
        opened = self.reasoning == "think" and prompt.rstrip().endswith(BEGIN)
        if family is None and self.reasoning is None:
            return Plain()
        return Think(opened, blocks[family] if family else None, think=self.reasoning == "think")
