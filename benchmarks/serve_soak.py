"""Does a server grow? Memory and descriptors of both its processes over 20,000 short requests and 1,000 disconnects.

The first 2,000 requests warm it up: caches by shape, which are bounded, fill. What is judged is the growth from there
to the end, each time after six seconds at rest, when what was freed has gone back to the system. Prompts are all
different, of every length from 3 to 20 words, so no cache of prefixes or shapes is spared.
Disconnects: streams of which the client reads the beginning, and leaves; after the first 200 all must be as it was.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.machine import describe, save
from benchmarks.serving import Serving, engine_threads
from moesaic.commands._load import Load, run

FLAGS = ("--max-num-seqs", "64", "--kv-memory", "16MiB", "--max-queue", "512")
WARM, BATCH, LEAVE_FIRST = 2000, 2000, 200
BOUND = 0.02
REST = 6.0


def soak(requests: int) -> dict[str, Any]:
    """Bytes of both processes after every batch of requests, the first of which is the warm-up."""
    rows, errors = [], 0
    with Serving(*FLAGS) as server:
        start = server.resident()
        for seed, at in enumerate(range(0, WARM + requests, BATCH)):
            load = Load(server.url, "tiny", min(BATCH, WARM + requests - at), None, 64, (3, 20), (1, 4), seed)
            samples, seconds = asyncio.run(run(load))
            errors += sum(sample.error is not None for sample in samples)
            server.until_idle()
            time.sleep(REST)
            rows.append({"requests": at + load.requests, "seconds": round(seconds, 1), **server.resident()})
    return {"requests": requests, "warm_up": WARM, "errors": errors, "bound": BOUND, "start": start, "rows": rows,
            "growth": growth(rows[0], rows[-1])}  # fmt: skip


def growth(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Of each process, which is what the bound is for."""
    return {name: round(after[name] / before[name] - 1, 5) for name in ("server", "engine")}


def leave(server: Serving, count: int) -> None:
    """Streams begun and left, one after another."""
    body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 500, "ignore_eos": True, "stream": True})
    for _ in range(count):
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200 or not answer.read(1):
            raise SystemExit(f"a stream did not begin: {answer.status}")
        answer.close()
        connection.close()


def disconnects(count: int) -> dict[str, Any]:
    with Serving(*FLAGS) as server:
        leave(server, LEAVE_FIRST)
        server.until_idle()
        time.sleep(REST)
        before, held = server.resident(), server.descriptors()
        leave(server, count)
        server.until_idle()
        time.sleep(REST)
        after, holds = server.resident(), server.descriptors()
        aborted = int(server.metric('aborts_total{reason="disconnect"}'))
    return {"count": count, "warm_up": LEAVE_FIRST, "aborted": aborted, "descriptors_before": held,
            "descriptors_after": holds, "before": before, "after": after,
            "growth": growth(before, after)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--disconnects", type=int, default=1000)
    args = parser.parse_args()
    soaked, left = soak(args.requests), disconnects(args.disconnects)
    print(f"{'requests':>9} {'server MiB':>11} {'engine MiB':>11}")
    for row in soaked["rows"]:
        print(f"{row['requests']:>9} {row['server'] / 2**20:>11.1f} {row['engine'] / 2**20:>11.1f}")
    shown = ", ".join(f"{name} {value:.2%}" for name, value in soaked["growth"].items())
    print(f"growth after the first {WARM}: {shown} (bound: {BOUND:.0%} each), {soaked['errors']} errors")
    print(f"{left['count']} disconnects: {left['growth']}, descriptors {left['descriptors_before']} -> "
          f"{left['descriptors_after']}")  # fmt: skip
    result = {"what": "growth of a server's processes", "model": "tiny", "threads": engine_threads(),
              "flags": " ".join(FLAGS), **soaked, "disconnects": left,
              "source": describe("torch", "uvicorn", "uvloop")}  # fmt: skip
    save("serve-soak", result)


if __name__ == "__main__":
    main()
