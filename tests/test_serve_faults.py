"""Life and death of a server: clients that leave, deadlines, full queues, draining, dead engines, broken requests."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from moesaic import SamplingParams
from moesaic.serving.errors import HTTPError
from moesaic.serving.metrics import Metrics
from moesaic.serving.session import MOST_UNREAD, Job, Session
from moesaic.serving.wire import Piece
from tests.cli_support import environment, spawn
from tests.serve_support import Server, oracle, shared

LONG = {"model": "tiny", "prompt": "Hello", "max_tokens": 1000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server() -> Server:
    return shared()


def opened(server: Server, body: dict[str, Any] = LONG, size: int = 40) -> socket.socket:
    """A stream of which the first bytes have come."""
    raw = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    sock.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    received = b""
    while len(received) < size:
        part = sock.recv(4096)
        assert part, received
        received += part
    return sock


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_client_that_leaves_frees_its_request_at_once(server: Server, how: str) -> None:
    before = server.metric("aborts_total", reason="disconnect")
    sock = opened(server)
    assert server.metric("running_requests") == 1
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if how == "half-close":
        sock.shutdown(socket.SHUT_WR)
    else:
        sock.close()
    server.until(server.idle, 3)
    assert server.metric("aborts_total", reason="disconnect") == before + 1
    sock.close()


def test_a_client_that_leaves_before_the_first_token(server: Server) -> None:
    """While its answer is not a stream, and nothing has been sent."""
    before = server.metric("aborts_total", reason="disconnect")
    with pytest.raises(httpx.ReadTimeout):
        server.post("/v1/completions", {**LONG, "stream": False, "max_tokens": 1500}, timeout=0.3)
    server.until(server.idle, 3)
    assert server.metric("aborts_total", reason="disconnect") == before + 1


# --- a server with small limits --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Server:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# ours\nkey-one\nkey-two\n")
    return Server("--max-queue", "1", "--max-num-seqs", "1", "--request-timeout", "1.5", "--api-key-file", str(keys),
                  "--header-timeout", "1", "--log-json", "--host", "0.0.0.0", "--max-body", "20000",
                  "--max-prompt-tokens", "64", MOESAIC_MAX_N="2")  # fmt: skip


KEY = {"authorization": "Bearer key-one"}


def test_keys(strict: Server) -> None:
    for text in ("", "Bearer nope", "Basic key-one", "key-one", "Bearer", "Bearer key-one key-two"):
        given = {"authorization": text} if text else {}
        answer = strict.http.get("/v1/models", headers=given)
        assert answer.status_code == 401, given
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert strict.http.get("/metrics", headers=given).status_code == 401
    for key in ("key-one", "key-two"):
        assert strict.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert strict.http.get("/health").status_code == 200
    assert "key-" not in strict.text()
    assert "everybody who can reach" not in strict.text()
    assert all(json.loads(line)["level"] for line in strict.text().splitlines())


def test_limits(strict: Server) -> None:
    def refused(body: dict[str, Any]) -> str:
        answer = strict.post("/v1/completions", {"model": "tiny", "prompt": "x", **body}, headers=KEY)
        assert answer.status_code in (400, 413), answer.text
        return str(answer.json()["error"]["message"])

    assert "--max-n" in refused({"n": 3})
    assert "at most 64" in refused({"prompt": [5] * 65})
    assert "--max-body" in refused({"prompt": "x" * 30_000})


def test_a_deadline_ends_a_request_with_504(strict: Server) -> None:
    body = {**LONG, "stream": False, "max_tokens": 2000}
    answer = strict.post("/v1/completions", body, headers=KEY)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    late = strict.post("/v1/completions", {**body, "stream": True}, headers=KEY)
    assert late.status_code == 200
    assert "[DONE]" not in late.text
    last = json.loads(late.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "timeout"


def test_a_full_queue_is_429_with_retry_after(strict: Server) -> None:
    body = {**LONG, "stream": False, "max_tokens": 2000}
    threads = [threading.Thread(target=httpx.post, args=(f"{strict.base}/v1/completions",),
                                kwargs={"json": body, "headers": KEY, "timeout": 30}) for _ in range(2)]  # fmt: skip
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    answer = strict.post("/v1/completions", body, headers=KEY)
    assert answer.status_code == 429, answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.json()["error"]["code"] == "queue_full"
    for thread in threads:
        thread.join()
    assert strict.post("/v1/completions", {**body, "max_tokens": 2}, headers=KEY).status_code == 200


@pytest.mark.parametrize(
    "sent", [b"", b"GET /heal", b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"]
)
def test_half_a_request_is_cut_off(strict: Server, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as sock:
        sock.sendall(sent)
        began = time.monotonic()
        assert closed(sock)
        assert time.monotonic() - began < 5


def test_a_head_without_end_is_cut_off(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        try:
            for _ in range(100):
                sock.sendall(b"x-%d: " % time.monotonic_ns() + b"y" * 4000 + b"\r\n")
            assert b" 431 " in sock.recv(100)
        except (BrokenPipeError, ConnectionResetError):
            return  # cut off while it was still sending


def closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            continue
    except ConnectionResetError:
        return True
    return True


def test_draining_lets_requests_end_and_takes_no_new_ones(strict: Server) -> None:
    """The last test of this server."""
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 100, "ignore_eos": True}
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(strict.post("/v1/completions", body, headers=KEY)))
    thread.start()
    with httpx.Client(base_url=strict.base, trust_env=False) as other:
        strict.until(lambda: other.get("/ready").status_code == 200)
        time.sleep(0.1)
        strict.process.terminate()
        strict.until(lambda: '"draining"' in strict.text())
        if strict.process.poll() is None and not answers:
            assert other.get("/ready").status_code == 503
            assert other.post("/v1/completions", json=body, headers=KEY).headers["retry-after"]
    thread.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 100
    assert strict.process.wait(20) == 0


# --- endings ---------------------------------------------------------------------------------------------------------


def test_a_killed_engine_ends_streams_health_and_server() -> None:
    server = Server("--drain-timeout", "1")
    sock = opened(server)
    os.kill(server.engine.pid, signal.SIGKILL)
    with httpx.Client(base_url=server.base, trust_env=False) as other:
        server.until(lambda: other.get("/health").status_code == 503, 5)
        assert other.get("/ready").status_code == 503
        refused = other.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the engine has died")
    rest = b""
    while part := sock.recv(65536):
        rest += part
    sock.close()
    assert b'"error"' in rest
    assert b"[DONE]" not in rest
    assert server.process.wait(10) == 1
    last = server.text().splitlines()[-1]
    assert last == "moesaic: error: the engine process was killed by signal 9"
    assert "Traceback" not in server.text()


def test_an_engine_that_hangs_is_as_good_as_dead() -> None:
    server = Server("--engine-timeout", "2")
    sock = opened(server)
    engine = server.engine
    engine.suspend()
    with httpx.Client(base_url=server.base, trust_env=False) as other:
        server.until(lambda: other.get("/health").status_code == 503, 10)
    sock.close()
    assert server.process.wait(10) == 1
    assert server.text().splitlines()[-1] == "moesaic: error: the engine process has not answered for 2 s"
    assert not engine.is_running()


def test_an_engine_does_not_outlive_its_server() -> None:
    server = Server()
    sock = opened(server)
    engine = server.engine
    server.kill()
    deadline = time.monotonic() + 5
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    sock.close()


def test_a_server_may_be_the_first_process_of_a_container() -> None:
    """Its engine's parent has the number 1 then, as that of an orphan has elsewhere."""
    inside = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this system makes no namespaces for us")
    server = Server(inside=inside)
    first = psutil.Process(server.process.pid).children()[0]
    assert server.post("/v1/completions", {**LONG, "stream": False, "max_tokens": 2}).status_code == 200
    first.terminate()
    assert server.process.wait(20) == 0


def test_an_engine_whose_server_has_ended_already_leaves() -> None:
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-m", "moesaic.serving.worker", str(theirs.fileno())]
    with ours, theirs:
        with subprocess.Popen([*argv, str(os.getpid())], pass_fds=[theirs.fileno()], env=environment()) as engine:
            with pytest.raises(subprocess.TimeoutExpired):
                engine.wait(3)  # it waits to be told which model
            engine.kill()
        done = subprocess.run([*argv, "999999999"], pass_fds=[theirs.fileno()], env=environment(), timeout=60)
        assert done.returncode == 0


def test_an_engine_that_dies_while_draining_is_an_error() -> None:
    server = Server("--drain-timeout", "20")
    sock = opened(server)
    engine = server.engine
    server.process.terminate()
    server.until(lambda: "draining" in server.text())
    os.kill(engine.pid, signal.SIGKILL)
    assert server.process.wait(10) == 1
    sock.close()


@pytest.mark.long
def test_a_stream_that_nobody_reads_is_cut_off(server: Server) -> None:
    """Its client stays connected and takes nothing: what is kept for it is bounded, and the engine is freed."""
    before = server.metric("aborts_total", reason="slow_reader")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    raw = json.dumps({**LONG, "n": 8, "max_tokens": 1800, "logprobs": 20}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    sock.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    server.until(lambda: server.metric("aborts_total", reason="slow_reader") > before, 60)
    server.until(server.idle, 5)
    sock.close()


def test_a_reader_that_lags_frees_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a connection: a job that is streamed keeps so much for its reader and no more; one that collects, all."""

    async def run() -> None:
        session = Session(Metrics(), 1)
        sent: list[Any] = []
        monkeypatch.setattr(session, "send", sent.append)
        cut: list[bool] = []
        for behind in (lambda: cut.append(True), None):
            job = Job(session, ["0.0"])
            session.jobs["0.0"] = job
            job.behind = behind
            for _ in range(MOST_UNREAD // 4 + 1):
                job.put(Piece("0.0", "abcd", (1, 2, 3, 4)))
            if behind is None:
                assert len(await job.next()) == MOST_UNREAD // 4 + 1
                continue
            assert cut == [True]
            assert not job.pieces
            assert sent == [["abort", ["0.0"]]]
            assert not session.jobs
            with pytest.raises(HTTPError) as failed:
                await job.next()
            assert (failed.value.status, failed.value.code) == (408, "slow_reader")
        assert cut == [True]
        assert session.metrics.aborted.labels("slow_reader")._value.get() == 1  # as /metrics will show it

    asyncio.run(run())


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile long long *offset;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
  real = dlsym(RTLD_NEXT, "clock_gettime");
  int file = open(getenv("CLOCK_OFFSET"), O_RDONLY);
  if (file >= 0) offset = mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
}
int clock_gettime(clockid_t id, struct timespec *at) {
  int code = real(id, at);
  if (id == CLOCK_REALTIME && offset) at->tv_sec += *offset;
  return code;
}
int gettimeofday(struct timeval *at, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""
"""A wall clock that jumps when a number in a file changes, for any process that preloads it."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_clock_that_jumps_is_not_noticed(tmp_path: Path) -> None:
    """A day forward, two back, under a stream: it ends as it would have, nobody is late, no duration is a day long."""
    (tmp_path / "clock.c").write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", tmp_path / "clock.so", tmp_path / "clock.c", "-ldl"],
                   check=True)  # fmt: skip
    offset = tmp_path / "offset"
    offset.write_bytes(struct.pack("q", 0))
    server = Server("--deterministic", "--request-timeout", "60", "--engine-timeout", "30", "--log-json",
                    LD_PRELOAD=str(tmp_path / "clock.so"), CLOCK_OFFSET=str(offset))  # fmt: skip
    body = {**LONG, "temperature": 0, "max_tokens": 240}
    expected = oracle().generate("Hello", SamplingParams(temperature=0, max_tokens=240, ignore_eos=True))[0].text
    text, created = "", set()
    jumps = iter([86_400, -86_400, 0, 30 * 86_400])
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        for count, line in enumerate(answer.iter_lines()):
            if count % 100 == 50 and (jump := next(jumps, None)) is not None:
                with offset.open("r+b") as file:
                    file.write(struct.pack("q", jump))
                again = server.post("/v1/completions", {**body, "stream": False, "max_tokens": 1}).json()
                created.add(round((again["created"] - time.time()) / 86_400))
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    assert text == expected
    assert created == {1, -1, 0, 30}  # it did jump
    assert server.metric("request_seconds_sum") < 60
    assert server.http.get("/health").status_code == 200
    assert server.stop() == 0
    entries = [json.loads(line) for line in server.text().splitlines()]
    assert all(0 <= entry.get("seconds", 0) < 60 for entry in entries)


def test_the_deadline_of_draining_cuts_streams_off_and_leaves_with_0() -> None:
    server = Server("--drain-timeout", "0.3")
    sock = opened(server, {**LONG, "max_tokens": 2000})
    engine = server.engine
    server.process.terminate()
    rest = b""
    while part := sock.recv(65536):
        rest += part
    sock.close()
    assert b"the server is shutting down" in rest
    assert server.process.wait(10) == 0
    assert not engine.is_running()


def test_what_cannot_start_is_one_line_and_its_own_exit_code(tmp_path: Path) -> None:
    done = spawn("serve", tmp_path / "nothing", "--port", "0")
    assert done.code == 3
    assert done.err.splitlines()[-1].startswith("moesaic: error: ")
    assert "nothing" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = spawn("serve", "--port", str(taken.getsockname()[1]))
    assert done.code == 2
    assert "--port" in done.error
