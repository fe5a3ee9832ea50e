"""Every parameter, through both official clients, streamed and not: four ways that must come to the same answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import jsonschema_rs
import pytest

from tests.serve_support import CHAT, Server, oracle, shared

SCHEMA = {"type": "object", "required": ["a"], "additionalProperties": False,
          "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
HOT = {"temperature": 1.2, "seed": 11}


@pytest.fixture(scope="module")
def server() -> Server:
    return shared()


def merged(chunks: Iterable[Any], chat: bool) -> list[dict[str, Any]]:
    """What the chunks of a stream add up to, by choice; that every choice ends once is checked."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = found.setdefault(choice.index, {"text": "", "finish": None, "logprobs": [], "token_ids": []})
            one["text"] += (choice.delta.content if chat else choice.text) or ""
            if choice.logprobs is not None:
                part = choice.logprobs.content if chat else choice.logprobs.token_logprobs
                one["logprobs"] += [(e.token, e.logprob) for e in part] if chat else part
            one["token_ids"] += getattr(choice, "token_ids", None) or []
            if choice.finish_reason is not None:
                assert one["finish"] is None
                one["finish"] = choice.finish_reason
    return [found[i] for i in sorted(found)]


def whole(answer: Any, chat: bool) -> list[dict[str, Any]]:
    found = []
    for choice in sorted(answer.choices, key=lambda each: each.index):
        logprobs: list[Any] = []
        if choice.logprobs is not None:
            content = choice.logprobs.content if chat else choice.logprobs.token_logprobs
            logprobs = [(e.token, e.logprob) for e in content] if chat else content
        found.append({"text": (choice.message.content if chat else choice.text) or "", "finish": choice.finish_reason,
                      "logprobs": logprobs, "token_ids": getattr(choice, "token_ids", None) or []})  # fmt: skip
    return found


async def by_async(server: Server, chat: bool, given: dict[str, Any]) -> list[list[dict[str, Any]]]:
    async with server.async_client() as client:
        create: Any = client.chat.completions.create if chat else client.completions.create
        answer, stream = await asyncio.gather(create(**given), create(**given, stream=True))
        return [whole(answer, chat), merged([chunk async for chunk in stream], chat)]


def four_ways(server: Server, chat: bool, **given: Any) -> list[dict[str, Any]]:
    given = {"model": "tiny", **({"messages": CHAT} if chat else {"prompt": "Hello"}), **given}
    client = server.client()
    create: Any = client.chat.completions.create if chat else client.completions.create
    answers = [whole(create(**given), chat), merged(create(**given, stream=True), chat)]
    answers += asyncio.run(by_async(server, chat, given))
    assert answers[1:] == answers[:1] * 3
    return answers[0]


def some_token() -> int:
    return oracle().tokenizer.encode("7", False)[0]


Check = Callable[[list[dict[str, Any]]], object]
BOTH: dict[str, tuple[dict[str, Any], Check]] = {
    "max_tokens": ({"max_tokens": 3}, lambda a: [c["finish"] for c in a] == ["length"]),
    "n, seed, temperature": ({"n": 3, "max_tokens": 12, "temperature": 3.0, "seed": 5},
                             lambda a: len({c["text"] for c in a}) > 1),
    "top_p": ({"top_p": 0.5, "max_tokens": 8, **HOT}, lambda a: a[0]["text"]),
    "stop": ({"stop": ["a", "e", "i"], "max_tokens": 20, **HOT}, lambda a: not set("aei") & set(a[0]["text"])),
    "penalties": ({"presence_penalty": 1.0, "frequency_penalty": 2.0, "max_tokens": 30,
                   "extra_body": {"ignore_eos": True, "return_token_ids": True}},
                  lambda a: max(map(a[0]["token_ids"].count, a[0]["token_ids"])) < 12),
    "user": ({"user": "anna", "max_tokens": 2}, lambda a: a),
    "regex": ({"extra_body": {"regex": "[0-9]{3}"}, "max_tokens": 9, **HOT},
              lambda a: re.fullmatch("[0-9]{3}", a[0]["text"]) and a[0]["finish"] == "stop"),
    "choice": ({"extra_body": {"choice": ["yes", "no"]}, "max_tokens": 9, "n": 2, **HOT},
               lambda a: {c["text"] for c in a} <= {"yes", "no"}),
    "json_schema": ({"extra_body": {"response_format": FORM}, "max_tokens": 30, **HOT},
                    lambda a: jsonschema_rs.is_valid(SCHEMA, json.loads(a[0]["text"]))),
    "json_object": ({"extra_body": {"response_format": {"type": "json_object"}}, "max_tokens": 12, **HOT},
                    lambda a: a[0]["text"].startswith("{")),
    "token ids out": ({"extra_body": {"return_token_ids": True}, "max_tokens": 4},
                      lambda a: len(a[0]["token_ids"]) == 4),
    "top_k, min_p, repetition_penalty": ({"extra_body": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3},
                                          "max_tokens": 8, **HOT}, lambda a: a[0]["text"]),
    "min_tokens, ignore_eos": ({"extra_body": {"min_tokens": 9, "ignore_eos": True, "return_token_ids": True},
                                "max_tokens": 12}, lambda a: len(a[0]["token_ids"]) == 12),
    "stop_token_ids, include_stop": ({"extra_body": {"include_stop": True, "stop_token_ids": [some_token()]},
                                      "max_tokens": 40}, lambda a: a),
    "skip_special_tokens": ({"extra_body": {"skip_special_tokens": False}, "max_tokens": 6}, lambda a: a),
    "what asks for nothing": ({"extra_body": {"best_of": 1, "echo": False, "store": False, "metadata": None},
                               "max_tokens": 2}, lambda a: a),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_parameter_of_both(server: Server, chat: bool, name: str) -> None:
    given, check = BOTH[name]
    assert check(four_ways(server, chat, **given))


def test_logit_bias(server: Server) -> None:
    for chat in (False, True):
        found = four_ways(server, chat, max_tokens=4, logit_bias={str(some_token()): 100},
                          extra_body={"return_token_ids": True})  # fmt: skip
        assert found[0]["token_ids"] == [some_token()] * 4


def test_logprobs(server: Server) -> None:
    text = four_ways(server, False, max_tokens=5, logprobs=2)
    assert len(text[0]["logprobs"]) == 5
    chat = four_ways(server, True, max_completion_tokens=5, logprobs=True, top_logprobs=4)
    assert len(chat[0]["logprobs"]) == 5
    assert all(value <= 0 for _, value in chat[0]["logprobs"])


def test_max_completion_tokens_and_reasoning_effort_and_roles(server: Server) -> None:
    assert four_ways(server, True, max_completion_tokens=2)[0]["finish"] == "length"
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    named = [{**said[0], "role": "system"}, said[1]]
    assert four_ways(server, True, messages=said, max_tokens=6) == four_ways(server, True, messages=named, max_tokens=6)
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    assert four_ways(server, True, messages=parts, max_tokens=6) == four_ways(server, True, max_tokens=6)


def test_token_ids_and_several_prompts_in(server: Server) -> None:
    ids = oracle().encode("Hello")
    assert four_ways(server, False, prompt=ids, max_tokens=4) == four_ways(server, False, max_tokens=4)
    many = four_ways(server, False, prompt=[ids, oracle().encode("What")], n=2, max_tokens=4)
    assert many[0] == many[1] == four_ways(server, False, max_tokens=4)[0]
    assert many[2] == many[3]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_usage_in_a_stream(server: Server, chat: bool) -> None:
    client = server.client()
    create: Any = client.chat.completions.create if chat else client.completions.create
    asked = {"messages": CHAT} if chat else {"prompt": "Hello"}
    given = {"model": "tiny", "max_tokens": 5, **asked}
    usage = create(**given).usage
    chunks = list(create(**given, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], usage.completion_tokens)
    assert chunks[-1].usage.prompt_tokens == usage.prompt_tokens
    assert all(chunk.usage is None for chunk in create(**given, stream=True))
