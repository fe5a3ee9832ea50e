"""Many requests: a pool too small for them, `moesaic bench serve`, faults of the machine; and, long, load and soak."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import tracemalloc
from typing import Any

import pytest

from benchmarks import serve_load, serve_soak
from moesaic import SamplingParams
from moesaic.commands import _load
from moesaic.serving import logs
from moesaic.serving.frames import ROOM, Unpacker, packer
from moesaic.serving.options import ServeConfig
from moesaic.serving.wire import params_to_wire
from tests.cli_support import call
from tests.serve_support import Server, oracle


def expected(load: _load.Load) -> list[str]:
    """The answers of a load, each request alone."""
    plans = _load.plans(load)
    params = [SamplingParams(temperature=0, max_tokens=limit) for _, _, limit in plans]
    return [result.text for result in oracle().generate([prompt for _, prompt, _ in plans], params)]


def test_the_smallest_pool_serves_a_hundred_requests() -> None:
    """17 blocks of 16 tokens: preemption, waiting, and every answer as if it were alone."""
    server = Server("--deterministic", "--kv-memory", "460KiB", "--max-model-len", "256", "--max-num-seqs", "8",
                    "--served-model-name", "tiny")  # fmt: skip
    load = _load.Load(server.base, "tiny", 100, None, 100, (3, 30), (2, 10), 1)
    samples, seconds = asyncio.run(_load.run(load))
    assert [sample.error for sample in samples] == [None] * 100
    assert [sample.text for sample in samples] == expected(load)
    assert server.idle()
    assert server.metric("kv_blocks") < 40
    found = _load.summary(samples, seconds)
    assert found["tokens"] == server.metric("generated_tokens_total")
    assert server.stop() == 0


def test_percentiles_are_those_of_the_nearest_rank() -> None:
    assert _load.percentiles([]) == {}
    hundred = [i / 1000 for i in range(1, 101)]
    assert _load.percentiles(hundred) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert _load.percentiles([0.003, 0.001, 0.002]) == {"p50": 2.0, "p90": 3.0, "p99": 3.0, "max": 3.0}


def test_doctor() -> None:
    done = call("doctor", "--json")
    assert done.code == 0
    report = json.loads(done.out)
    import torch

    assert report["packages"]["torch"]["version"] == torch.__version__
    assert report["kernels"]["reference"] == ""
    absent = [each for each in report["packages"].values() if each["version"] is None]
    assert all(each["remedy"].startswith("pip install") for each in absent)
    assert "no problems" in call("doctor").out


def test_a_full_disk_loses_log_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    lost: list[int] = []
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate, logging.getLogger(name).level)
              for name in ("moesaic", "uvicorn", "asyncio")}  # fmt: skip
    handler = logs.set_up(ServeConfig(log_file="/dev/full"), lambda: lost.append(1))
    try:
        logs.log.info("this cannot be written")
        logs.log.error("nor this", extra={"fields": {"a": 1}})
    finally:
        for name, (handlers, propagate, level) in before.items():
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        with pytest.raises(OSError, match="No space left"):
            handler.stream.close()
    assert len(lost) == 2
    assert capsys.readouterr().err == ""


def test_a_full_disk_does_not_stop_the_server() -> None:
    """Its whole log goes to a full disk: it is told by its port, which is therefore given."""
    import socket
    import subprocess

    import httpx

    from tests.cli_support import command, environment

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(command("serve", "--port", str(port), "--log-file", "/dev/full"), env=environment())
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    assert process.poll() is None
                time.sleep(0.1)
            body = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
            text = client.get("/metrics").text
        lost = next(line for line in text.splitlines() if line.startswith("moesaic_log_records_lost_total"))
        assert float(lost.split()[1]) >= 2
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_log_lines_stay_lines() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "request", (), None)
    record.fields = {"user": "a\nb c", "n": 3, "none": None, "plain": "x"}
    text = logs.Lines(as_json=False).format(record)
    assert text.endswith(' info request user="a\\nb c" n=3 plain=x')
    assert json.loads(logs.Lines(as_json=True).format(record))["user"] == "a\nb c"


def test_only_what_differs_from_the_defaults_is_sent() -> None:
    params = SamplingParams(temperature=0.0, stop=("a",), logit_bias={3: 1.0}, max_tokens=4)
    sent: dict[str, Any] = params_to_wire(params)
    assert sent == {"temperature": 0.0, "stop": ("a",), "logit_bias": {3: 1.0}, "max_tokens": 4}
    assert SamplingParams(**json.loads(json.dumps({**sent, "logit_bias": {"3": 1.0}}))) == params
    assert params_to_wire(SamplingParams()) == {}


def test_a_reader_of_messages_keeps_little_room() -> None:
    """However many come: no buffer that fills slowly. A long one is taken all the same."""
    pack = packer()
    tracemalloc.start()
    try:
        unpacker = Unpacker()
        for i in range(20_000):
            assert list(unpacker.feed(pack(["abort", [f"{i}"]]))) == [["abort", [f"{i}"]]]
        assert tracemalloc.get_traced_memory()[1] < 4 * ROOM
    finally:
        tracemalloc.stop()
    assert list(unpacker.feed(pack(["log", 1, "x" * (4 * ROOM)]))) == [["log", 1, "x" * (4 * ROOM)]]


# --- long: the benchmarks, at their full size ------------------------------------------------------------------------


@pytest.mark.long
def test_512_streams_for_a_minute_each_equal_to_its_answer_alone() -> None:
    found = serve_load.measure(512, 60)
    print(found)
    assert found["requests"] >= 512
    assert (found["errors"], found["alone_errors"], found["different"], found["incomplete"]) == (0, 0, 0, 0)


@pytest.mark.long
def test_20000_short_requests_do_not_grow_the_processes() -> None:
    found = serve_soak.soak(20_000)
    print(found)
    assert found["errors"] == 0
    assert max(found["growth"].values()) < serve_soak.BOUND


@pytest.mark.long
def test_1000_disconnects_leave_nothing_behind() -> None:
    found = serve_soak.disconnects(1000)
    print(found)
    assert found["aborted"] == 1200  # with the first ones
    assert found["descriptors_after"] == found["descriptors_before"]
    assert max(found["growth"].values()) < serve_soak.BOUND


@pytest.mark.long
def test_the_measure_of_load_sees_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge of the long test, on a small load, and on answers that one letter is changed of."""
    found = serve_load.measure(6, 0.5)
    assert (found["errors"], found["alone_errors"], found["different"], found["incomplete"]) == (0, 0, 0, 0)
    assert found["requests"] >= 6
    truth = serve_load.one

    async def other(*args: Any) -> Any:
        sample = await truth(*args)
        sample.text, sample.tokens = sample.text + "x", sample.tokens - 1
        return sample

    monkeypatch.setattr(serve_load, "one", other)
    found = serve_load.measure(3, 0.1)
    assert found["different"] == found["incomplete"] == found["requests"] > 0
