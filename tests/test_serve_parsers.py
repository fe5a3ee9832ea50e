"""Tool calls and reasoning, read from answers as the families write them, however the stream is cut.

The answers are written by hand after each family's published format; that a template shows a call the way the parser
reads it is checked with the formats' own templates where they are small enough to stand here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import OptionError
from moesaic.serving.errors import HTTPError
from moesaic.serving.limits import check_regex, check_schema
from moesaic.serving.options import ServeConfig
from moesaic.serving.parsers.base import Parser, Part
from moesaic.serving.parsers.families import Reader
from moesaic.text.chat import ChatTemplate

WEATHER = '{"city": "Bern", "days": 2}'
V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    "```json\n" + WEATHER + "\n```<｜tool▁call▁end｜>\n"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>" + WEATHER + "<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
HERMES = (
    '<tool_call>\n{"name": "weather", "arguments": ' + WEATHER + "}\n</tool_call>\n"
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
CODER = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n"
    "</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>"
)
OSS = (
    "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + WEATHER + "<|call|>"
)
CALLS = [("weather", json.loads(WEATHER)), ("time", {})]

DEEPSEEK, QWEN, GPT = Reader("deepseek", "think"), Reader("qwen", "think"), Reader("gpt-oss", "gpt-oss")


def joined(parts: Sequence[Part]) -> tuple[str, str, list[tuple[str, Any]]]:
    """(content, reasoning, calls)."""
    calls = [(part.name, json.loads(part.text)) for part in parts if part.kind == "tool"]
    texts = {kind: "".join(p.text for p in parts if p.kind == kind) for kind in ("content", "reasoning")}
    return texts["content"], texts["reasoning"], calls


def read(parser: Parser, pieces: Sequence[str]) -> tuple[str, str, list[tuple[str, Any]]]:
    parts = [part for piece in pieces for part in parser.push(piece)]
    return joined([*parts, *parser.end()])


CASES = [
    (DEEPSEEK, "", "<think>\nHm.\n</think>\n\nI look." + V3, ("I look.", "Hm.\n", CALLS)),
    (DEEPSEEK, "<think>\n", "Hm.\n</think>\n\n" + V31, ("", "Hm.\n", CALLS)),
    (QWEN, "", "<think>\nHm.\n</think>\n\n" + HERMES, ("", "Hm.\n", CALLS)),
    (QWEN, "", "Hello " + CODER, ("Hello ", "", CALLS)),
    (GPT, "", OSS, ("", "Need the weather.", CALLS[:1])),
    (GPT, "", "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.",
     ("It is 4.", "Easy.", [])),
    (GPT, "", "no channel at all", ("no channel at all", "", [])),
    (Reader(None, None), "", "<think>is text</think>", ("<think>is text</think>", "", [])),
    (Reader(None, "think"), "<think>\n", "still thinking", ("", "still thinking", [])),
]  # fmt: skip


@pytest.mark.parametrize(("reader", "prompt", "text", "expected"), CASES)
def test_an_answer_is_read(reader: Reader, prompt: str, text: str, expected: Any) -> None:
    assert read(reader.parser(prompt, tools=True), [text]) == expected
    assert read(reader.parser(prompt, tools=True), list(text)) == expected


@given(st.sampled_from(CASES), st.lists(st.integers(0, 400), max_size=12))
def test_the_cuts_of_a_stream_do_not_matter(case: Any, cuts: list[int]) -> None:
    reader, prompt, text, expected = case
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert read(reader.parser(prompt, tools=True), pieces) == expected


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (DEEPSEEK, V3.replace('"days"', "days")), (DEEPSEEK, V31.replace("}", "")), (DEEPSEEK, V3[:-20]),
        (QWEN, "<tool_call>\nnot json\n</tool_call>"), (QWEN, '<tool_call>{"name": 3}</tool_call>'),
        (QWEN, '<tool_call>{"name": "x", "arguments": [1]}</tool_call>'), (QWEN, "<tool_call>{"),
        (QWEN, "<tool_call>" + "[" * 5000 + "</tool_call>"),
    ],
)  # fmt: skip
def test_a_broken_call_is_given_back_as_it_was_written(reader: Reader, text: str) -> None:
    assert read(reader.parser("", tools=True), list(text)) == (text, "", [])


@given(st.text(st.sampled_from("<>|/think_calo{}\n \"ｘ▁｜"), max_size=60))
def test_no_text_is_lost_where_nothing_is_a_marker(text: str) -> None:
    markers = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    if not any(marker in text for marker in markers):
        assert read(QWEN.parser("", tools=True), list(text)) == (text, "", [])


def test_nothing_is_held_back_without_need() -> None:
    parser = QWEN.parser("", tools=True)
    assert joined(parser.push("a < b"))[0] == "a < b"
    assert joined(parser.push(" <tool"))[0] == " "
    assert joined(parser.push("box>"))[0] == "<toolbox>"


def template(text: str) -> ChatTemplate:
    return ChatTemplate({"default": text}, {})


def test_a_family_is_told_by_its_template() -> None:
    assert Reader.of(template("{{ '<｜tool▁calls▁begin｜>' }}{{ tools }}</think>")) == Reader("deepseek", "think")
    assert Reader.of(template("<tool_call>{{ tools }}")) == Reader("qwen", None)
    assert Reader.of(template("<|channel|>{{ tools }}")) == Reader("gpt-oss", "gpt-oss")
    assert Reader.of(template("{{ messages }}")) == Reader(None, None)
    assert Reader.of(template("x"), "qwen", "think") == Reader("qwen", "think")
    assert Reader.of(template("<tool_call></think>"), "none", "none") == Reader(None, None)
    with pytest.raises(OptionError, match="--tool-parser"):
        Reader.of(template("x"), "llama")


# --- limits of schemas and expressions -------------------------------------------------------------------------------


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


LIMITS = ServeConfig(max_schema=2000, max_schema_depth=5)


@pytest.mark.parametrize(
    "schema",
    [
        deep(6), {"enum": ["x" * 3000]}, {"not": {}}, {"allOf": [{}]}, {"properties": []}, {"anyOf": {}}, {"items": 3},
        {"minItems": -1}, {"maxItems": True}, {"pattern": "a{99}{99}"}, {"pattern": 3}, {"$ref": "other.json"},
        {"properties": {"a": {"if": {}}}}, {"format": "email"}, {"uniqueItems": True}, [],
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_held_to_is_refused(schema: Any) -> None:
    with pytest.raises(HTTPError) as refused:
        check_schema(schema, LIMITS, "schema")
    assert refused.value.status == 400


def test_what_may_pass() -> None:
    schema = {"type": "object", "title": "t", "properties": {"items": {"items": {"$ref": "#/$defs/x"}}, "not": True},
              "$defs": {"x": {"enum": [1, None]}}, "additionalProperties": False, "required": ["not"]}  # fmt: skip
    assert json.loads(check_schema(schema, LIMITS, "schema")) == schema
    check_schema(deep(5), LIMITS, "schema")
    check_regex("(a{1,64}b){1,64}", "regex")
    for pattern in ("a{5000}", "(a{1,65}b){1,64}", "x" * 5000, "(a{99,}){99}"):
        with pytest.raises(HTTPError):
            check_regex(pattern, "regex")
