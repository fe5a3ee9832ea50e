"""What serving costs per token beside the model: HTTP, scheduling and detokenising, in microseconds of one core.

At 256 concurrent streams of the embedded model, three measurements:
    server   processor time of the server's process over a load, divided by the tokens that it sent
    engine   in this process: the time of a step outside the forward pass and the sampler (schedule, commit with its
             detokenising, packing the message), divided by the step's tokens
    profile  the server once more under Python's profiler, whose own cost is spread over everything: what share of the
             time each part has
The bound of the project is 150 us for server and engine together.
"""

from __future__ import annotations

import argparse
import asyncio
import pstats
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.machine import describe, save
from benchmarks.serving import Serving, engine_threads
from moesaic import LLM, SamplingParams
from moesaic.commands._load import Load, run, summary
from moesaic.serving.frames import packer
from moesaic.serving.wire import piece_to_wire

BOUND_US = 150.0
PROFILED = """
import cProfile, sys, time
from moesaic.cli import main
profile = cProfile.Profile(time.process_time)
code = profile.runcall(main, sys.argv[2:])
profile.dump_stats(sys.argv[1])
sys.exit(code)
"""
"""`moesaic` under the profiler, by processor time: waiting costs nothing."""
PARTS = (
    ("writing events (completions, json)", ("serving/completions.py", "json/", "_json", "serving/running.py")),
    ("jobs and metrics (session, prometheus)", ("serving/session.py", "serving/wire.py", "prometheus", "perf_counter")),
    ("messages from the engine (msgpack)", ("serving/frames.py", "msgpack")),
    ("HTTP (uvicorn, httptools, gate)", ("uvicorn", "httptools", "starlette", "serving/gate.py", "serving/guard.py")),
    ("requests (pydantic, tokenizer, routes)", ("pydantic", "serving/", "text/", "tokenizers", "engine/params.py")),
)
"""Part -> what the names of its functions contain, the first that fits; the rest is the event loop and the system."""


def load_of(url: str, streams: int, tokens: int) -> Load:
    return Load(url, "tiny", streams, None, streams, (5, 20), (tokens, tokens), 0, extra={"ignore_eos": True})


def flags(streams: int) -> tuple[str, ...]:
    return "--max-num-seqs", str(streams), "--max-queue", str(streams)


def server_cost(streams: int, tokens: int) -> dict[str, Any]:
    """Microseconds of the server's process per token, and the load's own report."""
    with Serving(*flags(streams)) as server:
        load = load_of(server.url, streams, tokens)
        asyncio.run(run(load))  # once for nobody: what is made on first use
        watched = server.processes["server"]
        before = watched.cpu_times()
        samples, seconds = asyncio.run(run(load))
        after = watched.cpu_times()
    found = summary(samples, seconds)
    used = after.user + after.system - before.user - before.system
    return {"server_us": 1e6 * used / found["tokens"],
            "server_system_us": 1e6 * (after.system - before.system) / found["tokens"],
            **{name: found[name] for name in ("tokens", "tokens_per_s", "errors")}}  # fmt: skip


def engine_cost(streams: int, tokens: int) -> dict[str, float]:
    """Microseconds per token of a decode step, outside the runner, by part."""
    llm = LLM(max_num_seqs=streams, progress=False)
    engine, pack = llm.engine, packer()
    for i in range(streams):
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        engine.add(f"{i}.0", llm.encode(f"What is {i} + {7 * i}?"), params)
    spent, count = dict.fromkeys(("schedule", "commit and detokenise", "pack"), 0.0), 0
    while engine.has_work:
        at = [time.process_time()]
        step = engine.scheduler.schedule()
        at.append(time.process_time())
        assert step is not None
        result = engine.runner.run(step)
        at.append(time.process_time())
        deltas = engine.commit(step, result)
        at.append(time.process_time())
        pack(["pieces", [piece_to_wire(delta) for delta in deltas]])
        at.append(time.process_time())
        if step.decode:
            for name, begin in zip(spent, (0, 2, 3), strict=True):
                spent[name] += at[begin + 1] - at[begin]
            count += len(deltas)
    return {name: 1e6 * seconds / count for name, seconds in spent.items()}


def profile(streams: int, tokens: int) -> dict[str, float]:
    """Part of the server -> its share of the processor's time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile"
        with Serving(*flags(streams), program=("-c", PROFILED, str(file))) as server:
            for _ in range(3):  # so that starting up weighs little
                asyncio.run(run(load_of(server.url, streams, tokens)))
        stats: dict[tuple[str, int, str], Any] = pstats.Stats(str(file)).stats  # type: ignore[attr-defined]
    shares: dict[str, float] = {}
    for (path, _, name), (_, _, own, *_) in stats.items():
        where = f"{path} {name}"
        if "importlib" in where or "_imp" in where or "loads" in where or "io.open_code" in where:
            continue  # starting up
        part = next((part for part, marks in PARTS if any(mark in where for mark in marks)), "event loop and system")
        shares[part] = shares.get(part, 0.0) + own
    whole = sum(shares.values())
    return {part: round(own / whole, 3) for part, own in sorted(shares.items(), key=lambda each: -each[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    found = server_cost(args.streams, args.tokens)
    engine = engine_cost(args.streams, args.tokens)
    shares = profile(args.streams, args.tokens)
    total = found["server_us"] + sum(engine.values())
    print(f"{'part':<45} us per token")
    for part, share in shares.items():
        print(f"{'server: ' + part:<45} {share * found['server_us']:.1f}   ({share:.0%} of the server, by the profile)")
    for part, cost in engine.items():
        print(f"{'engine: ' + part:<45} {cost:.1f}")
    print(f"{'both':<45} {total:.1f}   (bound {BOUND_US:.0f})")
    result = {"what": "serving cost per token beside the model", "model": "tiny", "threads": engine_threads(),
              "streams": args.streams, "bound_us": BOUND_US, "total_us": round(total, 2),
              **{name: round(value, 2) for name, value in found.items()},
              "engine_us": {name: round(value, 2) for name, value in engine.items()}, "server_shares": shares,
              "source": describe("torch", "uvicorn", "httptools", "uvloop")}  # fmt: skip
    save("serve-overhead", result)


if __name__ == "__main__":
    main()
