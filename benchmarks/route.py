"""What does routing cost on a GPU: the gate in FP32 and in BF16, the choice of experts, and the sort by expert?

    python benchmarks/route.py

One CUDA graph of several calls with logits of their own; microseconds per call.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu
from benchmarks.machine import save
from moesaic.contracts.spec import RouterSpec
from moesaic.kernels import triton

ROUTERS = {
    "E256 sigmoid, 4 of 8 groups": (RouterSpec(256, 8, "sigmoid", "w", "b", True, 2.5, 8, 4, "top2_sum"), 7168),
    "E128 softmax": (RouterSpec(128, 8, "softmax", "w"), 2048),
}
TOKENS = (1, 16, 64, 256, 1024, 4096)


def measure(spec: RouterSpec, hidden: int, tokens: int) -> dict[str, float]:
    """Microseconds of each part."""
    from moesaic.kernels._triton.experts import height_of
    from moesaic.kernels._triton.sort import sort

    x = [torch.randn(tokens, hidden, device="cuda").bfloat16() for _ in range(8)]
    logits = [torch.randn(tokens, spec.experts, device="cuda") for _ in range(8)]
    bias = torch.randn(spec.experts, device="cuda") if spec.bias else None
    narrow = [torch.randn(spec.experts, hidden, device="cuda").bfloat16() for _ in range(8)]
    wide, height = [w.float() for w in narrow], height_of(tokens * spec.top_k, spec.experts)
    ids = [triton.route(each, bias, spec)[0] for each in logits]
    calls = {
        "gate_fp32": [lambda x=x, w=w: triton.linear(x.float(), w) for x, w in zip(x, wide, strict=True)],
        "gate_bf16": [lambda x=x, w=w: triton.linear(x, w) for x, w in zip(x, narrow, strict=True)],
        "route": [lambda each=each: triton.route(each, bias, spec) for each in logits],
        "sort": [lambda each=each: sort(each, spec.experts, height) for each in ids],
        "route_sort": [lambda each=each: sort(triton.route(each, bias, spec)[0], spec.experts, height)
                       for each in logits],
    }  # fmt: skip
    return {name: gpu.time_calls(each) * 1e3 for name, each in calls.items()}


def main() -> None:
    rows = []
    print("| router | tokens | gate FP32 us | gate BF16 us | route us | sort us | route + sort us |")
    print("|---|---|---|---|---|---|---|")
    for name, (spec, hidden) in ROUTERS.items():
        for tokens in TOKENS:
            found = measure(spec, hidden, tokens)
            rows.append({"router": name, "tokens": tokens, **found})
            print(f"| {name} | {tokens} | " + " | ".join(f"{us:.1f}" for us in found.values()) + " |", flush=True)
    save(f"route-{gpu.device_slug()}", {"what": "route", **gpu.describe(), "rows": rows})


if __name__ == "__main__":
    main()
