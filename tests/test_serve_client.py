"""The official `openai` client against the real server; what it gets is what `LLM` gives in this process."""

from __future__ import annotations

import asyncio
import json
import re

import jsonschema_rs
import openai
import pytest

from moesaic import SamplingParams
from tests.serve_support import CHAT, Server, oracle, shared


@pytest.fixture(scope="module")
def server() -> Server:
    return shared()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


def test_a_chat_is_the_one_of_the_python_api(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Count the letter o in the word hoos."}]
    expected = oracle().chat(question)[0]
    answer = client.chat.completions.create(model="alias", messages=question)  # type: ignore[arg-type]
    assert answer.model == "alias"
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_tokens)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Hello! What are you?"}]
    expected = oracle().chat(question)[0]
    chunks = list(client.chat.completions.create(
        model="tiny", messages=question, stream=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_sampling_parameters_mean_what_they_mean_to_the_engine(client: openai.OpenAI) -> None:
    chosen = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.25, "n": 3}
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 3, "stop_token_ids": [204]}
    bias = {6: -100.0, 369: 5.0}
    params = SamplingParams(**chosen, **extra, logit_bias=bias, stop=("an", "xyz"), max_tokens=12)  # type: ignore[arg-type]
    expected = oracle().generate("Hello", params)[0]
    answer = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=12, stop=["an", "xyz"],
        logit_bias={str(k): v for k, v in bias.items()},  # type: ignore[misc]
        extra_body={**extra, "return_token_ids": True}, **chosen,  # type: ignore[arg-type]
    )  # fmt: skip
    assert [choice.text for choice in answer.choices] == [c.text for c in expected.completions]
    assert [choice.token_ids for choice in answer.choices] == [c.tokens for c in expected.completions]  # type: ignore[attr-defined]
    assert [choice.finish_reason for choice in answer.choices] == [c.finish_reason for c in expected.completions]
    assert len({choice.text for choice in answer.choices}) > 1


def test_token_ids_in_and_several_prompts(client: openai.OpenAI) -> None:
    ids = [oracle().encode(text) for text in ("Hello", "Count the letter o")]
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=5, n=2, temperature=0)
    expected = [result.text for result in oracle().generate(ids, SamplingParams(temperature=0, max_tokens=5))]
    assert [choice.text for choice in answer.choices] == [text for text in expected for _ in range(2)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    single = client.completions.create(model="tiny", prompt=ids[0], max_tokens=5, temperature=0)
    assert single.choices[0].text == expected[0]


def test_logprobs_of_both_kinds(client: openai.OpenAI) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    expected = oracle().generate(oracle().chat_tokens(CHAT), params)[0].completions[0].logprobs
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_completion_tokens=4, logprobs=True, top_logprobs=3  # type: ignore[arg-type]
    )
    assert answer.choices[0].logprobs is not None
    found = answer.choices[0].logprobs.content or []
    assert [each.logprob for each in found] == [each.logprob for each in expected]
    assert [[t.logprob for t in each.top_logprobs] for each in found] == [[p for _, p in e.top] for e in expected]
    assert b"".join(bytes(each.bytes or ()) for each in found).decode() == answer.choices[0].message.content
    text = client.completions.create(model="tiny", prompt=oracle().chat_tokens(CHAT), max_tokens=4, logprobs=3)
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [each.logprob for each in expected]
    assert "".join(logprobs.tokens or []) == text.choices[0].text
    offsets = logprobs.text_offset or []
    tokens = logprobs.tokens or []
    assert [text.choices[0].text[at : at + len(t)] for at, t in zip(offsets, tokens, strict=True)] == tokens


def test_logprobs_in_a_stream(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=6, logprobs=1)
    chunks = list(client.completions.create(model="tiny", prompt="Hello", max_tokens=6, logprobs=1, stream=True))
    assert whole.choices[0].logprobs is not None
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        parts = [getattr(chunk.choices[0].logprobs, name) for chunk in chunks if chunk.choices[0].logprobs]
        assert [each for part in parts for each in part] == getattr(whole.choices[0].logprobs, name)


def test_the_async_client_and_many_at_once(server: Server) -> None:
    prompts = [f"What is {i} + {3 * i}?" for i in range(12)]
    params = SamplingParams(temperature=0, max_tokens=8)
    expected = [result.text for result in oracle().generate(prompts, params)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    assert asyncio.run(all_of_them()) == expected


SCHEMA = {
    "type": "object", "required": ["name", "age", "tags"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
                   "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
}  # fmt: skip


def test_an_answer_keeps_to_a_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answers = client.chat.completions.create(
        model="tiny", messages=CHAT, response_format=form, temperature=1.5, seed=3, n=2, max_tokens=60  # type: ignore[call-overload]
    )
    for choice in answers.choices:
        assert choice.finish_reason == "stop"
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(choice.message.content))
    assert len({choice.message.content for choice in answers.choices}) > 1


def test_an_answer_keeps_to_a_regex_or_a_choice(client: openai.OpenAI) -> None:
    def ask(**more: object) -> list[str]:
        found = client.completions.create(model="tiny", prompt="Hello", max_tokens=24, n=4, temperature=2.0, seed=1,
                                          extra_body=more)  # fmt: skip
        assert {choice.finish_reason for choice in found.choices} == {"stop"}
        return [choice.text for choice in found.choices]

    assert all(re.fullmatch(r"[0-9]{3}-(ab|cd)x?", text) for text in ask(regex=r"[0-9]{3}-(ab|cd)x?"))
    options = ['yes "and" no\n', "ünïcödé \U0001f600", "maybe"]
    assert set(ask(choice=options)) <= set(options)


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="{", max_tokens=40, temperature=1.0, seed=5,
                                       extra_body={"response_format": {"type": "json_object"}})  # fmt: skip
    text = answer.choices[0].text
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_errors_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x", max_tokens=100_000)
    assert (long.value.param, long.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model="tiny", messages=CHAT,  # type: ignore[call-overload]
                                       tools=[{"type": "function", "function": {"name": "f"}}])  # fmt: skip
    assert tools.value.param == "tools"
