"""What does routing cost on a GPU: the gate in FP32 and in BF16, the choice of experts, and the sort by expert? And the
requantiser between a dispatcher's FP8 slots and an FP8 product of one scale.

    python benchmarks/route.py

One CUDA graph of several calls with logits of their own; microseconds per call. `gate` is product and choice together,
as a decoding step runs them. The requantiser is held against the bytes of the slots in use, read and written once.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu
from moesaic.contracts.spec import RouterSpec
from moesaic.kernels import triton

ROUTERS = {
    "E256 sigmoid, 4 of 8 groups": (RouterSpec(256, 8, "sigmoid", "w", "b", True, 2.5, 8, 4, "top2_sum"), 7168),
    "E128 softmax": (RouterSpec(128, 8, "softmax", "w"), 2048),
}
TOKENS = (1, 16, 64, 256, 1024, 4096)
SLOTS = ((32, 128, 7168, 128), (32, 128, 7168, 40), (256, 128, 7168, 32), (16, 1024, 2048, 1024))
"""Experts, capacity, columns, slots in use of each."""
COPIES = 8


def measure(spec: RouterSpec, hidden: int, tokens: int) -> dict[str, float]:
    """Microseconds of each part."""
    from moesaic.kernels._triton.experts import height_of
    from moesaic.kernels._triton.sort import sort

    x = [torch.randn(tokens, hidden, device="cuda").bfloat16() for _ in range(COPIES)]
    logits = [torch.randn(tokens, spec.experts, device="cuda") for _ in range(COPIES)]
    bias = torch.randn(spec.experts, device="cuda") if spec.bias else None
    narrow = [torch.randn(spec.experts, hidden, device="cuda").bfloat16() for _ in range(COPIES)]
    wide, height = [w.float() for w in narrow], height_of(tokens * spec.top_k, spec.experts)
    ids = [triton.route(each, bias, spec)[0] for each in logits]
    pairs = {"fp32": list(zip(x, wide, strict=True)), "bf16": list(zip(x, narrow, strict=True))}
    calls = {
        "gate_fp32": [lambda x=x, w=w: triton.gate(x, w, None, bias, spec) for x, w in pairs["fp32"]],
        "gate_bf16": [lambda x=x, w=w: triton.gate(x, w, None, bias, spec) for x, w in pairs["bf16"]],
        "route": [lambda each=each: triton.route(each, bias, spec) for each in logits],
        "sort": [lambda each=each: sort(each, spec.experts, height) for each in ids],
        "route_sort": [lambda each=each: sort(triton.route(each, bias, spec)[0], spec.experts, height)
                       for each in logits],
    }  # fmt: skip
    return {name: gpu.time_calls(each) * 1e3 for name, each in calls.items()}


def requantise(experts: int, capacity: int, columns: int, used: int) -> dict[str, Any]:
    """A dispatcher's slots: scales lie group by group, and some experts have fewer rows than others."""
    from moesaic.kernels._triton.requantize import requantize_slots

    counts = torch.full((experts,), used, dtype=torch.int32, device="cuda")
    counts[::2] = used - used // 4
    rows = int(counts.sum())
    nbytes = rows * (2 * columns + columns // 128 * 4)
    copies = min(24, -(-gpu.CACHE // nbytes))
    data = [torch.randn(experts, capacity, columns, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    scales = torch.rand(experts, columns // 128, capacity, device="cuda").transpose(1, 2) + 0.1
    one, out = torch.tensor(0.3, device="cuda"), torch.empty_like(data[0])
    calls = [lambda each=each: requantize_slots(each, scales, counts, one, out) for each in data]
    us, floor = gpu.time_calls(calls) * 1e3, nbytes / gpu.limits().read * 1e6
    return {"experts": experts, "capacity": capacity, "columns": columns, "rows": rows, "us": us, "floor_us": floor,
            "time_over_floor": us / floor}  # fmt: skip


def main() -> None:
    report = gpu.Report("route", {"what": "route"})
    print("| router | tokens | gate FP32 us | gate BF16 us | route us | sort us | route + sort us |")
    print("|---|---|---|---|---|---|---|")
    for name, (spec, hidden) in ROUTERS.items():
        for tokens in TOKENS:
            row = report.measure("rows", {"router": name, "tokens": tokens}, partial(measure, spec, hidden, tokens))
            show(row)
    print("\n| experts | capacity | columns | rows | requantise us | floor us | time / floor |")
    print("|---|---|---|---|---|---|---|")
    for sizes in SLOTS:
        show(report.measure("requantise", {}, partial(requantise, *sizes)))
    report.end()


def show(row: dict[str, Any] | None) -> None:
    cells = (f"{value:.1f}" if isinstance(value, float) else str(value) for value in (row or {}).values())
    if row:
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
