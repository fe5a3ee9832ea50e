"""A conversation as the checkpoint's template writes it, tools included."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from moesaic.errors import MoesaicError
from moesaic.serving.errors import HTTPError, invalid, unsupported
from moesaic.serving.schema import ChatRequest, Message

if TYPE_CHECKING:
    from moesaic.serving.state import State

INLINE_CHARS = 20_000
RESERVED = ("messages", "tools", "add_generation_prompt")


async def chat_prompt(state: State, request: ChatRequest) -> tuple[str, list[dict[str, Any]] | None]:
    """(the prompt's text, the tools whose calls are to be read in the answer). Raises HTTPError."""
    tools = check_tools(state, request)
    messages = [as_dict(message, as_text=state.reader.arguments_as_text) for message in request.messages]
    if not state.template.mentions("developer"):  # or what it says would be lost without a word
        for message in messages:
            message["role"] = "system" if message["role"] == "developer" else message["role"]
    variables = dict(request.chat_template_kwargs or {})
    for name in RESERVED:
        if name in variables:
            raise unsupported("chat_template_kwargs", f"{name} is set by the server")
    if request.reasoning_effort is not None:
        if not state.template.mentions("reasoning_effort"):
            raise unsupported("reasoning_effort", "this model's chat template does not know it")
        variables["reasoning_effort"] = request.reasoning_effort

    def work() -> str:
        try:
            return state.template.render(messages, tools=tools, variables=variables)
        except MoesaicError as error:
            raise HTTPError.of(error) from None

    size = sum(len(str(each)) for each in (*messages, *(tools or ()), *variables.values()))
    return (work() if size <= INLINE_CHARS else await asyncio.to_thread(work)), tools


def check_tools(state: State, request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the template shall show. Raises HTTPError where calls could not be read back."""
    choice = request.tool_choice
    if choice is not None and request.tools is None and choice != "none":
        raise invalid("tool_choice", "there are no tools to choose from")
    if request.tools is None or choice == "none":
        return None
    if state.reader.tools is None:
        what = "this model's tool calls cannot be read (known: DeepSeek, Qwen, GLM, gpt-oss)"
        raise unsupported("tools", f"{what}; if it writes them like one of these, the operator can set --tool-parser")
    if not state.template.mentions("tools"):
        raise unsupported("tools", "this model's chat template does not show tools")
    if choice is not None and choice != "auto":
        raise unsupported("tool_choice", "only none and auto are supported")
    if request.parallel_tool_calls is False:
        raise unsupported("parallel_tool_calls", "cannot be turned off")
    strict = [tool.function.name for tool in request.tools if tool.function.strict]
    if strict:
        raise unsupported("tools", f"strict is not supported (function {strict[0]})")
    return [tool.model_dump(exclude_none=True) for tool in request.tools]


def as_dict(message: Message, *, as_text: bool) -> dict[str, Any]:
    """A message as templates know it. as_text: arguments of calls stay JSON text; else they become objects."""
    found = message.model_dump(exclude_none=True)
    for call in found.get("tool_calls", ()) if not as_text else ():
        try:
            value = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            raise invalid("messages", "the arguments of a tool call are not JSON") from None
        call["function"]["arguments"] = value
    return found
