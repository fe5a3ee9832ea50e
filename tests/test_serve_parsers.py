"""Tool calls and reasoning, read from answers as the families write them, however the stream is cut.

The answers are written by hand after each family's published format; that a template shows a call the way the parser
reads it is checked with the formats' own templates where they are small enough to stand here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import xgrammar
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
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>time</tool_call>"
)
PARAMETERS = {"type": "object", "required": ["city", "days"], "additionalProperties": False, "properties": {
    "city": {"enum": ["Bern", 'Zürich "x"', "12", "a<b>", "true"], "type": "string"},
    "days": {"type": "integer", "minimum": 0, "maximum": 30}}}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
         {"type": "function", "function": {"name": "time"}}]  # fmt: skip
CALLS = [("weather", json.loads(WEATHER)), ("time", {})]

DEEPSEEK, QWEN, GPT = Reader("deepseek", "think"), Reader("qwen", "think"), Reader("gpt-oss", "gpt-oss")
ZAI = Reader("glm", "think")


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
    (QWEN, "", CODER.replace("Bern", "12"), ("", "", [("weather", {"city": "12", "days": 2}), CALLS[1]])),
    (QWEN, "<think>\n", "A <tool_call> is due.</think>" + HERMES, ("", "A <tool_call> is due.", CALLS)),
    (ZAI, "", "<think>Hm.</think>\n" + GLM, ("", "Hm.", CALLS)),
    (GPT, "", " to=functions.weather<|channel|>commentary json<|message|>" + WEATHER + "<|call|>", ("", "", CALLS[:1])),
    (GPT, "", OSS, ("", "Need the weather.", CALLS[:1])),
    (GPT, "", "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.",
     ("It is 4.", "Easy.", [])),
    (GPT, "", "no channel at all", ("no channel at all", "", [])),
    (Reader(None, None), "", "<think>is text</think>", ("<think>is text</think>", "", [])),
    (Reader(None, "think"), "<think>\n", "still thinking", ("", "still thinking", [])),
]  # fmt: skip


@pytest.mark.parametrize(("reader", "prompt", "text", "expected"), CASES)
def test_an_answer_is_read(reader: Reader, prompt: str, text: str, expected: Any) -> None:
    assert read(reader.parser(prompt, TOOLS), [text]) == expected
    assert read(reader.parser(prompt, TOOLS), list(text)) == expected


@given(st.sampled_from(CASES), st.lists(st.integers(0, 400), max_size=12))
def test_the_cuts_of_a_stream_do_not_matter(case: Any, cuts: list[int]) -> None:
    reader, prompt, text, expected = case
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert read(reader.parser(prompt, TOOLS), pieces) == expected


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (DEEPSEEK, V3.replace('"days"', "days")), (DEEPSEEK, V31.replace("}", "")), (DEEPSEEK, V3[:-20]),
        (QWEN, "<tool_call>\nnot json\n</tool_call>"), (QWEN, '<tool_call>{"name": 3}</tool_call>'),
        (QWEN, '<tool_call>{"name": "x", "arguments": [1]}</tool_call>'), (QWEN, "<tool_call>{"),
        (ZAI, "<tool_call>two words</tool_call>"), (ZAI, "<tool_call>x<arg_key>k</arg_key></tool_call>"),
        (QWEN, "<tool_call>" + "[" * 5000 + "</tool_call>"),
    ],
)  # fmt: skip
def test_a_broken_call_is_given_back_as_it_was_written(reader: Reader, text: str) -> None:
    assert read(reader.parser("", TOOLS), list(text)) == (text, "", [])


@given(st.text(st.sampled_from("<>|/think_calo{}\n \"ｘ▁｜"), max_size=60))
def test_no_text_is_lost_where_nothing_is_a_marker(text: str) -> None:
    markers = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    if not any(marker in text for marker in markers):
        assert read(QWEN.parser("", TOOLS), list(text)) == (text, "", [])


def test_nothing_is_held_back_without_need() -> None:
    parser = QWEN.parser("", TOOLS)
    assert joined(parser.push("a < b"))[0] == "a < b"
    assert joined(parser.push(" <tool"))[0] == " "
    assert joined(parser.push("box>"))[0] == "<toolbox>"


def template(text: str) -> ChatTemplate:
    return ChatTemplate({"default": text}, {})


def test_a_family_is_told_by_its_template() -> None:
    assert Reader.of(template("{{ '<｜tool▁calls▁begin｜>' }}{{ tools }}</think>")) == Reader("deepseek", "think")
    assert Reader.of(template("<tool_call>{{ tools }}")) == Reader("qwen", None)
    assert Reader.of(template("<tool_call><arg_key>{{ tools }}")) == Reader("glm", None)
    assert Reader.of(template("<|channel|>{{ tools }}")) == Reader("gpt-oss", "gpt-oss")
    assert Reader.of(template("{{ messages }}")) == Reader(None, None)
    assert Reader.of(template("x"), "qwen", "think") == Reader("qwen", "think")
    assert Reader.of(template("<tool_call></think>"), "none", "none") == Reader(None, None)
    with pytest.raises(OptionError, match="--tool-parser"):
        Reader.of(template("x"), "llama")


# --- what xgrammar says of the families' formats ---------------------------------------------------------------------

FORMATS = [("deepseek_r1", DEEPSEEK), ("deepseek_v3_1", DEEPSEEK), ("qwen_3", QWEN), ("qwen_3_coder", QWEN),
           ("glm_4_7", ZAI), ("harmony", GPT)]  # fmt: skip
SPECIAL = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>",
    "<|call|>", "<|constrain|>", "<|return|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
TOKENS = [*(bytes([i]) for i in range(256)), *(mark.encode() for mark in SPECIAL), b"<end>"]


def answer_of(model: str, dice: random.Random, *, reasoning: bool) -> str:
    """A random answer with one call of `weather`, walked through xgrammar's own description of the model's format."""
    tag = xgrammar.get_model_structural_tag(
        model, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "weather"}}, reasoning=reasoning,
        parallel_tool_calls=False, max_whitespace_cnt=2,
    )  # fmt: skip
    info = xgrammar.TokenizerInfo(TOKENS, vocab_size=len(TOKENS), stop_token_ids=[len(TOKENS) - 1])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info, max_threads=1).compile_structural_tag(tag))
    words, said = np.zeros((1, -(-len(TOKENS) // 32)), np.int32), b""
    while not matcher.is_terminated():
        words.fill(-1)
        matcher.fill_next_token_bitmask(words, 0)
        bits = np.unpackbits(words.view(np.uint8).reshape(-1), bitorder="little")[: len(TOKENS)]
        allowed = np.flatnonzero(bits).tolist()
        plain = [token for token in allowed if 97 <= token <= 122] if len(allowed) > 60 else allowed
        marks = [token for token in allowed if token >= 256]
        token = dice.choice(marks if marks and dice.random() < 0.4 else plain)
        assert matcher.accept_token(token)
        said += TOKENS[token]
        assert len(said) < 5000
    return said.decode().removesuffix("<end>")


@pytest.mark.parametrize(("model", "reader"), FORMATS)
@pytest.mark.parametrize("reasoning", [False, True])
def test_random_answers_in_the_format_of_a_family_are_read(model: str, reader: Reader, reasoning: bool) -> None:
    """Letter by letter. The call is found whatever was thought before it, markers of other families included."""
    for seed in range(8):
        text = answer_of(model, random.Random(seed), reasoning=reasoning)
        prompt = "<think>\n" if reasoning and reader is not GPT else ""
        if reader is GPT and "<|message|>" not in text:
            continue  # its format allows an answer that ends before it begins
        content, thoughts, calls = read(reader.parser(prompt, TOOLS), list(text))
        assert [name for name, _ in calls] == ["weather"], text
        arguments = calls[0][1]
        if model in ("qwen_3_coder", "glm_4_7"):  # where white space around a value cannot be told from it
            arguments["city"] = arguments["city"].strip()
        assert jsonschema_rs.is_valid(PARAMETERS, arguments), (text, arguments)
        assert content.strip() == "", text
        if reasoning and reader is not GPT:
            assert thoughts.strip() == text.partition("</think>")[0].strip()


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
