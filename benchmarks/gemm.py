"""How long do dense projections take on a GPU in every scheme, activations encoded included?

    python benchmarks/gemm.py [--schemes fp8 mxfp8 ...] [--tokens 1 16 ...]

Shapes: qkv and output projection of Qwen3-30B-A3B, gate and up of DeepSeek-V3's dense layers. One CUDA graph of calls
with weights of their own, together more than four L2 caches. Peer: torch's BF16 product of the same shape.
floor = max(bytes of the weight / read bandwidth, products / peak of the operands).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu
from benchmarks.machine import save
from moesaic.contracts.scheme import SCHEMES, Scheme
from moesaic.formats.base import QuantTensor
from moesaic.formats.dummy import fill
from moesaic.kernels import triton

SHAPES = {"qkv 2048 -> 5120": (2048, (4096, 512, 512)), "o 4096 -> 2048": (4096, (2048,)),
          "gate_up 7168 -> 36864": (7168, (18432, 18432))}  # fmt: skip
TOKENS = (1, 16, 64, 256, 1024, 4096)


def measure(scheme: Scheme, size: tuple[int, tuple[int, ...]], tokens: int) -> dict[str, float]:
    columns, segments = size
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    one = fill(QuantTensor.empty(scheme.weight, segments, columns, like))
    count = max(1, min(16, -(-gpu.CACHE // one.nbytes)))
    weights = [one, *(fill(QuantTensor.empty(scheme.weight, segments, columns, like)) for _ in range(count - 1))]
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    scale = torch.tensor(0.01, device="cuda") if scheme.activation.static else None

    def product(w: QuantTensor) -> object:
        if not scheme.quantized:
            return triton.linear(x, w.plain)
        return triton.linear_quant(triton.encode(x, scheme.activation, scale), w)

    eight = scheme.activation.name.startswith("fp8") and scheme.weight.name.startswith(("fp8", "int4"))
    work = 2 * tokens * columns * sum(segments)
    floor = max(one.nbytes / gpu.READ, work / (gpu.FP8 if eight else gpu.BF16)) * 1e3
    milliseconds = gpu.time_calls([lambda w=w: product(w) for w in weights])
    return {"ms": milliseconds, "floor_ms": floor, "share": floor / milliseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=sorted(SCHEMES))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| projection | scheme | tokens | ms | floor ms | floor / time |\n|---|---|---|---|---|---|")
    for name, size in SHAPES.items():
        for scheme in args.schemes:
            for tokens in args.tokens:
                row = {"shape": name, "scheme": scheme, "tokens": tokens, **measure(SCHEMES[scheme], size, tokens)}
                rows.append(row)
                print(f"| {name} | {scheme} | {tokens} | {row['ms']:.4f} | {row['floor_ms']:.4f} | "
                      f"{row['share']:.2f} |", flush=True)  # fmt: skip
    save(f"gemm-{gpu.device_slug()}", {"what": "gemm", **gpu.describe(), "rows": rows})


if __name__ == "__main__":
    main()
