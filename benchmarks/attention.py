"""How long does attention over the paged pool take on a GPU, decoding and for prompts, in BF16 and FP8 caches?

    python benchmarks/attention.py [--backends triton hopper flashinfer] [--caches bf16 fp8] [--sweep]

Blocks of 16 positions lie anywhere in the pool. floor of decoding = bytes of the contexts read once / read bandwidth;
of prompts = products / BF16 peak. Prompts of latent attention take the plain path: keys and values are given.
--backends: what reads the pool (FlashInfer's plans are made before, and not timed).
--sweep: other tiles too, for whoever tunes them; nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu
from moesaic.kernels import triton
from moesaic.kernels.ops import AttentionBatch, KVView, Span
from moesaic.kernels.registry import backends

VIEWS = {
    "GQA 32/4 x 128": (KVView(4, 128, 512, 128), 32),
    "MLA absorbed 128 x 576": (KVView(1, 576, 0, 512), 128),
    "MLA absorbed 16 x 576": (KVView(1, 576, 0, 512), 16),
}
BACKENDS = {"triton": ("bf16", "fp8"), "hopper": ("bf16", "fp8"), "flashinfer": ("bf16",)}
"""With the caches that they read."""
DECODES = ((1, 1024), (1, 16384), (16, 2048), (64, 1024), (64, 4096), (256, 1024))
PROMPTS = ((1, 2048), (1, 8192), (2, 4096), (4, 1024))
BLOCK = 16
DECODE_SWEEP = [{"num_stages": s, "num_warps": w} for s in (3, 5, 7) for w in (4, 8)]
PREFILL_SWEEP = [{"BM": m, "BL": n, "num_stages": s} for m in (64, 128) for n in (64, 128) for s in (2, 5)]


def batch_of(sequences: int, length: int, count: int) -> AttentionBatch:
    spans = tuple(Span(s * count, count, length) for s in range(sequences))
    blocks = -(-length // BLOCK)
    table = torch.randperm(sequences * blocks, device="cuda").view(sequences, blocks).int()
    spans_S3 = torch.tensor([(s.start, s.count, s.length) for s in spans], device="cuda")
    return AttentionBatch(spans, sequences if count == 1 else 0, table, BLOCK, spans_S3)


def pools(view: KVView, slots: int, fp8: bool) -> list[torch.Tensor]:
    """As many as together exceed the cache."""
    if fp8:
        one = torch.randint(0x20, 0x40, (slots, view.parts.fp8_bytes), device="cuda", dtype=torch.uint8)
        one[:, view.parts.exponents_at :] = 120
    else:
        one = torch.randn(slots, view.parts.width, device="cuda").bfloat16()
    return [one.clone() for _ in range(min(32, -(-gpu.CACHE // one.nbytes)))]


def measure(name: str, sequences: int, length: int, decode: bool, fp8: bool = False,
            backend: str = "triton") -> dict[str, Any]:  # fmt: skip
    (view, heads), attend = VIEWS[name], backends()[backend].attend_paged
    count = 1 if decode else length
    batch = batch_of(sequences, length, count)
    each = pools(view, sequences * -(-length // BLOCK) * BLOCK, fp8)
    q = torch.randn(sequences * count, heads, view.key_dim, device="cuda").bfloat16()
    calls: list[Callable[[], object]] = [
        partial(attend, q, pool, batch, view, 0.1) for pool in (each if decode else each[:1])
    ]
    work = sequences * count * length * heads * (view.key_dim + view.value_dim) * (2 if decode else 1)
    limits, nbytes = gpu.limits(), sequences * length * each[0].shape[1] * each[0].itemsize
    floor = max(nbytes / limits.read, work / limits.bf16) * 1e3
    phase, milliseconds = "decode" if decode else "prompt", gpu.time_calls(calls)
    return row(name, phase, sequences, length, milliseconds, floor, fp8, backend)


def measure_plain(length: int) -> dict[str, Any]:
    """A prompt of latent attention: 16 heads, keys of 192, values of 128."""
    q, k = (torch.randn(length, 16, 192, device="cuda").bfloat16() for _ in range(2))
    v = torch.randn(length, 16, 128, device="cuda").bfloat16()
    floor = length**2 * 16 * (192 + 128) / gpu.limits().bf16 * 1e3
    milliseconds = gpu.time_calls([lambda: triton.attend_dense(q, k, v, 0.1)])
    return row("MLA plain 16 x 192/128", "prompt", 1, length, milliseconds, floor, False)


def row(name: str, phase: str, sequences: int, length: int, milliseconds: float, floor: float,
        fp8: bool, backend: str = "triton") -> dict[str, Any]:  # fmt: skip
    return {"what": name, "backend": backend, "phase": phase, "cache": "fp8" if fp8 else "bf16",
            "sequences": sequences, "length": length, "ms": milliseconds, "floor_ms": floor,
            "share": floor / milliseconds}  # fmt: skip


def show(found: dict[str, Any], more: str = "") -> None:
    said = " | ".join(str(found[name]) for name in ("what", "backend", "phase", "cache", "sequences", "length"))
    print(f"| {said} | {found['ms']:.4f} | {found['floor_ms']:.4f} | {found['share']:.2f} | {more}", flush=True)


def sweep() -> None:
    from moesaic.kernels._triton import attend_paged as code

    usual = code.decode_tile, code.prefill_tile
    for name in ("GQA 32/4 x 128", "MLA absorbed 16 x 576"):
        for change in DECODE_SWEEP:
            code.decode_tile = lambda kv, repeat, c=change: usual[0](kv, repeat) | c
            for sequences, length in ((1, 1024), (16, 2048), (64, 1024)):
                show(measure(name, sequences, length, True), str(change))
    for change in PREFILL_SWEEP:
        code.prefill_tile = lambda kv, repeat, longest, c=change: usual[1](kv, repeat, longest) | c
        show(measure("GQA 32/4 x 128", 2, 4096, False), str(change))
    code.decode_tile, code.prefill_tile = usual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=["triton"])
    parser.add_argument("--caches", nargs="+", choices=("bf16", "fp8"), default=["bf16", "fp8"])
    args = parser.parse_args()
    if args.sweep:
        sweep()
        return
    report = gpu.Report("attention", {"what": "attention"})
    print("| attention | by | phase | cache | sequences | length | ms | floor ms | floor / time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (name, (sequences, length), decode, fp8), backend in product(cases(), args.backends):
        cache = "fp8" if fp8 else "bf16"
        if cache not in args.caches or cache not in BACKENDS[backend] or (backend == "hopper" and "MLA" in name):
            continue
        about = {"what": name, "backend": backend, "sequences": sequences, "length": length}
        if row := report.measure("rows", about, partial(measure, name, sequences, length, decode, fp8, backend)):
            show(row)
    for length in (2048, 8192):
        if row := report.measure("rows", {"length": length}, partial(measure_plain, length)):
            show(row)
    report.end()


def cases() -> Iterator[tuple[str, tuple[int, int], bool, bool]]:
    """What, sequences and their length, whether decoding, whether the cache is FP8."""
    for name in VIEWS:
        yield from ((name, sizes, True, fp8) for fp8 in (False, True) for sizes in DECODES)
        yield from ((name, sizes, False, False) for sizes in PROMPTS if name.startswith("GQA"))


if __name__ == "__main__":
    main()
