"""Keywords of a JSON schema that are enforced alone and not together: what the compiler of grammars leaves out without
a word is refused here by name. `tests/test_serve_schemas.py` holds what passes against a validator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from moesaic.serving.errors import invalid, unsupported

DEFINITIONS = frozenset({"$defs", "definitions"})
WHOLE = ("$ref", "anyOf", "const", "enum")
"""One of these says all that is followed: its neighbours are not."""
TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "array": (list,), "object": (dict,),
}  # fmt: skip
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
OF_TYPE = {"string": {"pattern", "minLength", "maxLength"}, "integer": BOUNDS, "number": BOUNDS,
           "array": {"minItems", "maxItems"}}  # fmt: skip
"""Followed only where `type` names the type."""
ESCAPED = re.compile(r'\[(?:[^\]\\]|\\.)+\]|(\\[\\nrtfvbx0"/]|\\u00[01257]|["\x00-\x1f])', re.DOTALL)
"""In a pattern: a class, from which the compiler itself takes what JSON cannot hold; or a character that it cannot."""


def check_together(node: Mapping[str, Any], types: Sequence[str], used: Set[str], at: str) -> None:
    """Raises HTTPError. types: as `type` has it.  used: the keywords that demand something."""
    whole = next((key for key in WHOLE if key in used), None)
    if whole is not None:
        rest = used - {whole} - DEFINITIONS
        if whole in ("const", "enum") and types:
            values = node["enum"] if whole == "enum" else [node["const"]]
            if isinstance(values, list) and all(any(is_a(value, name) for name in types) for value in values):
                rest -= {"type"}
        refuse(rest, at, f"cannot be enforced beside {whole}")
    if not types:
        refuse({key for key in used if any(key in keys for keys in OF_TYPE.values())}, at, "needs a type beside it")
    if "pattern" in used:
        refuse(used & {"minLength", "maxLength"}, at, "cannot be enforced beside pattern; say it in the pattern")
    known = node.get("properties")
    for name in node.get("required") or ():
        if not isinstance(known, dict) or name not in known:
            raise unsupported(f"{at}.required", f"{name!r:.80} must be one of properties")


def check_keywords(node: Mapping[str, Any], enforced: frozenset[str], at: str) -> None:
    """Raises HTTPError where keywords of one schema, each of which is enforced, would not be together."""
    types = node.get("type", [])
    types = [types] if isinstance(types, str) else types
    wrong = not isinstance(types, list) or ("type" in node and not types)
    if wrong or any(not isinstance(each, str) or each not in TYPES for each in types):
        raise invalid(f"{at}.type", f"must be one or several of {', '.join(TYPES)}")
    required = node.get("required", [])
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        raise invalid(f"{at}.required", "must be a list of names")
    check_together(node, types, enforced & node.keys(), at)
    pattern = node.get("pattern")
    if isinstance(pattern, str) and (found := next((m for m in ESCAPED.finditer(pattern) if m[1]), None)):
        raise unsupported(f"{at}.pattern", f"the character {found[1]} cannot be part of it: JSON writes it otherwise")


def refuse(names: Set[str], at: str, why: str) -> None:
    if names:
        raise unsupported(f"{at}.{min(names)}", why)


def is_a(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[name])
