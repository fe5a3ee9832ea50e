"""What a schema or a regular expression may be: all that is enforced, and nothing that takes minutes to compile."""

from __future__ import annotations

import json
import re
from typing import Any

from moesaic.serving.errors import HTTPError, invalid, unsupported
from moesaic.serving.keywords import check_keywords
from moesaic.serving.options import ServeConfig

ENFORCED = frozenset({
    "type", "properties", "required", "additionalProperties", "items", "prefixItems", "enum", "const", "anyOf",
    "$ref", "$defs", "definitions", "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "minItems", "maxItems",
})  # fmt: skip
SAID_ONLY = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"})
"""Keywords that say something and demand nothing."""
COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
MAX_COUNT = 4096
MAX_REGEX = 4096
MAX_NODES = 4096
REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def check_schema(schema: Any, limits: ServeConfig, where: str) -> str:
    """The schema as JSON. Raises HTTPError for one that is too large, or says what would not be enforced."""
    text = json.dumps(schema, ensure_ascii=False)
    if len(text.encode("utf-8", "replace")) > limits.max_schema:
        raise invalid(where, f"the schema has more than {limits.max_schema} bytes")
    nodes = 0
    todo: list[tuple[Any, str, int]] = [(schema, where, 0)]
    while todo:
        node, at, depth = todo.pop()
        nodes += 1
        if depth > limits.max_schema_depth or nodes > MAX_NODES:
            what = f"nested more than {limits.max_schema_depth} deep" if nodes <= MAX_NODES else "too large"
            raise invalid(at, f"the schema is {what}")
        todo += children(node, at, depth + 1)
    return text


def children(node: Any, at: str, depth: int) -> list[tuple[Any, str, int]]:
    """The schemas inside a schema, its own keywords checked."""
    if isinstance(node, bool):
        return []
    if not isinstance(node, dict):
        raise invalid(at, "a schema must be an object, true or false")
    found: list[tuple[Any, str, int]] = []
    for key, value in node.items():
        if key not in ENFORCED | SAID_ONLY:
            raise unsupported(f"{at}.{key}", "this keyword cannot be enforced; leave it out")
        if key in COUNTS and not (type(value) is int and 0 <= value <= MAX_COUNT):
            raise invalid(f"{at}.{key}", f"must be an integer in [0, {MAX_COUNT}]")
        if key == "$ref" and not (isinstance(value, str) and (value == "#" or value.startswith("#/"))):
            raise unsupported(f"{at}.{key}", "only references into the schema itself are followed")
        if key == "pattern":
            check_regex(value, f"{at}.{key}")
        found += nested(key, value, f"{at}.{key}", depth)
    check_keywords(node, ENFORCED, at)
    return found


def nested(key: str, value: Any, at: str, depth: int) -> list[tuple[Any, str, int]]:
    if key in ("properties", "$defs", "definitions"):
        if not isinstance(value, dict):
            raise invalid(at, "must be an object of schemas")
        return [(each, f"{at}.{name}", depth) for name, each in value.items()]
    if key in ("anyOf", "prefixItems"):
        if not isinstance(value, list) or not value:
            raise invalid(at, "must be a list of schemas")
        return [(each, f"{at}[{i}]", depth) for i, each in enumerate(value)]
    return [(value, at, depth)] if key in ("items", "additionalProperties") else []


def check_regex(pattern: Any, where: str) -> str:
    """Raises HTTPError for one that is too long, or that unfolds into too much."""
    if not isinstance(pattern, str) or len(pattern) > MAX_REGEX:
        raise invalid(where, f"must be a regular expression of at most {MAX_REGEX} characters")
    product = 1
    for least, most in REPEAT.findall(pattern):
        product *= max(1, int(most or least))
        if product > MAX_COUNT:
            raise invalid(where, f"repeats unfold to more than {MAX_COUNT}")
    return pattern


def check_choices(texts: list[str], limits: ServeConfig) -> str:
    if sum(len(text.encode("utf-8", "replace")) for text in texts) > limits.max_schema:
        raise invalid("choice", f"the texts have more than {limits.max_schema} bytes")
    if any("\0" in text for text in texts):
        raise invalid("choice", "a text cannot hold the character of code 0")
    return json.dumps(list(dict.fromkeys(texts)))


def only_one(given: dict[str, Any]) -> str | None:
    """The one structure that is asked for."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise HTTPError(400, f"{' and '.join(names)} exclude one another", param=names[1], code="invalid_value")
    return names[0] if names else None
