"""A real server for the benchmarks of serving: started as its users start it, watched from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120.0


def engine_threads() -> int:
    """What torch takes in the engine's process: OMP_NUM_THREADS, else one per core."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


class Serving:
    """`with Serving("--max-num-seqs", "64") as server:`. program: what Python runs."""

    def __init__(self, *flags: str, program: Sequence[str] = ("-m", "moesaic")) -> None:
        self.argv = [sys.executable, *program, "serve", "--port", "0", *flags]

    def __enter__(self) -> Serving:
        self.log = tempfile.NamedTemporaryFile(prefix="moesaic-serve-", suffix=".log")
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}  # this checkout's, whatever is installed
        self.process = subprocess.Popen(self.argv, stderr=self.log, stdout=self.log, env=env)
        self.url = ""
        began = time.monotonic()
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() - began > PATIENCE:
                raise SystemExit(f"the server did not start: {self.text()}")
            time.sleep(0.1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.process.terminate()
        code = self.process.wait(60)
        self.log.close()
        if kind is None and code != 0:
            raise SystemExit(f"the server left with {code}")

    def text(self) -> str:
        return Path(self.log.name).read_text(errors="replace")

    def ready(self) -> bool:
        if not self.url:
            found = re.search(r"listening address=\S*?:(\d+) ", self.text())
            self.url = f"http://127.0.0.1:{found[1]}" if found else ""
        try:
            return bool(self.url) and bool(self.get("/ready"))
        except (urllib.error.URLError, OSError):
            return False

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """A sample by its whole name, labels included; 0 where there is none."""
        head = f"moesaic_{name} "
        return next((float(line.removeprefix(head)) for line in self.get("/metrics").splitlines()
                     if line.startswith(head)), 0.0)  # fmt: skip

    def until_idle(self, seconds: float = 30.0) -> None:
        """Until nothing runs, waits or holds a block."""
        began = time.monotonic()
        while any(self.metric(name) for name in ("running_requests", "queue_requests", "kv_blocks_used")):
            if time.monotonic() - began > seconds:
                raise SystemExit("requests are left over")
            time.sleep(0.05)

    @property
    def processes(self) -> dict[str, psutil.Process]:
        server = psutil.Process(self.process.pid)
        return {"server": server, "engine": server.children()[0]}

    def resident(self) -> dict[str, int]:
        """Bytes of each process."""
        return {name: process.memory_info().rss for name, process in self.processes.items()}

    def descriptors(self) -> dict[str, int]:
        return {name: process.num_fds() for name, process in self.processes.items()}
