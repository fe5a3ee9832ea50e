"""How long do dense projections take on a GPU in every scheme, activations encoded included?

    python benchmarks/gemm.py [--schemes fp8 mxfp8 ...] [--tokens 1 16 ...] [--backends triton deep_gemm] [--terms]

Shapes: qkv and output projection of Qwen3-30B-A3B, gate and up of DeepSeek-V3's shared expert and of its dense layers.
With --terms: the products alone, in parts that somebody else adds up, as behind qkv and o in a decoding step.
One CUDA graph of calls with weights of their own, together more than four L2 caches. Peer: torch's BF16 product of the
same shape.
floor = max(bytes of the weight / read bandwidth, products / peak of the operands).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu
from moesaic.contracts.contract import Need, asks_of
from moesaic.contracts.scheme import SCHEMES, Scheme
from moesaic.formats.base import QuantTensor
from moesaic.formats.dummy import fill
from moesaic.hardware import local_gpu
from moesaic.kernels import triton
from moesaic.kernels.registry import backends, local_catalogue

SHAPES = {"qkv 2048 -> 5120": (2048, (4096, 512, 512)), "o 4096 -> 2048": (4096, (2048,)),
          "shared 7168 -> 4096": (7168, (2048, 2048)), "gate_up 7168 -> 36864": (7168, (18432, 18432))}  # fmt: skip
TOKENS = (1, 16, 64, 256, 1024, 4096)


def takers(scheme: Scheme, names: list[str], terms: bool) -> list[str]:
    """Of these backends those that multiply a scheme here."""
    found = local_gpu()
    if found is None:
        raise SystemExit("needs a GPU")
    need = Need("cuda", "bfloat16", False, found.features, found.arch, **asks_of(scheme))
    op = "linear" if not scheme.quantized else "linear_terms" if terms else "linear_quant"
    able = {each.backend for each in local_catalogue() if each.op == op and each.built and not each.misses(need)}
    return [name for name in names if name in able]


def measure(scheme: Scheme, size: tuple[int, tuple[int, ...]], tokens: int, backend: str,
            terms: bool) -> dict[str, float]:  # fmt: skip
    columns, segments = size
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    one = fill(QuantTensor.empty(scheme.weight, segments, columns, like))
    count = max(1, min(16, -(-gpu.CACHE // one.nbytes)))
    weights = [one, *(fill(QuantTensor.empty(scheme.weight, segments, columns, like)) for _ in range(count - 1))]
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    scale = torch.tensor(0.01, device="cuda") if scheme.activation.static else None

    kernels = backends()[backend]
    rows = triton.encode(x, scheme.activation, scale) if scheme.quantized else None

    def call(w: QuantTensor) -> object:
        if not scheme.quantized:
            return kernels.linear(x, w.plain)
        if terms:
            return kernels.linear_terms(rows, w)
        return kernels.linear_quant(triton.encode(x, scheme.activation, scale), w)

    eight = scheme.activation.name.startswith("fp8") and scheme.weight.name.startswith(("fp8", "int4"))
    work = 2 * tokens * columns * sum(segments)
    floor = max(one.nbytes / gpu.limits().read, work / (gpu.limits().fp8 if eight else gpu.limits().bf16)) * 1e3
    milliseconds = gpu.time_calls([lambda w=w: call(w) for w in weights])
    return {"ms": milliseconds, "floor_ms": floor, "share": floor / milliseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=sorted(SCHEMES))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--backends", nargs="+", default=["triton"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--terms", action="store_true")
    parser.add_argument("--name", default="gemm", help="of the result")
    args = parser.parse_args()
    report = gpu.Report(args.name, {"what": "gemm", "terms": args.terms})
    print("| projection | scheme | kernel | tokens | ms | floor ms | floor / time |\n|---|---|---|---|---|---|---|")
    for name in args.shapes:
        for scheme in args.schemes:
            for backend, tokens in product(takers(SCHEMES[scheme], args.backends, args.terms), args.tokens):
                about = {"shape": name, "scheme": scheme, "backend": backend, "tokens": tokens}
                how = partial(measure, SCHEMES[scheme], SHAPES[name], tokens, backend, args.terms)
                row = report.measure("rows", about, how)
                if row:
                    print(f"| {name} | {scheme} | {backend} | {tokens} | {row['ms']:.4f} | {row['floor_ms']:.4f} | "
                          f"{row['share']:.2f} |", flush=True)  # fmt: skip
    report.end()


if __name__ == "__main__":
    main()
