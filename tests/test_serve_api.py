"""Requests as they come over the wire: what is refused and how, the endpoints beside OpenAI's, metrics, keys."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from moesaic.serving import metrics
from moesaic.serving.app import make_app
from moesaic.serving.auth import Keys
from moesaic.serving.metrics import REASONS, Metrics
from moesaic.serving.options import ServeConfig
from moesaic.serving.routes import refused
from moesaic.serving.schema import NEUTRAL, ChatRequest, CompletionRequest, DetokenizeRequest
from moesaic.serving.session import Session
from moesaic.serving.state import State
from tests.serve_support import CHAT, Server, events, oracle, shared


@pytest.fixture(scope="module")
def server() -> Server:
    return shared()


def error(response: Any, status: int) -> dict[str, Any]:
    """The error of an answer, its shape and headers checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


BASE = {"model": "tiny", "prompt": "Hello", "max_tokens": 1}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**BASE, "foo": 1}, "foo"), ({**BASE, "best_of": 2}, "best_of"), ({**BASE, "echo": True}, "echo"),
        ({**BASE, "suffix": "x"}, "suffix"), ({**BASE, "n": 17}, "n"), ({**BASE, "n": 0}, "n"),
        ({**BASE, "n": 1.5}, "n"), ({**BASE, "max_tokens": "3"}, "max_tokens"),
        ({**BASE, "max_tokens": 0}, "max_tokens"),
        ({**BASE, "logprobs": 21}, "logprobs"), ({**BASE, "logprobs": True}, "logprobs"),
        ({**BASE, "temperature": -1}, "temperature"), ({**BASE, "top_p": 0}, "top_p"), ({**BASE, "stop": [""]}, "stop"),
        ({**BASE, "stop": ["x"] * 17}, "stop"), ({**BASE, "seed": 2**64}, "seed"), ({**BASE, "seed": 0.5}, "seed"),
        ({**BASE, "logit_bias": {"x": 1}}, "logit_bias"), ({**BASE, "logit_bias": {"5000": 1}}, "logit_bias"),
        ({**BASE, "stream_options": {"include_usage": True}}, "stream_options"),
        ({**BASE, "stream": True, "stream_options": {"x": True}}, "stream_options"),
        ({**BASE, "prompt": []}, "prompt"), ({**BASE, "prompt": ""}, "prompt"),
        ({**BASE, "prompt": [1, "a"]}, "prompt"),
        ({**BASE, "prompt": [[1], []]}, "prompt"), ({**BASE, "prompt": [5000]}, "prompt"),
        ({**BASE, "prompt": [1] * 3000}, "prompt"), ({**BASE, "prompt": "x" * 100_000}, "prompt"),
        ({**BASE, "prompt": ["x"] * 1000}, "prompt"), ({**BASE, "prompt": "\ud800"}, None),
        ({"model": "tiny"}, "prompt"), ({"prompt": "x"}, "model"), ({**BASE, "min_tokens": 9}, "min_tokens"),
        ({**BASE, "regex": "("}, "regex"), ({**BASE, "regex": "a{1,99}" * 3}, "regex"),
        ({**BASE, "regex": "a", "choice": ["b"]}, "choice"), ({**BASE, "choice": []}, "choice"),
        ({**BASE, "regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({**BASE, "response_format": {"type": "xml"}}, "response_format"),
        ({**BASE, "response_format": {"type": "json_schema", "json_schema": {"schema": {"oneOf": [{}]}}}},
         "response_format.json_schema.schema.oneOf"),
        ({**BASE, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://a/b"}}}},
         "response_format.json_schema.schema.$ref"),
        ({**BASE, "response_format": {"type": "json_schema", "json_schema": {"schema": {"maxLength": 10**9}}}},
         "response_format.json_schema.schema.maxLength"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(server: Server, body: dict[str, Any], param: str | None) -> None:
    sent = json.dumps(body)  # with \ud800 as an escape, which is JSON
    response = server.http.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
    found = error(response, 400)
    assert found["type"] == "invalid_request_error"
    assert found["param"] == param
    assert param is None or param.split(".")[-1] in found["message"]


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_unsupported_parameters_pass_only_where_they_ask_for_nothing(server: Server, name: str) -> None:
    for value in NEUTRAL[name]:
        assert server.post("/v1/completions", {**BASE, name: value}).status_code == 200
    for value in ("x", 7, True, {"a": 1}):
        assert error(server.post("/v1/completions", {**BASE, name: value}), 400)["param"] == name


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": []}, "messages"), ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"reasoning_effort": "low"}, "reasoning_effort"), ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"), ({"audio": {}}, "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ],
)  # fmt: skip
def test_a_chat_is_refused_by_name(server: Server, more: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 1, **more}
    assert error(server.post("/v1/chat/completions", body), 400)["param"] == param


def test_a_prompt_that_is_too_long_is_told_as_the_client_knows_it(server: Server) -> None:
    """Whether that is seen before its tokens are made, by their number, or by what is asked besides."""
    long = [{"role": "user", "content": "x " * 3000}]
    for path, body, param in (
        ("completions", {"prompt": "x" * 100_000}, "prompt"), ("completions", {"prompt": "x " * 3000}, "prompt"),
        ("completions", {"prompt": [5] * 2048}, "prompt"),
        ("completions", {"prompt": "x", "max_tokens": 2048}, "max_tokens"),
        ("chat/completions", {"messages": long}, "messages"),
    ):  # fmt: skip
        found = error(server.post(f"/v1/{path}", {"model": "tiny", **body}), 400)
        assert (found["param"], found["code"]) == (param, "context_length_exceeded")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"null", b"[]", b'"x"', b'{"model": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000],
    ids=repr,
)  # fmt: skip
def test_bodies_that_are_no_request(server: Server, raw: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        response = server.http.post(path, content=raw, headers={"content-type": "application/json"})
        assert error(response, 400)["type"] == "invalid_request_error"


MANY = 1 << 18


def many(kind: type[BaseModel], form: str, piece: str) -> tuple[type[BaseModel], str]:
    """The form with its @ replaced by many pieces, each with its number for a #."""
    return kind, form.replace("@", ",".join(piece.replace("#", str(i)) for i in range(MANY)))


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        many(CompletionRequest, '{"model": "m", "prompt": [@]}', "1.5"),
        many(CompletionRequest, '{"model": "m", "prompt": [@]}', "[]"),
        many(CompletionRequest, '{"model": "m", "prompt": "x", "stop": [@]}', "1"),
        many(CompletionRequest, '{"model": "m", "prompt": "x", @}', '"a#": 1'),
        many(CompletionRequest, '{"model": "m", "prompt": "x", "logit_bias": {@}}', '"x#": 1'),
        many(ChatRequest, '{"model": "m", "messages": [@]}', "{}"),
        many(ChatRequest, '{"model": "m", "messages": [@]}', '{"role": "user", "content": ""}'),
        many(ChatRequest, '{"model": "m", "messages": [{"role": "assistant", "tool_calls": [@]}]}', "1"),
        many(DetokenizeRequest, '{"tokens": [@]}', "-1"),
    ],
    ids=range(9),
)
def test_a_body_of_many_wrong_things_costs_little(kind: type[BaseModel], raw: str) -> None:
    """Before the first wrong one ended the reading, 4 MiB of these took 50 seconds and 4 GiB."""
    tracemalloc.start()
    with pytest.raises(ValidationError) as found:
        kind.model_validate_json(raw)
    assert found.value.error_count() < 5000
    assert refused(found.value).status == 400
    assert tracemalloc.get_traced_memory()[1] < 64 * len(raw)
    tracemalloc.stop()


def test_paths_methods_and_media(server: Server) -> None:
    error(server.http.get("/nowhere"), 404)
    response = server.http.get("/v1/completions")
    error(response, 405)
    assert response.headers["allow"] == "POST"
    error(server.http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415)
    body, packed = json.dumps(BASE).encode(), {"content-type": "application/json", "content-encoding": "gzip"}
    error(server.http.post("/v1/completions", content=gzip.compress(body), headers=packed), 415)
    packed["content-encoding"] = "identity"
    assert server.http.post("/v1/completions", content=body, headers=packed).status_code == 200
    large = server.http.post("/v1/completions", content=b" " * (5 << 20), headers={"content-type": "application/json"})
    error(large, 413)


def test_web_pages_may_call_where_they_are_named() -> None:
    """With the headers that the official client for browsers sends; others, and all where none is named, may not."""

    async def ask(named: tuple[str, ...], origin: str) -> tuple[httpx.Response, httpx.Response]:
        state = State(ServeConfig(cors_origin=named), Session(Metrics(), 1), ("m",), dict)
        app = httpx.ASGITransport(make_app(state, Keys(())))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=app, base_url="http://x") as client:
            asked = {"access-control-request-method": "POST",
                     "access-control-request-headers": "authorization,content-type,x-stainless-lang"}  # fmt: skip
            before = await client.options("/v1/completions", headers={"origin": origin, **asked})
            return before, await client.get("/health", headers={"origin": origin})

    before, answer = asyncio.run(ask(("https://a.example",), "https://a.example"))
    assert before.status_code == 200
    assert "x-stainless-lang" in before.headers["access-control-allow-headers"]
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    for named in ((), ("https://a.example",)):
        before, answer = asyncio.run(ask(named, "https://b.example"))
        assert before.status_code in (400, 405)
        assert not any(name.startswith("access-control-allow-origin") for name in answer.headers)


def test_request_ids(server: Server) -> None:
    assert server.http.get("/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.http.get("/v1/models", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req-")
    server.until(lambda: "request=abc-1 " in server.text())


def test_the_endpoints_beside(server: Server) -> None:
    tokenizer = oracle().tokenizer
    text = "What is 2 + 2? ünï"
    assert server.post("/tokenize", {"prompt": text}).json()["tokens"] == tokenizer.encode(text)
    tokens = server.post("/tokenize", {"messages": CHAT}).json()
    assert tokens == {"tokens": oracle().chat_tokens(CHAT), "count": len(oracle().chat_tokens(CHAT)),
                      "max_model_len": oracle().max_model_len}  # fmt: skip
    assert server.post("/detokenize", {"tokens": tokenizer.encode(text)}).json() == {"prompt": text}
    assert error(server.post("/detokenize", {"tokens": [5000]}), 400)["param"] == "tokens"
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").json() == {"status": "ready"}
    plan = server.http.get("/plan").json()["plan"]
    assert plan["architecture"] == "deepseek_v3"
    assert [layer for group in plan["layers"] for layer in group["layers"]] == list(range(6))
    assert "/v1/chat/completions" in server.http.get("/openapi.json").json()["paths"]


def test_the_prefix_cache_is_seen_and_flushed(server: Server) -> None:
    body = {"model": "tiny", "prompt": list(range(10, 74)), "max_tokens": 1, "temperature": 0}

    def cached() -> int:
        found = server.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return int(found)

    assert server.post("/flush_cache", None).json() == {"status": "ok"}
    assert [cached(), cached()] == [0, 48]  # whole blocks of 16, and one token is left to compute
    server.post("/flush_cache", None)
    assert cached() == 0
    assert server.metric("prefix_cache_hit_tokens_total") >= 48


def test_a_stream_of_several_answers(server: Server) -> None:
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 3, "n": 2, "temperature": 1.5, "seed": 4}
    whole = server.post("/v1/chat/completions", body).json()
    body |= {"stream": True, "return_token_ids": True}
    texts, tokens = {0: "", 1: ""}, {0: [], 1: []}  # type: ignore[var-annotated]
    for event in events(server.post("/v1/chat/completions", body)):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            tokens[choice["index"]] += choice.get("token_ids", [])
    assert [texts[i] for i in (0, 1)] == [choice["message"]["content"] for choice in whole["choices"]]
    assert [len(tokens[i]) for i in (0, 1)] == [3, 3]


def test_what_may_go_wrong_is_counted_from_zero() -> None:
    """And by no other name: a series that only comes with its first event has no increase to be alarmed by."""
    text = Metrics().text().decode()
    given = {name: set(re.findall(rf'moesaic_{name}_total{{reason="(\w+)"}} 0\.0', text)) for name in REASONS}
    assert given == {name: set(reasons) for name, reasons in REASONS.items()}
    source = "".join(path.read_text() for path in Path(metrics.__file__).parent.glob("*.py"))
    called = set(re.findall(r'\.fail\(.*, "(\w+)"\)\n', source)) | set(re.findall(r'close\("(\w+)"\)', source))
    assert called == set(REASONS["aborts"])
    assert set(re.findall(r'rejected\.labels\("(\w+)"\)', source)) == set(REASONS["rejected"])


def test_metrics_count_what_happens(server: Server) -> None:
    names = ("prompt_tokens_total", "generated_tokens_total", "time_to_first_token_seconds_count",
             "inter_token_seconds_count", "request_seconds_count")  # fmt: skip
    before = [server.metric(name) for name in names]
    length = server.metric("completions_total", reason="length")
    server.post("/v1/completions", {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "n": 2, "ignore_eos": True})
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 8, 2, 6, 2]
    assert server.metric("completions_total", reason="length") - length == 2
    text = server.http.get("/metrics").text
    layers = set(re.findall(r'moesaic_expert_balance{layer="(\d+)"}', text))
    assert layers == {"1", "2", "3", "4"}  # layer 0 is dense, the draft layer does not run
    loads = re.findall(r'moesaic_expert_load_sampled_total{expert="\d+",layer="1"} (\S+)', text)
    assert len(loads) == 16
    assert sum(map(float, loads)) > 0
    balance = max(map(float, loads)) * 16 / sum(map(float, loads))
    assert math.isclose(balance, server.metric("expert_balance", layer="1"))


def test_the_log_holds_no_prompt(server: Server) -> None:
    server.post("/v1/completions", {"model": "tiny", "prompt": "secretword", "max_tokens": 1, "user": "anna b"})
    server.until(lambda: 'user="anna b"' in server.text())
    assert "secretword" not in server.text()
