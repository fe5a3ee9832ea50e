"""What do accuracy and distance lose to a kernel that computes the wrong thing? Proof that `moesaic eval` would notice.

    python benchmarks/sensitivity.py [--limit 8]

Each fault is put into a loaded model, whichever kernels it has: the data that they are given are changed so that sound
kernels compute what broken ones would. One expert's output dropped; gate and up swapped; the routed scaling factor left
out; the correction bias ignored; top-k weights not renormalised; rope with the wrong pairs of elements. Two gauges:
accuracy on the tasks, paired with the sound model's, and the distance from the sound model along its own answers, which
also sees what never changes an answer.
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

from benchmarks.machine import describe, save
from moesaic import LLM
from moesaic.assets import embedded_model
from moesaic.commands._schemes import How, compare
from moesaic.commands.eval import TASK_TOKENS, of_families
from moesaic.layers.mla import MLA
from moesaic.models.decoder import Decoder
from moesaic.moe.layer import MoELayer
from moesaic.tasks import FAMILIES

SAME = {"lost": 0, "gained": 0, "kl": 0.0, "kl_error": 0.0, "logprob": 0.0, "logits": 0.0, "same": 1.0}
KEPT = ("right", "count", "accuracy", "accuracy_interval", "families", *SAME)
Fault = Callable[[Decoder], None]


def mixtures(model: Decoder) -> list[MoELayer]:
    return [block.mlp for block in model.blocks if isinstance(block.mlp, MoELayer)]


def drop_one_expert(model: Decoder) -> None:
    """Rows routed to expert 5 get nothing from it."""
    for layer in mixtures(model):
        layer.experts.weights.w2.plain[5] = 0


def swap_gate_and_up(model: Decoder) -> None:
    for layer in mixtures(model):
        w13 = layer.experts.weights.w13.plain
        w13.copy_(w13.roll(w13.shape[1] // 2, 1))


def with_router(**changes: Any) -> Fault:
    """The router with fields of its spec changed."""

    def fault(model: Decoder) -> None:
        for layer in mixtures(model):
            layer.route.spec = replace(layer.route.spec, **changes)

    return fault


def ignore_bias(model: Decoder) -> None:
    for layer in mixtures(model):
        layer.route.bias_E = None


def other_pairing(model: Decoder) -> None:
    """Neighbours and halves confused: in the attention layers, and in what their fused ops are given."""
    for block in model.blocks:
        layer: Any = block.attention
        assert isinstance(layer, MLA)
        rope = replace(layer.spec.rope, interleaved=not layer.spec.rope.interleaved)
        model.tables[rope] = model.tables[layer.spec.rope]
        layer.spec, layer.latent = replace(layer.spec, rope=rope), replace(layer.latent, interleaved=rope.interleaved)


SOUND: dict[str | None, dict[str, Any]] = {
    None: {"dtype": "float32"},
    "none, by other kernels": {"dtype": "float32", "deterministic": True},
    "none, in bfloat16": {"dtype": "bfloat16"},
}
"""Options of models without a fault. The first is the measure; the others show what rounding alone amounts to."""
FAULTS: dict[str, Fault] = {
    "one expert of 16 dropped": drop_one_expert,
    "gate and up swapped": swap_gate_and_up,
    "scaling factor left out": with_router(scale=1.0),
    "scaling factor twice": with_router(scale=6.25),
    "weights not renormalised": with_router(renormalize=False),
    "correction bias ignored": ignore_bias,
    "groups ignored": with_router(groups=1),
    "rope pairs the wrong elements": other_pairing,
}


def open_model(fault: str | None) -> LLM:
    llm = LLM(str(embedded_model()), progress=False, **SOUND.get(fault, SOUND[None]))
    if fault in FAULTS:
        FAULTS[fault](llm.launched.built.model)
    return llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=8, help="items per family")
    limit = parser.parse_args().limit
    rows: list[dict[str, Any]] = []
    print("| fault | accuracy | families that lose | KL, nats per token | same token |\n|---|---|---|---|---|")
    names = [name for name in SOUND if name] + list(FAULTS)
    for row in compare(open_model, lambda llm: of_families(llm, FAMILIES, limit), names, How(TASK_TOKENS)):
        if "error" in row or (row["scheme"] in FAULTS and not row["kl"]):
            raise SystemExit(f"{row['scheme']}: {row.get('error', 'the fault had no effect')}")
        first = rows[0] if rows else row
        lose = sum(right < first["families"][family] for family, right in row["families"].items())
        row = {**SAME, **row}
        rows.append({"fault": row["scheme"] if rows else "none", "lose": lose, **{name: row[name] for name in KEPT}})
        print(f"| {rows[-1]['fault']} | {row['accuracy']:.1%} | {lose} | {row['kl']:.2g} | "
              f"{row['same']:.2%} |", flush=True)  # fmt: skip
    facts = {"what": "sensitivity", "model": "tiny", "dtype": "float32", "items": limit * len(FAMILIES)}
    save("sensitivity", {**facts, **describe("torch"), "rows": rows})


if __name__ == "__main__":
    main()
