"""How long does a mixture layer take on a GPU, in every scheme, and how far is that from the hardware's floor?

    python benchmarks/experts.py [--shapes small large] [--schemes fp8 mxfp8 ...] [--tokens 1 16 ...]

Given top-k ids and weights of uniformly random routing: encode, sort, first product with activation, encode, second
product, weighted sum. One CUDA graph holds so many calls, with rows and routings of their own, that it reads more than
four L2 caches; the median of its replays, per call.
floor = max(bytes of the touched experts / read bandwidth, products / peak of the operands).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu
from benchmarks.machine import save
from moesaic.contracts.scheme import SCHEMES, Scheme
from moesaic.contracts.spec import SILU
from moesaic.formats.base import QuantTensor
from moesaic.formats.dummy import fill
from moesaic.kernels import triton
from moesaic.kernels.ops import ExpertWeights

TOKENS = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Shape:
    """experts, hidden size, expert width, experts per token."""

    experts: int
    hidden: int
    width: int
    top_k: int

    def __str__(self) -> str:
        return f"E{self.experts} K{self.hidden} N{self.width} top{self.top_k}"


SHAPES = {"small": Shape(128, 2048, 768, 8), "large": Shape(256, 7168, 2048, 8), "lite": Shape(64, 2048, 1408, 6)}


def make(scheme: Scheme, shape: Shape) -> ExpertWeights:
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    w13 = QuantTensor.empty(scheme.weight, (shape.width, shape.width), shape.hidden, like, (shape.experts,))
    w2 = QuantTensor.empty(scheme.weight, (shape.hidden,), shape.width, like, (shape.experts,))
    return ExpertWeights(fill(w13), fill(w2), SILU, scheme.activation, scale_of(scheme))


def scale_of(scheme: Scheme) -> torch.Tensor | None:
    return torch.tensor(0.01, device="cuda") if scheme.activation.static else None


def measure(w: ExpertWeights, scheme: Scheme, shape: Shape, tokens: int) -> dict[str, Any]:
    """Milliseconds, the floor, and the share of the floor."""
    each = (w.w13.nbytes + w.w2.nbytes) / shape.experts
    count = max(1, min(16, -(-gpu.CACHE // int(each * min(shape.experts, tokens * shape.top_k)))))
    inputs = []
    for _ in range(count):
        ids = torch.rand(tokens, shape.experts, device="cuda").argsort(-1)[:, : shape.top_k].to(torch.int32)
        weights = torch.rand(tokens, shape.top_k, device="cuda")
        inputs.append((torch.randn(tokens, shape.hidden, device="cuda").bfloat16(), ids, weights))
    scale = scale_of(scheme)

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = triton.experts(triton.encode(x, scheme.activation, scale), w, ids, weights)
        return out

    milliseconds = gpu.time_calls([lambda each=each: layer(*each) for each in inputs])
    touched = sum(len(ids.unique()) for _, ids, _ in inputs) / count
    eight = scheme.activation.name.startswith("fp8") and scheme.weight.name in ("fp8_tensor", "fp8_channel",
                                                                                "fp8_block", "int4")  # fmt: skip
    products = 2 * tokens * shape.top_k * 3 * shape.hidden * shape.width
    floor = max(touched * each / gpu.READ, products / (gpu.FP8 if eight else gpu.BF16)) * 1e3
    return {"shape": str(shape), "scheme": scheme.name, "tokens": tokens, "ms": milliseconds, "floor_ms": floor,
            "share": floor / milliseconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "large"], choices=sorted(SHAPES))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=sorted(SCHEMES))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--compile", action="store_true", help="only compile, for another process to find it done")
    args = parser.parse_args()
    rows = []
    print("| shape | scheme | tokens | ms | floor ms | floor / time |\n|---|---|---|---|---|---|")
    for shape in (SHAPES[name] for name in args.shapes):
        for scheme in (SCHEMES[name] for name in args.schemes):
            w = make(scheme, shape)
            for tokens in args.tokens:
                row = measure(w, scheme, shape, tokens)
                rows.append(row)
                if args.compile:
                    continue
                print(f"| {shape} | {scheme.name} | {tokens} | {row['ms']:.4f} | {row['floor_ms']:.4f} | "
                      f"{row['share']:.2f} |", flush=True)  # fmt: skip
            del w
    if not args.compile:
        name = f"experts-{'-'.join(args.shapes)}-{gpu.device_slug()}"
        save(name, {"what": "experts", **gpu.describe(), "rows": rows})


if __name__ == "__main__":
    main()
