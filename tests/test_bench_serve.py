"""`moesaic bench serve`: against our own server, and against servers that do all that servers should not."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moesaic import SamplingParams
from moesaic.commands import _load
from tests.cli_support import call
from tests.serve_support import oracle, shared


@pytest.mark.parametrize("chat", [False, True])
def test_our_own_server(tmp_path: Path, chat: bool) -> None:
    server = shared()
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    flags = ["--chat"] if chat else []
    done = call("bench", "serve", "--url", f"{server.base}/v1", "--requests", "6", "--rate", "50", "--tokens", "3:5",
                "--words", "4", "--json", out, "--plot", plot, "--extra-body", '{"ignore_eos": true}',
                *flags)  # fmt: skip
    assert done.code == 0, done
    line = json.loads(done.out.splitlines()[-1])
    assert (line["requests"], line["errors"], line["model"], line["not_streamed"]) == (6, 0, "tiny", 0)
    samples = json.loads(out.read_text())["samples"]
    assert line["tokens"] == sum(sample["tokens"] for sample in samples)
    for sample in samples:
        assert 3 <= sample["tokens"] <= 5
        assert sample["prompt_tokens"] > 3
        assert sample["pieces"] == sorted(sample["pieces"])
        assert sample["pieces"][-1] <= sample["took"]
    assert line["ttft_ms"]["p50"] <= line["ttft_ms"]["p99"] <= line["e2e_ms"]["max"]
    assert [sample["sent"] for sample in samples] == sorted(sample["sent"] for sample in samples)
    drawn = ElementTree.fromstring(plot.read_text())
    curves = [path.get("d") for path in drawn.iter("{http://www.w3.org/2000/svg}path") if path.get("fill") == "none"]
    assert [curve.count("L") + 1 for curve in curves] == [6, sum(len(sample["pieces"]) - 1 for sample in samples), 6]  # type: ignore[union-attr]


def test_what_is_measured_is_what_was_said() -> None:
    server = shared()
    load = _load.Load(server.base, "tiny", 3, None, 1, (5, 5), (4, 4), 0)
    prompts = [prompt for _, prompt, _ in _load.plans(load)]
    expected = oracle().generate(prompts, SamplingParams(temperature=0, max_tokens=4))
    samples, _ = asyncio.run(_load.run(load))
    assert [sample.text for sample in samples] == [result.text for result in expected]
    assert [sample.prompt_tokens for sample in samples] == [len(result.prompt_tokens) for result in expected]


# --- servers that misbehave ------------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n\r\n"
SSE, JSON = HEAD % b"text/event-stream", HEAD % b"application/json"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def scripted() -> Iterator[Callable[[bytes | None], str]]:
    """A server that says the same bytes to everybody, and closes; None: it says nothing, and stays."""
    listeners: list[socket.socket] = []
    held: list[socket.socket] = []

    def serve(listener: socket.socket, said: bytes | None) -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                held.append(sock)
                sock.recv(65536)
                if said is not None:
                    sock.sendall(said)
                    sock.close()

    def start(said: bytes | None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=serve, args=(listener, said), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for each in (*listeners, *held):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


def bench(url: str, *flags: str) -> tuple[int, dict[str, Any], str]:
    done = call("bench", "serve", "--url", url, "--model", "m", "--requests", "2", *flags)
    assert "Traceback" not in done.err
    return done.code, json.loads(done.out.splitlines()[-1]), done.err


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"", "no answer"), (b"nonsense\r\n\r\n", "no answer"),
        (b"HTTP/1.1 500 Oops\r\n\r\nbroken", "500 Oops: broken"),
        (b"HTTP/1.1 429 Slow down\r\nretry-after: 1\r\n\r\n{}", "429"),
        (b"HTTP/1.1 301 Moved\r\nlocation: /x\r\n\r\n", "301"), (SSE + EVENT, "before [DONE]"),
        (SSE, "before [DONE]"), (SSE + b"data: not json\n\n", "JSONDecodeError"), (SSE + b"data: [1]\n\n", "Error"),
        (SSE + EVENT + b'data: {"error": {"message": "out of luck"}}\n\n', "out of luck"),
        (SSE + b'data: {"error": "plain"}\n\n', "plain"), (CHUNKED + b"5\r\ndata:", "IncompleteReadError"),
        (CHUNKED + b"zz\r\n", "ValueError"), (JSON + b"<html>", "before [DONE]"), (JSON + b"{", "JSONDecodeError"),
        (SSE + b"data: " + b"x" * (2 << 20), "JSONDecodeError"),
        (SSE + b'data: {"choices": [{"text": 7}]}\n\n', "TypeError"),
    ],
)  # fmt: skip
def test_failures_are_counted_and_said(scripted: Callable[[bytes | None], str], said: bytes, told: str) -> None:
    code, found, error = bench(scripted(said))
    assert (code, found["errors"], found["ttft_ms"]) == (1, 2, {})
    assert told in error


def test_a_server_that_says_nothing_and_one_that_is_not_there(scripted: Callable[[bytes | None], str]) -> None:
    code, found, error = bench(scripted(None), "--timeout", "0.5")
    assert (code, found["errors"]) == (1, 2)
    assert "no end within 0.5 s" in error
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, found, error = bench(url)
    assert (code, found["errors"]) == (1, 2)
    assert "ConnectionRefusedError" in error
    missing = call("bench", "serve", "--url", url)
    assert missing.code == 5
    assert "which models" in missing.error


def test_dialects_of_other_servers(scripted: Callable[[bytes | None], str]) -> None:
    usage = b'"usage": {"prompt_tokens": 3, "completion_tokens": 5}'
    code, found, _ = bench(scripted(JSON + b'{"choices": [{"text": "all at once"}], ' + usage + b"}"))
    assert (code, found["not_streamed"], found["tokens"], found["prompt_tokens"]) == (0, 2, 10, 6)
    assert found["ttft_ms"] == {}
    assert found["e2e_ms"]["max"] > 0
    plain = b'data:{"choices":[{"text":"a"}]}\r\n\r\n: a comment\n\nevent: x\n' + EVENT + DONE  # and no usage at all
    code, found, _ = bench(scripted(SSE + plain))
    assert (code, found["not_streamed"], found["tokens"]) == (0, 0, 4)
    chat = b'data: {"choices": [{"delta": {"role": "assistant", "content": null}}]}\n\n'
    chat += b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\ndata: {"choices": [], ' + usage + b"}\n\n"
    code, found, _ = bench(scripted(SSE + chat + DONE), "--chat")
    assert (code, found["tokens"]) == (0, 10)
    assert found["ttft_ms"]["max"] > 0
    pieces = SSE + EVENT + DONE
    chunks = b"".join(b"%x\r\n%s\r\n" % (1, pieces[len(SSE) :][i : i + 1]) for i in range(len(pieces) - len(SSE)))
    code, found, _ = bench(scripted(CHUNKED + chunks + b"0\r\n\r\n"))
    assert (code, found["tokens"]) == (0, 2)


@pytest.mark.parametrize(
    "flags",
    [
        ("--url", "ftp://x"), ("--url", "http://h:99999"), ("--url", "http://"), ("--words", "9:3"), ("--rate", "0"),
        ("--rate", "nan"), ("--timeout", "0"), ("--requests", "0"), ("--extra-body", "{"), ("--extra-body", "[1]"),
        ("--json", "/nowhere/x"), ("--api-key-file", "/nowhere"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_option_is_one_line(flags: tuple[str, str]) -> None:
    given = flags if flags[0] == "--url" else ("--url", "http://127.0.0.1:1", *flags)
    done = call("bench", "serve", "--model", "m", *given)
    assert done.code == 2
    assert flags[0] in done.error
