"""What serving costs per token beside the model: HTTP, scheduling and detokenising, in microseconds of one core.

Two processes, two measurements, at 256 concurrent streams of the embedded model:
    server   processor time of the server's process over a load, divided by the tokens that it sent
    engine   in this process: the time of a step outside the forward pass and the sampler (schedule, commit with its
             detokenising, packing the message), divided by the step's tokens
The bound of the project is 150 us for both together.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import psutil

from benchmarks.machine import describe, save
from moesaic import LLM, SamplingParams
from moesaic.commands._load import Load, run, summary
from moesaic.serving.frames import packer
from moesaic.serving.wire import piece_to_wire

BOUND_US = 150.0


def server_cost(streams: int, tokens: int) -> dict[str, float]:
    """Microseconds of the server's process per token, and the load's own report."""
    port = 8765
    argv = [sys.executable, "-m", "moesaic", "serve", "--port", str(port), "--max-num-seqs", str(streams),
            "--max-queue", str(streams)]  # fmt: skip
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        wait_ready(port, process)
        load = Load(f"http://127.0.0.1:{port}", "tiny", streams, None, streams, (5, 20), (tokens, tokens), 0)
        asyncio.run(run(load))  # once for nobody: what is made on first use
        watched = psutil.Process(process.pid)
        before = watched.cpu_times()
        samples, seconds = asyncio.run(run(load))
        after = watched.cpu_times()
    finally:
        process.terminate()
        process.wait(30)
    found = summary(samples, seconds)
    used = after.user + after.system - before.user - before.system
    return {"server_us": 1e6 * used / found["tokens"], "tokens_per_s": found["tokens_per_s"],
            "errors": found["errors"], "tokens": found["tokens"]}  # fmt: skip


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit("the server did not start")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit("the server is not ready")


def engine_cost(streams: int, tokens: int) -> float:
    """Microseconds per token of a decode step, outside the runner."""
    llm = LLM(max_num_seqs=streams, progress=False)
    engine, pack = llm.engine, packer()
    for i in range(streams):
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        engine.add(f"{i}.0", llm.encode(f"What is {i} + {7 * i}?"), params)
    outside = count = 0.0
    while engine.has_work:
        t0 = time.process_time()
        step = engine.scheduler.schedule()
        t1 = time.process_time()
        assert step is not None
        result = engine.runner.run(step)
        t2 = time.process_time()
        deltas = engine.commit(step, result)
        pack(["pieces", [piece_to_wire(delta) for delta in deltas]])
        t3 = time.process_time()
        if step.decode:
            outside += (t1 - t0) + (t3 - t2)
            count += len(deltas)
    return 1e6 * outside / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    found = server_cost(args.streams, args.tokens)
    engine = engine_cost(args.streams, args.tokens)
    total = found["server_us"] + engine
    print(f"{'part':<10} us per token")
    print(f"{'server':<10} {found['server_us']:.1f}")
    print(f"{'engine':<10} {engine:.1f}")
    print(f"{'both':<10} {total:.1f}   (bound {BOUND_US:.0f})")
    result = {"what": "serving cost per token beside the model", "streams": args.streams, "bound_us": BOUND_US,
              "engine_us": round(engine, 2), "total_us": round(total, 2), **{k: round(v, 2) for k, v in found.items()},
              "source": describe("torch", "uvicorn", "httptools", "uvloop")}  # fmt: skip
    save("serve_overhead", result)


if __name__ == "__main__":
    main()
