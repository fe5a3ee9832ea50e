"""What accuracy does a deliberately broken kernel lose? Proof that `moesaic eval` would notice.

    python benchmarks/sensitivity.py [--limit 20]

Each fault is put into the running model's ops, and nothing else changes: one expert's output dropped; gate and up
swapped; the routed scaling factor left out; the correction bias ignored; top-k weights not renormalised; rope with the
wrong pairs of elements.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks.machine import describe, save
from moesaic import LLM, SamplingParams
from moesaic.assets import embedded_model
from moesaic.formats.base import QuantTensor
from moesaic.tasks import FAMILIES, grade, items
from moesaic.tasks.score import Score

Wrap = Callable[[Any], Any]


def drop_one_expert(experts: Any) -> Any:
    """Rows routed to expert 5 get nothing from it."""

    def broken(x: Any, w: Any, ids: Any, weights: Any) -> Any:
        return experts(x, w, ids, weights.masked_fill(ids == 5, 0.0))

    return broken


def swap_gate_and_up(experts: Any) -> Any:
    def broken(x: Any, w: Any, ids: Any, weights: Any) -> Any:
        gate, up = w.w13.plain.chunk(2, 1)
        w13 = QuantTensor.of(torch.cat([up, gate], 1), w.w13.form, w.w13.segments)
        return experts(x, replace(w, w13=w13), ids, weights)

    return broken


def with_router(**changes: Any) -> Wrap:
    """The router with fields of its spec changed."""
    return lambda route: lambda logits, bias, spec: route(logits, bias, replace(spec, **changes))


def ignore_bias(route: Any) -> Any:
    return lambda logits, bias, spec: route(logits, None, spec)


def other_pairing(rotate: Any) -> Any:
    return lambda x, cos, sin, interleaved: rotate(x, cos, sin, not interleaved)


FAULTS: dict[str, tuple[str, Wrap] | None] = {
    "none": None,
    "one expert of 16 dropped": ("experts", drop_one_expert),
    "gate and up swapped": ("experts", swap_gate_and_up),
    "scaling factor left out": ("route", with_router(scale=1.0)),
    "scaling factor twice": ("route", with_router(scale=6.25)),
    "weights not renormalised": ("route", with_router(renormalize=False)),
    "correction bias ignored": ("route", ignore_bias),
    "groups ignored": ("route", with_router(groups=1)),
    "rope pairs the wrong elements": ("rotate", other_pairing),
}


def accuracy(llm: LLM, limit: int) -> tuple[Score, dict[str, float]]:
    asked = [item for name in FAMILIES for item in items(name, "test", limit)]
    prompts = [llm.chat_tokens([{"role": "user", "content": item.prompt}]) for item in asked]
    llm.engine.scheduler.blocks.reset()
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=320))
    right = [grade(item, result.text) for item, result in zip(asked, results, strict=True)]
    each = {name: sum(ok for a, ok in zip(asked, right, strict=True) if a.family == name) / limit for name in FAMILIES}
    return Score("all", sum(right), len(right)), each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=20, help="items per family")
    limit = parser.parse_args().limit
    llm = LLM(str(embedded_model()), progress=False)
    ops: Any = llm.launched.built.kernels.ops
    rows = []
    print("| fault | accuracy | 95% interval | families that lose |\n|---|---|---|---|")
    for name, fault in FAULTS.items():
        if fault is not None:
            op, wrap = fault
            sound = getattr(ops, op)
            setattr(ops, op, wrap(sound))
        score, each = accuracy(llm, limit)
        if fault is not None:
            setattr(ops, op, sound)
        lose = sum(value < rows[0]["families"][family] for family, value in each.items()) if rows else 0
        low, high = score.interval
        rows.append({"fault": name, "accuracy": score.accuracy, "low": low, "high": high, "families": each})
        print(f"| {name} | {score.accuracy:.1%} | {low:.1%} to {high:.1%} | {lose} of {len(each)} |", flush=True)
    save("sensitivity", {"what": "sensitivity", "model": "tiny", "items": limit * len(FAMILIES), **describe("torch"),
                         "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
