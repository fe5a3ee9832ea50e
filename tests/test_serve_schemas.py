"""A JSON schema is followed or refused. Random schemas, of all keywords that are taken, in all combinations: whatever
passes the check is compiled, walked along at random, and every whole answer is shown to a validator.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from moesaic.assets import embedded_model
from moesaic.engine.grammar import Grammars
from moesaic.errors import RequestError
from moesaic.serving.errors import HTTPError
from moesaic.serving.keywords import BOUNDS
from moesaic.serving.limits import check_choices, check_schema
from moesaic.serving.options import ServeConfig
from moesaic.text.tokenizer import Tokenizer
from tests.serve_support import Server, shared

VOCAB, END = 4096, 2
LIMITS = ServeConfig()


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), VOCAB)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(embedded_model())


def walk(compiled: Any, rng: random.Random, limit: int = 100) -> str | None:
    """An answer that the grammar allows, with a liking for ends and single bytes; None for one that is too long."""
    guide, tokens = grammars().guide(compiled, [END]), list[int]()
    for _ in range(limit):
        allowed = np.unpackbits(guide.allowed_W().view(np.uint8), bitorder="little")[:VOCAB].nonzero()[0].tolist()
        if not allowed:
            return None  # told to the client by `Walk`
        if allowed == [END] or (END in allowed and rng.random() < 0.4):
            return tokenizer().decode(tokens)
        texts = {token: tokenizer().token_bytes(token) for token in allowed if token != END}
        ends = [token for token, text in texts.items() if text in (b'"', b"}", b"]")]
        short = [token for token, text in texts.items() if len(text) == 1]
        chosen = ends if ends and rng.random() < 0.3 else short if short and rng.random() < 0.6 else list(texts)
        tokens.append(rng.choice(chosen))
        guide.accept(tokens[-1])
    return None


PATTERNS = ("^[ab]{1,3}$", "^.$", "^[^x]*$", r"^\d+\.\d$", '^"$', r"^\\$", r"^\n$", "^a|b$")


def number(text: str) -> float:
    """Without infinities, which a validator knows nothing of."""
    return max(-1e300, min(1e300, float(text)))


def shape(rng: random.Random, depth: int = 2) -> Any:
    """A schema: mostly of a kind that people write, with keywords of other kinds mixed in."""
    def some(of: dict[str, Callable[[], Any]], each: float) -> dict[str, Any]:
        return {name: make() for name, make in of.items() if rng.random() < each}

    def inner() -> Any:
        return shape(rng, depth - 1) if depth else rng.choice([True, {"type": "integer"}, {"type": "null"}])

    def value() -> Any:
        return rng.choice(["a", 'é"\n', 1, -2.5, True, None, [1, "b"], {"k": 0}, ""])

    strings: dict[str, Callable[[], Any]] = {
        "minLength": lambda: rng.randint(0, 2), "maxLength": lambda: rng.randint(1, 4),
        "pattern": lambda: rng.choice(PATTERNS),
    }  # fmt: skip
    numbers: dict[str, Callable[[], Any]] = {
        name: lambda: rng.choice([-7, 0, 3, 12]) for name in sorted(BOUNDS)
    }  # fmt: skip
    arrays: dict[str, Callable[[], Any]] = {
        "items": inner, "prefixItems": lambda: [inner() for _ in range(rng.randint(1, 2))],
        "minItems": lambda: rng.randint(0, 2), "maxItems": lambda: rng.randint(1, 3),
    }  # fmt: skip
    objects: dict[str, Callable[[], Any]] = {
        "properties": lambda: {name: inner() for name in rng.sample(["a", "b", 'c"'], rng.randint(0, 3))},
        "required": lambda: rng.sample(["a", "b", 'c"'], rng.randint(0, 2)),
        "additionalProperties": lambda: rng.choice([True, False, inner()]),
    }  # fmt: skip
    wholes: dict[str, Callable[[], Any]] = {
        "anyOf": lambda: [inner() for _ in range(rng.randint(1, 3))], "const": value,
        "enum": lambda: [value() for _ in range(rng.randint(1, 3))], "$ref": lambda: rng.choice(["#", "#/$defs/x"]),
    }  # fmt: skip
    name, of = rng.choice([("string", strings), ("integer", numbers), ("number", numbers), ("array", arrays),
                           ("object", objects), ("boolean", {}), ("null", {})])  # fmt: skip
    found = {"type": name} | some(of, 0.5)
    kind = rng.random()
    if kind < 0.25:
        found = some(wholes, 0.4) | rng.choice([{}, {}, {"type": name}])
    elif kind < 0.35:
        found["type"] = rng.sample(sorted({name, "null", "string", "integer"}), 2)
    elif kind < 0.45:
        del found["type"]
    if rng.random() < 0.2:
        found |= some(strings | numbers | arrays | objects | wholes, 0.1)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_what_is_taken_is_followed(seed: int) -> None:
    rng, seen = random.Random(seed), Counter[str]()
    for _ in range(150):
        schema = shape(rng)
        if isinstance(schema, dict) and "$ref" in json.dumps(schema):
            schema["$defs"] = {"x": shape(rng, 0)}
        try:
            compiled = grammars().compile("json_schema", check_schema(schema, LIMITS, "s"))
        except HTTPError:
            seen["refused"] += 1
            continue
        except RequestError:
            seen["not compiled"] += 1
            continue
        validator = jsonschema_rs.validator_for(schema)
        for _ in range(6):
            text = walk(compiled, rng)
            if text is None or "\ufffd" in text:  # bytes that are no UTF-8, as any byte-level model can choose them
                seen["no answer"] += 1
                continue
            seen["answers"] += 1
            assert validator.is_valid(json.loads(text, parse_float=number)), (schema, text)
    assert min(seen[name] for name in ("refused", "not compiled", "answers")) > 5, seen


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "string", "pattern": "^a", "maxLength": 3}, "maxLength"),
        ({"anyOf": [{"type": "string"}], "maxLength": 3}, "maxLength"), ({"$ref": "#", "type": "object"}, "type"),
        ({"enum": ["a", 1], "type": "string"}, "type"), ({"const": "a", "minLength": 1}, "minLength"),
        ({"type": "object", "required": ["a"]}, "required"), ({"minimum": 3}, "minimum"),
        ({"type": "string", "pattern": 'a"b'}, "pattern"), ({"type": "string", "pattern": r"a\\b"}, "pattern"),
        ({"type": "string", "pattern": r"\u000a"}, "pattern"), ({"type": []}, "type"), ({"type": "text"}, "type"),
        ({"type": "object", "required": "a"}, "required"),
    ],
)  # fmt: skip
def test_what_would_be_left_out_is_refused_by_name(schema: Any, named: str) -> None:
    for nested in (schema, {"type": "array", "items": schema}):
        with pytest.raises(HTTPError) as refused:
            check_schema(nested, LIMITS, "s")
        assert refused.value.param is not None
        assert refused.value.param.endswith(f".{named}")


def test_what_people_write_passes() -> None:
    for schema in (
        {"type": "object", "properties": {"kind": {"const": "a", "type": "string"}, "n": {"anyOf": [
            {"type": "integer", "minimum": 1}, {"type": "null"}], "default": None}, "of": {"$ref": "#/$defs/X",
            "description": "d"}}, "required": ["kind"], "$defs": {"X": {"enum": ["p", "q"], "type": "string"}}},
        {"type": ["string", "null"], "maxLength": 3}, {"type": "string", "pattern": r"^[^\"\\@]+@\w+\.[a-z]{2}$"},
        {"enum": [1, 2.0], "type": "integer"}, {"type": "object", "minimum": 3},
    ):  # fmt: skip
        grammars().compile("json_schema", check_schema(schema, LIMITS, "s"))


def test_a_choice_is_whole_or_refused() -> None:
    with pytest.raises(HTTPError, match="code 0"):
        check_choices(["a", "a\0b"], LIMITS)


@pytest.fixture(scope="module")
def server() -> Server:
    return shared()


CIRCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize("schema", [{"$ref": "#"}, CIRCLE])
def test_a_form_that_nothing_meets_is_the_client_s_fault(server: Server, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 5, "response_format": form}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 400, answer.text
    said = answer.json()["error"]["message"]
    assert re.search("nothing may follow|Circular", said), "by us, or by xgrammar from 0.2.9 on"
    late = server.post("/v1/completions", {**body, "regex": "ab(?=c)", "response_format": None})
    assert (late.status_code, late.json()["error"]["param"]) == (400, "regex")
    assert server.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1}).status_code == 200
