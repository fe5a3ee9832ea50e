"""Tool calls of families that write one call per `<tool_call>`: Qwen's two forms, and GLM's.

    {"name": "NAME", "arguments": {...}}                                          Qwen (the form of Hermes)
    <function=NAME><parameter=KEY>VALUE</parameter>...</function>                 Qwen's coders
    NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...                     GLM
Values of the last two have no quotes: the tool's schema says whether `12` is a number or a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moesaic.serving.parsers.base import Part

TOOL_CALL = "<tool_call>", "</tool_call>"
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(.*?)\s*</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)

Schemas = Mapping[str, Mapping[str, Any]]
"""The name of a tool -> its parameters' schemas, by name."""


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        properties = (tool["function"].get("parameters") or {}).get("properties")
        found[tool["function"]["name"]] = properties if isinstance(properties, dict) else {}
    return found


def qwen_calls(text: str, schemas: Schemas) -> Sequence[Part] | None:
    if match := FUNCTION.fullmatch(text):
        return None if PARAMETER.sub("", match[2]).strip() else call(match[1], PARAMETER.findall(match[2]), schemas)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    given = found.get("arguments", {})
    return [Part("tool", json.dumps(given, ensure_ascii=False), found["name"])] if isinstance(given, dict) else None


def glm_calls(text: str, schemas: Schemas) -> Sequence[Part] | None:
    name, mark, rest = text.partition("<arg_key>")
    name, rest = name.strip(), mark + rest
    if not re.fullmatch(r"[^\s<>{}]+", name) or ARGUMENT.sub("", rest).strip():
        return None
    return call(name, [(key.strip(), value) for key, value in ARGUMENT.findall(rest)], schemas)


def call(name: str, given: Iterable[tuple[str, str]], schemas: Schemas) -> Sequence[Part]:
    known = schemas.get(name, {})
    values = {key: typed(value, known.get(key)) for key, value in given}
    return [Part("tool", json.dumps(values, ensure_ascii=False), name)]


def typed(text: str, schema: Any) -> object:
    """A value as its schema wants it; without one, JSON where it is JSON, else text."""
    kinds = types(schema)
    if "string" in kinds:
        return None if "null" in kinds and text.strip() == "null" else text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def types(schema: Any) -> set[str]:
    """What a schema names as its types, in `type` or in the alternatives of `anyOf`."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    found = {named} if isinstance(named, str) else {each for each in named or () if isinstance(each, str)}
    return found.union(*(types(each) for each in schema.get("anyOf") or ()))
