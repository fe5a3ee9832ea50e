"""How many tokens per second does a CPU generate with `tiny`, and against what?

    python benchmarks/cpu_generate.py [--model DIR] [--tokens 64] [--repeats 3]

The same prompts, the same number of new tokens (end tokens ignored), greedy, batch 1 / 16 / 64. Peers: `transformers`
on the same files with its experts implementations {eager, grouped_mm} in {FP32, BF16}, left-padded, its own cache.
Peers and we take turns in one process; each figure is the median of the repeats of the whole generation, prefill
included. Ends with where our own decoding time goes: native kernels, torch operators, Python.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks.machine import describe, save
from moesaic import LLM, SamplingParams
from moesaic.assets import embedded_model
from moesaic.kernels import cpu_native
from moesaic.kernels._native import spent
from moesaic.tasks import FAMILIES, items

BATCHES = (1, 16, 64)
PEERS = [(experts, dtype) for experts in ("eager", "grouped_mm") for dtype in ("float32", "bfloat16")]


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Held-out questions of all families in turn: ragged, as users' are."""
    each = -(-count // len(FAMILIES))
    asked = [item for group in zip(*(items(name, "test", each) for name in FAMILIES), strict=True) for item in group]
    return [llm.chat_tokens([{"role": "user", "content": item.prompt}]) for item in asked[:count]]


def ours(llm: LLM, asked: list[list[int]], tokens: int) -> int:
    """Generates from a cold prefix cache; returns how many tokens came."""
    llm.engine.scheduler.blocks.reset()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return sum(len(result.tokens) for result in llm.generate(asked, params))


def peer(path: str, experts: str, dtype: str) -> Callable[[list[list[int]], int], int]:
    """A function that generates with `transformers`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), experts_implementation=experts)
    model.eval()

    def run(asked: list[list[int]], tokens: int) -> int:
        longest = max(map(len, asked))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        return (out.shape[1] - longest) * len(asked)

    return run


def median_rates(
    runs: dict[str, Callable[[list[list[int]], int], int]], asked: list[list[int]], tokens: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Tokens per second of every contender: they take turns, so that a drifting machine treats them alike."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            count = run(asked, tokens if repeat else min(tokens, 4))
            if repeat:
                rates[name].append(count / (time.perf_counter() - began))
    return {name: {"median": statistics.median(r), "min": min(r), "max": max(r)} for name, r in rates.items()}


def causes(llm: LLM, asked: list[list[int]], tokens: int) -> dict[str, float]:
    """Shares of a decoding step, by median: each native kernel, torch's operators, and the rest, which is Python.

    Native kernels are timed by themselves. The profiler that times torch's operators slows what it measures, so it
    gives only those; a run without it gives the rest.
    """
    steps: list[float] = []
    shares: dict[str, list[float]] = {}
    for _ in decode(llm, asked, tokens):
        before, began = native(), time.perf_counter()
        llm.engine.step()
        steps.append(time.perf_counter() - began)
        for name, seconds in native().items():
            shares.setdefault(name, []).append((seconds - before[name]) / steps[-1])
    again = decode(llm, asked, tokens)
    next(again)  # the prompts are read before the profile begins
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        llm.engine.step()
        for _ in again:
            llm.engine.step()
    median = {name: statistics.median(each) for name, each in shares.items()}
    median["torch operators"] = operator_seconds(profile) / len(steps) / statistics.median(steps)
    return {name: share for name, share in median.items() if share > 0} | {"python": max(0.0, 1 - sum(median.values()))}


def decode(llm: LLM, asked: list[list[int]], tokens: int) -> Iterator[None]:
    """Starts the prompts from a cold prefix cache; then yields before each step of decoding."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    llm.engine.scheduler.blocks.reset()
    for i, prompt in enumerate(asked):
        llm.engine.add(f"decode-{i}", prompt, params)
    while any(state.request.num_output == 0 for state in llm.engine.states.values()):
        llm.engine.step()
    while llm.engine.has_work:
        yield


def native() -> dict[str, float]:
    """Seconds spent so far in each native kernel; nothing where there are none."""
    return {} if cpu_native.probe() else spent()


def operator_seconds(profile: Any) -> float:
    """Wall time of the calling thread's outermost operators: of each kind, its median times how many there were."""
    kinds: dict[str, list[float]] = {}
    for event in profile.events():
        if event.cpu_parent is None and event.name.startswith("aten::"):
            kinds.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e6)
    return sum(statistics.median(each) * len(each) for each in kinds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    llm = LLM(args.model, progress=False, max_num_seqs=max(BATCHES))
    dtype = str(llm.launched.built.dtype).removeprefix("torch.")
    runs = {f"transformers {e} {d}": peer(args.model, e, d) for e, d in PEERS}
    runs[f"moesaic {dtype}"] = lambda asked, tokens: ours(llm, asked, tokens)
    rows = []
    print("| batch | moesaic tokens/s | fastest transformers | tokens/s | ratio | Python |")
    print("|---|---|---|---|---|---|")
    for batch in BATCHES:
        asked = prompts(llm, batch)
        rates = median_rates(runs, asked, args.tokens, args.repeats)
        mine = rates.pop(f"moesaic {dtype}")
        best = max(rates, key=lambda name: rates[name]["median"])
        shares = causes(llm, asked, args.tokens)
        row = {
            "batch": batch, "moesaic": mine, "peers": rates, "best_peer": best,
            "ratio": mine["median"] / rates[best]["median"], "overhead": shares["python"], "causes": shares,
        }  # fmt: skip
        rows.append(row)
        print(f"| {batch} | {mine['median']:.0f} | {best} | {rates[best]['median']:.0f} | {row['ratio']:.2f} | "
              f"{row['overhead']:.0%} |", flush=True)  # fmt: skip
    facts = describe("torch", "transformers")
    setting = {"model": Path(args.model).name, "dtype": dtype, "tokens": args.tokens, "repeats": args.repeats}
    save("cpu-generate", {"what": "cpu_generate", **setting, "threads": torch.get_num_threads(), **facts, "rows": rows})


if __name__ == "__main__":
    main()
