"""What does a KV cache in FP8 cost, and does it matter how it is scaled?

    python benchmarks/kv_format.py [--limit 8]

`tiny` along the answers of the model as it is stored, computed in float32 so that nothing else is rounded. `fp8` is
the cache as it is built (formats/kv.py); the other rows round what is written to the cache as they say, and keep it in
FP32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from torch import Tensor

from benchmarks.machine import describe, save
from moesaic import LLM
from moesaic.assets import embedded_model
from moesaic.commands._schemes import How, compare
from moesaic.commands.eval import TASK_TOKENS, of_families
from moesaic.contracts.spec import KVParts
from moesaic.formats import e4m3
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.mla import MLA
from moesaic.tasks import FAMILIES

Rounding = Callable[[Tensor, KVParts], Tensor]


def scaled(scale_of: Callable[[Tensor], Tensor], key: bool = False) -> Rounding:
    """The latent, and the rotary key too or not, in E4M3 with a scale of its own."""

    def rounded(rows_TW: Tensor, parts: KVParts) -> Tensor:
        *coded, plain = rows_TW.split([*parts.coded, parts.plain], -1)
        each = [coded_again(part, scale_of) for part in coded]
        return torch.cat([*each, coded_again(plain, scale_of) if key else plain], -1)

    return rounded


def coded_again(part: Tensor, scale_of: Callable[[Tensor], Tensor]) -> Tensor:
    scale = scale_of(part)
    return e4m3.cast(part / scale).float() * scale


def amax(part: Tensor) -> Tensor:
    return part.abs().amax(-1, keepdim=True).clamp(min=1e-30) / e4m3.MAX


def power(part: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(amax(part))))


def one(part: Tensor) -> Tensor:
    return torch.ones(())


WAYS: dict[str, tuple[str, Rounding]] = {
    "amax": ("latent: amax / 448 in FP32; rotary key as it is", scaled(amax)),
    "static": ("latent: no scale, saturating; rotary key as it is", scaled(one)),
    "key": ("latent and rotary key: a power of two each", scaled(power, key=True)),
    "key amax": ("latent and rotary key: amax / 448 each", scaled(amax, key=True)),
    "key static": ("latent and rotary key: no scale, saturating", scaled(one, key=True)),
}
BUILT = "latent: a power of two; rotary key in BF16 (as built)"


def open_model(name: str | None) -> LLM:
    if name == "fp8":
        return LLM(str(embedded_model()), device="cpu", dtype="float32", kv="fp8", progress=False)
    llm = LLM(str(embedded_model()), device="cpu", dtype="float32", progress=False)
    if name is not None:
        for block in llm.launched.built.model.blocks:
            if isinstance(block.attention, MLA):
                block.attention.fused = False  # rows then go through the pool's own write
    return llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=8, help="items per family")
    args = parser.parse_args()
    real, began, rows = KVPool.write, time.perf_counter(), []

    def opened(name: str | None) -> LLM:
        llm = open_model(name)
        way = WAYS.get(name or "")

        def write(self: KVPool, layer: int, slots_T: Tensor, rows_TW: Tensor, parts: KVParts) -> Tensor:
            return real(self, layer, slots_T, way[1](rows_TW, parts) if way else rows_TW, parts)

        KVPool.write = write  # type: ignore[method-assign]
        return llm

    how = How(TASK_TOKENS)
    for row in compare(opened, lambda llm: of_families(llm, FAMILIES, args.limit), ["fp8", *WAYS], how):
        if "kl" in row:
            row |= {"way": WAYS[row["scheme"]][0] if row["scheme"] in WAYS else BUILT}
            print(f"{row['way']}: KL {row['kl']:.2e} ± {row['kl_error']:.0e}, logits {row['logits']:.2%}, "
                  f"{row['right']} of {row['count']} right, {row['lost']} lost", flush=True)  # fmt: skip
        rows.append(row)
    llms = {name: open_model(name).engine.runner.pool for name in (None, "fp8")}
    width = {name or "bf16": pool.layers[0].shape[1] for name, pool in llms.items()}
    facts = {"what": "kv format", "model": "tiny", "limit": args.limit, **describe("torch"), "rows": rows,
             "bytes_per_token_and_layer": {"bf16": 2 * width["bf16"], "fp8": width["fp8"]}, "items": args.limit * 18,
             "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
    save("kv-format", json.loads(json.dumps(facts)))


if __name__ == "__main__":
    main()
