"""The server as an attacker meets it: schemathesis over its own document, and bytes that are no HTTP at all.

The long versions (`make test-long`) do the same thousands of times; memory and descriptors must be where they were.
Streams that are left in the middle are in `benchmarks/serve_soak.py`.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.serve_support import CHAT, Server

load_all_checks()


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """Requests cannot be long here, so that thousands of them are quick."""
    server = Server("--max-model-len", "32", "--max-n", "2", "--header-timeout", "2", "--served-model-name", "tiny")
    yield server
    assert server.stop() == 0
    assert "defect" not in server.text()
    assert "Traceback" not in server.text()


@pytest.fixture(scope="module")
def document(small: Server) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{small.base}/openapi.json")


# Valid by the document, refused all the same: a prompt longer than the model's length, a stop set that leaves no room,
# a regular expression that does not compile. The document cannot say these, so acceptance is not demanded.
NOT_DEMANDED = [positive_data_acceptance]


def explore(document: schemathesis.BaseSchema, examples: int) -> int:
    """Calls every operation with data that the document allows, and that it does not; how often in all."""
    called = 0
    for found in document.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:

            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def call(case: schemathesis.Case) -> None:
                nonlocal called
                called += 1
                answer = case.call()
                unread = [negative_data_rejection] * (answer.status_code == 413)  # too long: refused before it is read
                case.validate_response(answer, excluded_checks=NOT_DEMANDED + unread)

            with suppress(Unsatisfiable):  # nothing can be wrong about a GET without parameters
                call()
    return called


def test_the_server_keeps_to_its_document(document: schemathesis.BaseSchema) -> None:
    assert explore(document, 15) > 100


@pytest.mark.long
def test_the_server_keeps_to_its_document_at_length(document: schemathesis.BaseSchema) -> None:
    called = explore(document, 400)
    print(f"{called} calls")
    assert called > 2000


TEXT, CONVERSATION = "/v1/completions", "/v1/chat/completions"
STREAM = {"model": "tiny", "stream": True, "max_tokens": 4}
STREAMS = [
    (TEXT, {**STREAM, "prompt": "Hi", "logprobs": 2, "return_token_ids": True,
            "stream_options": {"include_usage": True}}),
    (TEXT, {**STREAM, "prompt": ["a", "b"], "n": 2}),
    (CONVERSATION, {**STREAM, "messages": CHAT[:1], "stream_options": {"include_usage": True}}),
    (CONVERSATION, {**STREAM, "messages": CHAT[:1], "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_every_event_of_a_stream_is_documented(document: schemathesis.BaseSchema, path: str, body: Any) -> None:
    answer = document[path]["POST"].Case(body=body, media_type="application/json").call_and_validate()
    assert answer.status_code == 200
    assert answer.headers["content-type"][0].startswith("text/event-stream")


def test_a_wrong_event_would_be_seen(small: Server) -> None:
    told = small.http.get("/openapi.json").json()
    told["components"]["schemas"]["TextChunk"]["properties"]["object"] = {"const": "another"}
    told["servers"] = [{"url": small.base}]
    wrong = schemathesis.openapi.from_dict(told)
    wrong.config.update(base_url=small.base)
    with pytest.raises(FailureGroup, match="SSE event"):
        wrong[TEXT]["POST"].Case(body=STREAMS[0][1], media_type="application/json").call_and_validate()


def attack(port: int, dice: random.Random) -> None:
    """One connection that does something wrong, and leaves in some way."""
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 20, "stream": True, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    good = head + b"content-length: %d\r\n\r\n" % len(body) + body
    sent = dice.choice([
        dice.randbytes(dice.randrange(1, 3000)),
        good[: dice.randrange(len(good))],
        good * dice.randrange(1, 4),
        head + b"content-length: 99999999999\r\n\r\n" + body,
        head + b"content-length: -1\r\n\r\n",
        head + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        head + b"transfer-encoding: chunked\r\n\r\nZZ\r\nhello",
        head + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        head + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n{\r\n" * 50,
        b"GET /" + b"a" * dice.randrange(100_000) + b" HTTP/1.1\r\n\r\n",
        b"GET /%ff%00%0d%0a HTTP/1.1\r\nhost: x\r\nx-request-id: \xff\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(200),
    ])  # fmt: skip
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock, suppress(ConnectionError, TimeoutError):
        sock.settimeout(0.2)
        sock.sendall(sent)
        ending = dice.randrange(4)
        if ending == 0:
            sock.shutdown(socket.SHUT_WR)
        if ending < 3:
            sock.recv(dice.choice([1, 100, 65536]))
        if ending == 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def descriptors(server: Server) -> list[int]:
    return [process.num_fds() for process in (psutil.Process(server.process.pid), server.engine)]


def memory(server: Server) -> list[int]:
    return [process.memory_info().rss for process in (psutil.Process(server.process.pid), server.engine)]


def onslaught(server: Server, count: int) -> None:
    dice = random.Random(0)
    for _ in range(count):
        attack(server.port, dice)


def test_bytes_that_are_no_request_do_no_harm(small: Server) -> None:
    onslaught(small, 30)
    small.until(small.idle, 10)
    before = descriptors(small)
    onslaught(small, 60)
    small.until(lambda: small.idle() and descriptors(small) <= before, 10)
    assert small.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2}).status_code == 200


@pytest.mark.long
def test_an_onslaught_leaves_nothing_behind() -> None:
    server = Server("--header-timeout", "2")
    onslaught(server, 500)
    server.until(server.idle, 10)
    time.sleep(6)  # what is freed goes back to the system every five seconds
    before, bytes_before = descriptors(server), memory(server)
    onslaught(server, 2000)
    server.until(lambda: server.idle() and descriptors(server) <= before, 20)
    time.sleep(6)
    for was, now in zip(bytes_before, memory(server), strict=True):
        assert now <= was * 1.03 + (1 << 20), (was, now)
    assert server.stop() == 0
    assert "Traceback" not in server.text()
