"""How fast does the engine decode and read prompts on a GPU, with random weights of a real architecture?

    python benchmarks/throughput.py [--model qwen3-30b-a3b] [--scheme fp8] [--batch 1 4 16 32 64 256] [--context 1024]
                                    [--prompts 8x4096] [--first 16 64 256 512 1024 2048] [--kv bf16] [--no-profile]

The whole engine as it serves: scheduler, graphs, greedy sampling, the host's work, one step ahead of the device. Per
batch: the wall time of a decoding step, over a window of steps; what of it the device computed, from a profile of
further steps (the union of all kernels' intervals); the part of the time without a kernel, within the profile and
against the unprofiled wall time; and the floor: bytes of the weights and contexts that the step touches / read
bandwidth. The experts that a step touches are counted, not assumed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu, warm
from benchmarks.models import MODELS
from moesaic.config import EngineConfig
from moesaic.contracts.scheme import SCHEMES, Scheme
from moesaic.engine.engine import Engine
from moesaic.engine.graphs import DecodeGraphs, prompt_rows
from moesaic.engine.launch import launch
from moesaic.engine.params import SamplingParams
from moesaic.formats.checkpoint import excluded_names, write_config
from moesaic.layers.linear import Stored
from moesaic.models.build import spec_of
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.hold import as_stored, hold

WINDOW = 32
"""Steps that are timed together."""
PROFILED = 8
CHUNK = 8192
"""Prompt tokens per step."""
QUEUED = 5
"""Steps of prompts that wait when two are profiled: one runs before, and one is ahead."""
SHOWN = 24


def described(model: str, scheme: Scheme) -> dict[str, Any]:
    """The config.json of a checkpoint. Static scales of activations must be stored: only such schemes are."""
    config: dict[str, Any] = MODELS[model]
    if not scheme.activation.static:
        return config
    written = as_stored(hold(spec_of(config), scheme))
    return config | {"quantization_config": write_config(scheme, excluded_names(written))}


def make(args: argparse.Namespace, length: int) -> Engine:
    most, scheme = max(args.batch), SCHEMES[args.scheme]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(described(args.model, scheme)))
        config = EngineConfig(
            device="cuda", load_format="dummy", kv=args.kv, max_num_seqs=most, max_num_batched_tokens=CHUNK,
            max_model_len=length, prefix_cache=False, graphs=False, progress=False,
            quantization=None if scheme.activation.static or not scheme.quantized else scheme.name,
        )  # fmt: skip
        with Checkpoint.open(folder, weights=False) as checkpoint:
            engine = launch(checkpoint, config, None).engine
    runner = engine.runner
    if args.batch:
        model, pool = runner.model, runner.pool
        rows = prompt_rows(model.spec, model.kernels.plan, pool.block_size, length, CHUNK)
        each = sorted({*args.batch, *(length for length in args.first if length <= rows)})
        runner.graphs = DecodeGraphs(model, pool, runner.feed, most, length, each)
    return engine


def start(engine: Engine, name: str, batch: int, context: int, tokens: int) -> None:
    """Queues a batch of random prompts and runs them until all decode."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for i in range(batch):
        engine.add(f"{name}-{i}", torch.randint(0, engine.vocab, (context,)).tolist(), params)
    while any(state.request.num_output == 0 for state in engine.states.values()):
        engine.step()


def waits(batch: int, context: int) -> int:
    """Steps from a batch's first prompt to its last, in which the first ones decode already."""
    return -(-batch * context // CHUNK)


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def timed(engine: Engine, steps: int) -> float:
    """Milliseconds per step. One is ahead at either end."""
    torch.cuda.synchronize()
    engine.step()
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return (time.perf_counter() - began) / steps * 1e3


def profile(engine: Engine, steps: int) -> dict[str, Any]:
    """What the device did in a window of steps: busy_ms and kernels per step, share of the window without a kernel; and
    by kernel, those that took most first: launches, what each adds to the time that is covered, and how long the device
    waited before them, in microseconds, all per step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    engine.step()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end, event.name.split("<")[0][:60]) for event in events]
    spans = [span for span in spans if span[1] > span[0]]
    taken, waited = shares(spans)
    count, busy = Counter(name for _, _, name in spans), sum(taken.values())
    window = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
    top = sorted(taken, key=lambda name: -taken[name] - waited[name])[:SHOWN]
    each = {name: [round(n / steps, 1) for n in (count[name], taken[name], waited[name])] for name in top}
    return {"busy_ms": busy / steps / 1e3, "idle_in_profile": 1 - busy / window, "kernels": round(len(spans) / steps),
            "top": each}  # fmt: skip


def shares(spans: list[tuple[float, float, str]]) -> tuple[dict[str, float], dict[str, float]]:
    """(time that each adds to what the others before it cover, time before each that nothing covers), by name.

    Dependent launches overlap: the first sum is the length of all intervals together.
    """
    taken, waited = defaultdict[str, float](float), defaultdict[str, float](float)
    reached = min((begin for begin, _, _ in spans), default=0.0)
    for begin, end, name in sorted(spans):
        waited[name] += max(0.0, begin - reached)
        taken[name] += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return taken, waited


def touched(engine: Engine) -> list[float]:
    """The part of each mixture's experts that a step chooses."""
    meter = engine.runner.model.meter
    engine.step()
    torch.cuda.synchronize()
    for counts in meter.counts:
        counts.zero_()
    engine.step()
    torch.cuda.synchronize()
    return [(counts > 0).float().mean().item() for counts in meter.counts]


def floor_bytes(engine: Engine, batch: int, context: int, parts: list[float]) -> float:
    """Bytes that one decoding step must read."""
    model, total = engine.runner.model, 0.0
    places = {block.index: i for i, block in enumerate(b for b in model.spec.layers if hasattr(b.mlp, "router"))}
    for item in model.sources():
        weight = item.weight if isinstance(item, Stored) else item[1]
        name = item.name if isinstance(item, Stored) else item[0]
        if model.spec.embed in name and not model.spec.tied:
            continue
        layer = name.split("layers.")[-1].split(".")[0]
        total += weight.nbytes * (parts[places[int(layer)]] if ".experts." in name else 1.0)
    return total + sum(table.shape[1] * table.itemsize for table in engine.runner.pool.layers) * batch * context


def decode(engine: Engine, batch: int, context: int, with_profile: bool) -> dict[str, Any]:
    try:
        start(engine, f"d{batch}", batch, context, 2 * WINDOW + PROFILED + 24 + waits(batch, context))
        timed(engine, 4)
        first, second = timed(engine, WINDOW), timed(engine, WINDOW)
        found = profile(engine, PROFILED) if with_profile else {}
        parts = touched(engine)
    finally:
        drain(engine)
    wall = min(first, second)
    floor = floor_bytes(engine, batch, context, parts) / gpu.limits().read * 1e3
    row = {"batch": batch, "context": context, "step_ms": wall, "other_window_ms": max(first, second),
           "floor_ms": floor, "step_over_floor": wall / floor, "tokens_per_s": batch / wall * 1e3,
           "experts_touched": sum(parts) / max(1, len(parts)), **found}  # fmt: skip
    row |= {"idle": max(0.0, 1 - found["busy_ms"] / wall)} if found else {}
    show(row)
    return row


def prompts(engine: Engine, count: int, length: int, with_profile: bool) -> dict[str, Any]:
    """All at once, until each has its first token; the second round is timed."""
    for name in ("warm", "timed"):
        torch.cuda.synchronize()
        began = time.perf_counter()
        start(engine, name, count, length, 2)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        drain(engine)
    work = 2 * active(engine) * count * length
    row = {"prompts": count, "length": length, "seconds": seconds, "tokens_per_s": count * length / seconds,
           "tflops": work / seconds / 1e12, "of_fp8_peak": work / seconds / gpu.limits().fp8}  # fmt: skip
    if with_profile:
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        for i in range(QUEUED * CHUNK // length):
            engine.add(f"p{i}", torch.randint(0, engine.vocab, (length,)).tolist(), params)
        row |= {"profile": profile(engine, 2)}
        drain(engine)
    return row


def first(engine: Engine, length: int) -> dict[str, Any]:
    """Milliseconds until a prompt that comes alone has its first token, the median of seven; whether it is short enough
    for a captured graph."""
    each, graphs = [], engine.runner.graphs
    for i in range(9):
        torch.cuda.synchronize()
        began = time.perf_counter()
        try:
            start(engine, f"f{length}-{i}", 1, length, 2)
            each.append((time.perf_counter() - began) * 1e3)
        finally:
            drain(engine)
    captured = isinstance(graphs, DecodeGraphs) and graphs.short and length <= max(graphs.captured)
    return {"length": length, "ms": statistics.median(each[2:]), "captured": captured}


def active(engine: Engine) -> float:
    """Parameters that a token is multiplied with; embedding and head left out, since prompts do not meet them."""
    total, spec = 0.0, engine.runner.model.spec
    router = next(block.mlp.router for block in spec.layers if hasattr(block.mlp, "router"))
    for item in engine.runner.model.sources():
        if isinstance(item, Stored):
            rows, columns = item.weight.shape[-2:]
            total += rows * columns * (router.top_k / router.experts if ".experts." in item.name else 1.0)
    return total


def show(row: dict[str, Any]) -> None:
    busy = f"{row['busy_ms']:.3f} | {row['idle']:.1%} | {row['idle_in_profile']:.1%} | {row['kernels']}" if (
        "busy_ms" in row) else "- | - | - | -"  # fmt: skip
    print(f"| {row['batch']} | {row['step_ms']:.3f} | {row['floor_ms']:.3f} | {row['step_over_floor']:.2f} | "
          f"{row['tokens_per_s']:.0f} | {row['experts_touched']:.0%} | {busy} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=sorted(MODELS))
    parser.add_argument("--scheme", default="fp8", choices=sorted(SCHEMES))
    parser.add_argument("--kv", default="bf16", choices=("bf16", "fp8"))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 32, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompts", default="8x4096", help="COUNTxLENGTH, or 0 for none")
    parser.add_argument("--first", nargs="*", type=int, default=[16, 64, 256, 512, 1024, 2048],
                        help="lengths of lone prompts")  # fmt: skip
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    args = parser.parse_args()
    count, _, long = args.prompts.partition("x")
    length = max(args.context + 2 * WINDOW + PROFILED + 40 + waits(max(args.batch), args.context), int(long or 0) + 16)
    chunk = (max(1, CHUNK // int(long)), int(long)) if long else (max(1, CHUNK // args.context), args.context)
    alone = [(rows, 1) for rows in sorted({*args.batch, *args.first})]
    seconds = warm.compile_all(args.model, args.scheme, args.kv, [*alone, chunk])
    print(f"kernels compiled in {seconds:.0f} s", flush=True)
    began = time.perf_counter()
    engine = make(args, length)
    print(f"ready after {time.perf_counter() - began:.0f} s", flush=True)
    facts = {"what": "throughput", "model": args.model, "scheme": args.scheme, "kv": args.kv}
    report = gpu.Report(f"throughput-{args.model}-{args.scheme}{'-kv8' if args.kv == 'fp8' else ''}", facts)
    print("| batch | step ms | floor ms | step / floor | tokens/s | experts | busy ms | idle | idle in profile | "
          "kernels |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    rows = [report.measure("rows", {"batch": batch}, partial(decode, engine, batch, args.context, args.profile))
            for batch in args.batch]  # fmt: skip
    for length in args.first:
        if row := report.measure("first", {"length": length}, partial(first, engine, length)):
            print(f"a prompt of {length} tokens alone: first token after {row['ms']:.1f} ms", flush=True)
    if long and (row := report.measure("prompts", {}, partial(prompts, engine, int(count), int(long), args.profile))):
        print("prompts:", {name: value for name, value in row.items() if name != "profile"}, flush=True)
        list_kernels("prompts", row.get("profile"))
    for row in filter(None, rows):
        list_kernels(f"batch {row['batch']}", row)
    report.end()


def list_kernels(title: str, found: dict[str, Any] | None) -> None:
    print(f"\n| {title}: kernel | launches | us | us waited before |\n|---|---|---|---|" if found else "")
    for name, numbers in (found or {}).get("top", {}).items():
        print(f"| {name} | {' | '.join(map(str, numbers))} |")


if __name__ == "__main__":
    main()
