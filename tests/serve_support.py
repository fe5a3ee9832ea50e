"""Real servers for the tests: `moesaic serve` as its users start it, on a free port, with the embedded model."""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from httpx import Response

from moesaic import LLM
from tests.cli_support import command, environment

CHAT = [{"role": "user", "content": "What is 487 + 4338?"}]
READY = 90.0


class Server:
    """A server process. Its log is a file, so that it never blocks on a reader. inside: a command that runs it."""

    def __init__(self, *flags: str, wait: bool = True, inside: Sequence[str] = (), **more: str) -> None:
        self.log_path = Path(tempfile.mkdtemp(prefix="moesaic-serve-")) / "log"
        self.log = self.log_path.open("wb")
        argv = [*inside, *command("serve", "--port", "0", "--max-num-seqs", "8", "--kv-memory", "8MiB", *flags)]
        # Warnings are not errors in the engine's own process: an optional package may have some.
        self.process = subprocess.Popen(argv, stderr=self.log, stdout=self.log,
                                        env=environment(PYTHONWARNINGS="default", **more))  # fmt: skip
        atexit.register(self.kill)
        self.port = int(self.expect(r"listening address=\S*?:(\d+) |\"address\": \"[^\"]*:(\d+)\""))
        self.base = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.base, timeout=60, trust_env=False)
        if wait:
            self.until(lambda: self.http.get("/ready").status_code == 200, READY)

    def expect(self, pattern: str) -> str:
        """Waits for a line of the log; its first group."""
        found: list[re.Match[str]] = []
        self.until(lambda: found.extend(re.finditer(pattern, self.text())) or bool(found), READY)
        return next(group for group in found[0].groups() if group)

    def until(self, true: Callable[[], Any], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, f"the server has left: {self.text()}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.text()}"
            time.sleep(0.02)

    def text(self) -> str:
        return self.log_path.read_text(errors="replace")

    def post(self, path: str, body: Any, **more: Any) -> Response:
        return self.http.post(path, json=body, **more)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 where there is none."""
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        head = f"moesaic_{name}{{{shown}}} " if labels else f"moesaic_{name} "
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.removeprefix(head)) for line in lines if line.startswith(head)), 0.0)

    def idle(self) -> bool:
        """Whether nothing runs or waits, and no request holds a block."""
        return not any(self.metric(n) for n in ("queue_requests", "running_requests", "kv_blocks_used"))

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        return psutil.Process(self.process.pid).children()[0]

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base}/v1", api_key=key, max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.base}/v1", api_key="none", max_retries=0, timeout=60)

    def stop(self, seconds: float = 20.0) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()


@cache
def shared() -> Server:
    """One for all tests that leave it as they found it."""
    return Server("--deterministic", "--served-model-name", "tiny", "--served-model-name", "alias")


@cache
def oracle() -> LLM:
    """The same model in this process, without a server."""
    return LLM(progress=False, deterministic=True, max_num_seqs=8, kv_memory=8 << 20)


def events(response: Response) -> list[Any]:
    """The JSON of server-sent events; [DONE] must be the last."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]
