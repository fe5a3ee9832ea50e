"""How long does attention over the paged pool take on a GPU, decoding and for prompts?

    python benchmarks/attention.py

floor of decoding = bytes of the contexts read once / read bandwidth; of prompts = products / BF16 peak.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu
from benchmarks.machine import save
from moesaic.kernels import triton
from moesaic.kernels.ops import AttentionBatch, KVView, Span

VIEWS = {
    "GQA 32/4 x 128": (KVView(4, 128, 512, 128), 32, 1024),
    "MLA absorbed 128 x 576": (KVView(1, 576, 0, 512), 128, 576),
}
DECODES = ((1, 1024), (1, 16384), (16, 2048), (64, 1024), (64, 4096), (256, 1024))
PROMPTS = ((1, 2048), (1, 8192), (4, 1024))


def measure(name: str, sequences: int, length: int, decode: bool) -> dict[str, Any]:
    view, heads, width = VIEWS[name]
    count = 1 if decode else length
    pool = torch.randn(sequences * length, width, device="cuda").bfloat16()
    slots_SL = torch.randperm(sequences * length // 16, device="cuda")[:, None] * 16 + torch.arange(16, device="cuda")
    spans = tuple(Span(s * count, count, length) for s in range(sequences))
    batch = AttentionBatch.of(spans, sequences if decode else 0, slots_SL.view(sequences, length))
    q = torch.randn(sequences * count, heads, view.key_dim, device="cuda").bfloat16()
    milliseconds = gpu.time_calls([lambda: triton.attend_paged(q, pool, batch, view, 0.1)] * (4 if decode else 1))
    work = sequences * count * length * heads * (view.key_dim + view.value_dim) * (2 if decode else 1)
    floor = max(pool.nbytes / gpu.READ, work / gpu.BF16) * 1e3
    return {"what": name, "phase": "decode" if decode else "prompt", "sequences": sequences, "length": length,
            "ms": milliseconds, "floor_ms": floor, "share": floor / milliseconds}  # fmt: skip


def main() -> None:
    rows = []
    print("| attention | phase | sequences | length | ms | floor ms | floor / time |\n|---|---|---|---|---|---|---|")
    for name in VIEWS:
        for decode, cases in ((True, DECODES), (False, PROMPTS)):
            if not decode and name.startswith("MLA"):
                continue  # prompts take the plain path there
            for sequences, length in cases:
                row = measure(name, sequences, length, decode)
                rows.append(row)
                print(f"| {name} | {row['phase']} | {sequences} | {length} | {row['ms']:.4f} | {row['floor_ms']:.4f} | "
                      f"{row['share']:.2f} |", flush=True)  # fmt: skip
    save(f"attention-{gpu.device_slug()}", {"what": "attention", **gpu.describe(), "rows": rows})


if __name__ == "__main__":
    main()
