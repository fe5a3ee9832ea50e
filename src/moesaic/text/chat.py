"""Chat templates: a conversation to the prompt text that the model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from moesaic.errors import CheckpointError, RequestError, UnsupportedError
from moesaic.text.files import read_object, read_text
from moesaic.text.messages import Habits, checked_messages, plain
from moesaic.text.sandbox import Sandbox

# Holds characters that no text may contain. A template that trims the message takes the space at its end.
MARK = "\ufdd0continue here\ufdd1 "


class ChatTemplate:
    """The chat templates of one checkpoint.

    Immutable but for a cache of compiled templates; safe to share between threads. A template is compiled when it is
    first used, so a checkpoint with a broken one can still complete plain text.
    """

    def __init__(
        self, templates: Mapping[str, str], special_tokens: Mapping[str, str], where: str = "chat template"
    ) -> None:
        """templates: name to source.  special_tokens: variables such as `bos_token`.  where: named in errors."""
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._where = where
        self._compiled: dict[str, tuple[CodeType, Habits]] = {}

    @classmethod
    def from_directory(cls, path: str | Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """Find the templates of a checkpoint; none at all is fine until one is needed.

        chat_template.jinja and additional_chat_templates/*.jinja come before tokenizer_config.json, which comes
        before chat_template.json. Raises CheckpointError for files that cannot be read as what they are.
        """
        directory = Path(path)
        found: dict[str, str] = {}
        for name in ("chat_template.json", "tokenizer_config.json"):
            file = directory / name
            found |= _declared(read_object(file).get("chat_template"), file)
        if (directory / "chat_template.jinja").is_file():
            found["default"] = read_text(directory / "chat_template.jinja")
        for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            found[file.stem] = read_text(file)
        return cls(found, special_tokens, str(directory))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the templates; empty when the checkpoint has none."""
        return tuple(self._templates)

    def mentions(self, text: str) -> bool:
        """Whether a template holds this text: a model's markers tell how its answers are to be read."""
        return any(text in source for source in self._templates.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> str:
        """The prompt text. Encode it with add_special_tokens=False: templates write their own bos token.

        tools: JSON schemas.  variables: more template variables, such as enable_thinking or documents.
        continue_final_message: leave the last message open, to be continued.  name: which template; by default
        `tool_use` when there are tools and it exists, else `default`.
        Raises RequestError (malformed messages, or the template refuses them), UnsupportedError (no such template),
        CheckpointError (the template is broken).
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                where="continue_final_message",
                remedy="Set add_generation_prompt to false.",
            )
        chosen = self._choose(name, bool(tools))
        code, habits = self._code(chosen)
        chat = checked_messages(messages, habits)
        ending = _mark_final(chat) if continue_final_message else ""
        values = {
            **self._special_tokens,
            **plain(dict(variables or {})),
            "messages": chat,
            "tools": None if tools is None else plain(list(tools)),
            "add_generation_prompt": add_generation_prompt,
        }
        values.setdefault("documents", None)
        text = self._run(code, values)
        return _cut_at_mark(text, ending) if continue_final_message else text

    def _choose(self, name: str | None, has_tools: bool) -> str:
        if not self._templates:
            raise UnsupportedError(
                "this checkpoint has no chat template",
                where=self._where,
                remedy="Use a chat (instruct) checkpoint, or complete plain prompts, "
                "or put a chat_template.jinja beside the checkpoint.",
            )
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise UnsupportedError(
                f"there is no chat template {name!r}", where=self._where, remedy=f"Choose one of {sorted(self.names)}."
            )
        return name

    def _code(self, name: str) -> tuple[CodeType, Habits]:
        """The compiled template, and what it can read."""
        if name not in self._compiled:
            source = self._templates[name]
            try:
                self._compiled[name] = Sandbox.compiled(source), _habits(source)
            except (TemplateSyntaxError, RecursionError, ValueError, SyntaxError) as error:
                raise CheckpointError(
                    f"the chat template {name!r} is broken ({error})", where=self._where, remedy="Download it again."
                ) from error
        return self._compiled[name]

    def _run(self, code: CodeType, values: dict[str, Any]) -> str:
        try:
            return Sandbox().render_bounded(code, values)
        except TemplateError as error:
            raise RequestError(
                f"the chat template refuses these messages: {error.message}",
                where="messages",
                remedy="Correct the conversation (roles, their order, tools).",
            ) from error
        except Exception as error:  # a template is a program: anything may come out of it
            raise RequestError(
                f"the chat template failed on these messages ({type(error).__name__}: {error})",
                where="messages",
                remedy="Correct the conversation (roles, contents, tool calls).",
            ) from error


def _declared(value: Any, file: Path) -> dict[str, str]:
    """The `chat_template` field: a template, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
    entries = value if isinstance(value, list) else [None]
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    if len(named) != len(entries) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise CheckpointError("chat_template is malformed", where=str(file), remedy="Download the file again.")
    return {str(name): str(template) for name, template in named.items()}


def _habits(source: str) -> Habits:
    """A template that loops over some message's content knows parts; one that tests it for None knows None."""

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name == "content"

    tree = Sandbox().parse(source)
    return Habits(
        parts=any(is_content(loop.iter) for loop in tree.find_all(nodes.For)),
        none=any(test.name == "none" and is_content(test.node) for test in tree.find_all(nodes.Test)),
    )


def _mark_final(chat: list[dict[str, Any]]) -> str:
    """Append the mark to the final message, in place; returns the text it was appended to."""
    final = chat[-1]
    content = final.get("content")
    if isinstance(content, str):
        final["content"] = content + MARK
        return content
    if isinstance(content, list) and content:
        text = str(content[-1]["text"])
        content[-1]["text"] = text + MARK
        return text
    raise RequestError("the final message has no text to continue", where="messages", remedy="Give it content.")


def _cut_at_mark(text: str, ending: str) -> str:
    """The prompt up to the mark, without the white space that the template would have trimmed."""
    at = text.rfind(MARK.strip())
    if at < 0 or ending.strip() not in text:
        raise RequestError(
            "the chat template drops or changes the final message, so it cannot be continued",
            where="continue_final_message",
            remedy="Continue a message whose text the template keeps.",
        )
    return text[:at] if text.startswith(MARK, at) else text[:at].rstrip()
