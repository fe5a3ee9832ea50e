"""Grammars from strangers: what never ends costs its own request, and nobody else anything."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from moesaic.serving import guides
from moesaic.serving.guides import Guides
from tests.cli_support import SRC
from tests.serve_support import Server, events, oracle, shared

ENDLESS = r"((((\w*|[a-z]*)*)*)*)*" * 160  # compiled in no time, each token then takes longer than the one before
LETTERS = {"logit_bias": {str(oracle().tokenizer.encode("ood", False)[-1]): 100}}
BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 16, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def server() -> Server:
    return shared()


def helpers(server: Server) -> list[psutil.Process]:
    return server.engine.children()


def test_an_endless_expression_costs_its_own_request(server: Server) -> None:
    """While it is tried, a stream beside it goes on but for the patience that one mask has; then it is known."""
    gaps: list[float] = []

    def stream() -> None:
        body = {**BODY, "stream": True, "max_tokens": 600, "ignore_eos": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            last = time.monotonic()
            for _ in answer.iter_bytes():
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

    assert server.post("/v1/completions", {**BODY, "regex": "[a-z]{3}"}).status_code == 200
    beside = threading.Thread(target=stream)
    beside.start()
    began = time.monotonic()
    answer = server.post("/v1/completions", {**BODY, "regex": ENDLESS, **LETTERS})
    assert answer.status_code == 400, answer.text
    assert "takes too long" in answer.json()["error"]["message"]
    assert time.monotonic() - began < 20
    beside.join()
    assert max(gaps) < guides.MASK_PATIENCE + 2
    began = time.monotonic()
    assert server.post("/v1/completions", {**BODY, "regex": ENDLESS, **LETTERS}).status_code == 400
    assert time.monotonic() - began < 1  # nobody tries it again
    after = server.post("/v1/completions", {**BODY, "regex": "[0-9]{4}"}).json()
    assert after["choices"][0]["text"].isdigit()
    server.until(server.idle)


@pytest.mark.long
def test_endless_expressions_one_after_another_do_not_end_the_engine(server: Server) -> None:
    """Steps of which nobody survives end an engine, unless it is the requests' own fault."""
    for i in range(3):
        answer = server.post("/v1/completions", {**BODY, "regex": ENDLESS + "y" * (i + 1), **LETTERS})
        assert answer.status_code == 400, answer.text
    assert server.post("/v1/completions", BODY).status_code == 200
    assert len(helpers(server)) <= 1


def test_an_answer_whose_helper_is_killed_is_told_so(server: Server) -> None:
    server.post("/v1/completions", {**BODY, "regex": "x"})
    body = {**BODY, "regex": "a{1000}", "max_tokens": 900, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        chunks = answer.iter_text()
        next(chunks)
        os.kill(helpers(server)[0].pid, signal.SIGKILL)
        rest = "".join(chunks)
    assert json.loads(rest.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "request_failed"
    assert "[DONE]" not in rest
    whole = server.post("/v1/completions", {**BODY, "regex": "a{3}"}).json()
    assert whole["choices"][0]["text"] == "aaa"


def test_a_helper_ends_with_its_engine() -> None:
    server = Server()
    assert server.post("/v1/completions", {**BODY, "regex": "x"}).status_code == 200
    helper = helpers(server)[0]
    os.kill(server.engine.pid, signal.SIGKILL)
    server.process.wait(20)
    deadline = time.monotonic() + 5
    while helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE


def test_several_answers_share_a_schema_and_stream(server: Server) -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"enum": [1, 2, 3]}},
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {**BODY, "n": 4, "stream": True, "response_format": form}
    texts = [""] * 4
    for event in events(server.post("/v1/completions", body)):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert all(json.loads(text)["a"] in (1, 2, 3) for text in texts)


# --- the engine's side alone -----------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guides]:
    monkeypatch.setenv("PYTHONPATH", str(SRC))
    found = Guides(oracle().path, oracle().engine.vocab)
    yield found
    for helper in found.helpers:
        helper.kill()


def collect(found: Guides, count: int, seconds: float = 60.0) -> dict[str, Any]:
    """Request id -> what makes its guides, or the error."""
    ready: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    while len(ready) < count:
        for ids, _, _, guiding in found.ready():
            try:
                ready[ids[0][0]] = guiding()(frozenset({1}))
            except Exception as error:
                ready[ids[0][0]] = error
        assert time.monotonic() < deadline, ready
        time.sleep(0.01)
    return ready


def test_what_takes_too_long_to_compile_holds_nobody_up(alone: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused; what waited behind it is compiled by another process; what is being followed goes on."""
    monkeypatch.setattr(guides, "COMPILE_PATIENCE", 1.5)
    alone.start([["walking", 0]], [5], {}, ["regex", "ab*"])
    walk = collect(alone, 1)["walking"]
    slow = "|".join(f"(a|b)*c{{0,{i}}}" for i in range(1, 250))
    alone.start([["slow", 0]], [5], {}, ["regex", slow])
    alone.start([["behind", 0]], [5], {}, ["regex", "[0-9]"])
    found = collect(alone, 2)
    assert "takes too long" in str(found["slow"])
    assert found["behind"].allowed_W().any()
    assert len(alone.helpers) == 2
    assert walk.allowed_W().any()
    first = alone.helpers[0]
    del walk
    assert first.dead  # with its last answer
    alone.start([["again", 0]], [5], {}, ["regex", slow])
    assert "takes too long" in str(collect(alone, 1)["again"])


def test_a_walk_says_what_xgrammar_says(alone: Guides) -> None:
    from moesaic.engine.grammar import Grammars

    grammars = Grammars(oracle().tokenizer, oracle().engine.vocab)
    matcher = grammars.guide(grammars.compile("regex", "[0-9]{2}-x+"), {1})
    alone.start([["a", 0]], [5], {}, ["regex", "[0-9]{2}-x+"])
    walk = collect(alone, 1)["a"]
    for text in ("4", "2", "-", "x", "x"):
        assert walk.allowed_W().tolist() == matcher.allowed_W().tolist()
        token = oracle().tokenizer.encode(text, False)[0]
        walk.accept(token)
        matcher.accept(token)
    assert walk.allowed_W().tolist() == matcher.allowed_W().tolist()
    walk.accept(oracle().tokenizer.encode("y", False)[0])
    with pytest.raises(Exception, match="restarted"):
        walk.allowed_W()


def test_what_is_wrong_is_said_and_what_is_left_is_forgotten(alone: Guides) -> None:
    alone.start([["wrong", 0]], [5], {}, ["regex", "("])
    alone.start([["gone", 0]], [5], {}, ["regex", "abc"])
    alone.forget(["gone"])
    alone.start([["good", 0]], [5], {}, ["choice", '["x", "y"]'])
    found = collect(alone, 2)
    assert getattr(found["wrong"], "where", None) == "regex"
    assert found["good"].allowed_W().any()
    assert not alone.pending
