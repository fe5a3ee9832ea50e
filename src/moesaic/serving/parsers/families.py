"""Which family a checkpoint belongs to, told by the markers in its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from moesaic.config import one_of
from moesaic.serving.parsers.base import Parser, Plain
from moesaic.serving.parsers.harmony import Harmony
from moesaic.serving.parsers.named import TOOL_CALL, glm_calls, qwen_calls, schemas_of
from moesaic.serving.parsers.think import BEGIN, CALLS, Read, Think, Unsure, deepseek_calls
from moesaic.text.chat import ChatTemplate

MARKS = {"gpt-oss": "<|channel|>", "deepseek": CALLS[0], "glm": "<arg_key>", "qwen": TOOL_CALL[0]}
"""What a template of that family holds, and none of those after it."""
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

    def parser(self, prompt: str, tools: Sequence[Mapping[str, Any]] | None, form: str | None = None) -> Parser:
        """For one answer. prompt: the rendered one, which may have opened the reasoning already.  tools: read calls.
        form: the kind of grammar that the answer is held to from its first token; JSON is an answer, whatever it says.
        """
        if form in ("json_schema", "json_object"):
            return Plain()
        family = self.tools if tools is not None else None
        if self.reasoning == "gpt-oss" or family == "gpt-oss":
            return Harmony(tools=family == "gpt-oss", reasoning=self.reasoning == "gpt-oss")
        if family is None and self.reasoning is None:
            return Plain()
        schemas = schemas_of(tools or ())
        blocks: dict[str, tuple[str, str, Read]] = {
            "deepseek": (*CALLS, deepseek_calls),
            "qwen": (*TOOL_CALL, partial(qwen_calls, schemas=schemas)),
            "glm": (*TOOL_CALL, partial(glm_calls, schemas=schemas)),
        }
        opened = self.reasoning == "think" and prompt.rstrip().endswith(BEGIN)
        found = Think(opened, blocks[family] if family else None, think=self.reasoning == "think")
        return Unsure(found) if opened and form is not None else found
