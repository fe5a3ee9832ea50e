"""What do accuracy and distance lose to a deliberately broken kernel? Proof that `moesaic eval` would notice.

    python benchmarks/sensitivity.py [--limit 8]

Each fault is put into the ops of a model as it is built, and nothing else changes: one expert's output dropped; gate
and up swapped; the routed scaling factor left out; the correction bias ignored; top-k weights not renormalised; rope
with the wrong pairs of elements. Two gauges: accuracy on the tasks, paired with the sound model's, and the KL
divergence from the sound model along its own answers, which also sees what never changes an answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks.machine import describe, save
from moesaic import LLM
from moesaic.assets import embedded_model
from moesaic.commands._schemes import How, compare
from moesaic.commands.eval import TASK_TOKENS, of_families
from moesaic.formats.base import QuantTensor
from moesaic.kernels.registry import BACKENDS
from moesaic.tasks import FAMILIES

KEPT = ("right", "count", "accuracy", "accuracy_interval", "families", "lost", "gained", "kl", "logprob", "same")

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


SOUND: dict[str | None, dict[str, Any]] = {
    None: {"dtype": "float32"},
    "none, by other kernels": {"dtype": "float32", "deterministic": True},
    "none, in bfloat16": {"dtype": "bfloat16"},
}
"""Options of models without a fault. The first is the measure; the others show what rounding alone amounts to."""
FAULTS: dict[str, tuple[str, Wrap]] = {
    "one expert of 16 dropped": ("experts", drop_one_expert),
    "gate and up swapped": ("experts", swap_gate_and_up),
    "scaling factor left out": ("route", with_router(scale=1.0)),
    "scaling factor twice": ("route", with_router(scale=6.25)),
    "weights not renormalised": ("route", with_router(renormalize=False)),
    "correction bias ignored": ("route", ignore_bias),
    "groups ignored": ("route", with_router(groups=1)),
    "rope pairs the wrong elements": ("rotate", other_pairing),
}


@contextmanager
def broken(op: str, wrap: Wrap) -> Iterator[None]:
    """Every backend's version of an op, wrapped: whichever a model takes while it is built."""
    modules = [import_module(f"moesaic.kernels.{name}") for name in BACKENDS]
    sound = {module: getattr(module, op) for module in modules if hasattr(module, op)}
    try:
        for module, function in sound.items():
            setattr(module, op, wrap(function))
        yield
    finally:
        for module, function in sound.items():
            setattr(module, op, function)


def open_model(fault: str | None) -> LLM:
    if fault in SOUND:
        return LLM(str(embedded_model()), progress=False, **SOUND[fault])
    with broken(*FAULTS[fault]):
        return open_model(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=8, help="items per family")
    limit = parser.parse_args().limit
    rows: list[dict[str, Any]] = []
    print("| fault | accuracy | families that lose | KL, nats per token | same token |\n|---|---|---|---|---|")
    names = [name for name in SOUND if name] + list(FAULTS)
    for row in compare(open_model, lambda llm: of_families(llm, FAMILIES, limit), names, How(TASK_TOKENS)):
        if "error" in row:
            raise SystemExit(f"{row['scheme']}: {row['error']}")
        first = rows[0] if rows else row
        lose = sum(right < first["families"][family] for family, right in row["families"].items())
        row = {"lost": 0, "gained": 0, "kl": 0.0, "logprob": 0.0, "same": 1.0, **row}
        rows.append({"fault": row["scheme"] if rows else "none", "lose": lose, **{name: row[name] for name in KEPT}})
        print(f"| {rows[-1]['fault']} | {row['accuracy']:.1%} | {lose} | {row['kl']:.2g} | "
              f"{row['same']:.2%} |", flush=True)  # fmt: skip
    facts = {"what": "sensitivity", "model": "tiny", "dtype": "float32", "items": limit * len(FAMILIES)}
    save("sensitivity", {**facts, **describe("torch"), "rows": rows})


if __name__ == "__main__":
    main()
