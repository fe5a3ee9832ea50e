"""How long does a mixture layer take on a GPU, in every scheme, and how far is that from the hardware's floor?

    python benchmarks/experts.py [--shapes small large] [--schemes fp8 mxfp8 ...] [--tokens 1 16 ...]
                                 [--backends triton deep_gemm humming] [--peers]

Given top-k ids and weights of uniformly random routing: encode, sort, first product with activation, encode, second
product, weighted sum. One CUDA graph holds so many calls, with rows and routings of their own, that it reads more than
four L2 caches; the median of its replays, per call. All kernels get the same weights, rows and routings.
floor = max(bytes of the touched experts / read bandwidth, products / peak of the operands).

--peers: also pairs of weights and rows that packages multiply and no scheme of ours asks for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu
from benchmarks.machine import installed, keep, save
from moesaic.commands._measure import Candidate, Case, Inputs, candidates, ops_of, packed, time_calls
from moesaic.contracts.scheme import SCHEMES, Encoding, Scheme, WeightFormat
from moesaic.errors import MoesaicError
from moesaic.hardware import Hardware, local_gpu
from moesaic.kernels.humming import CONTRACTS as HUMMING
from moesaic.kernels.ops import ExpertWeights
from moesaic.kernels.registry import backends, local_catalogue

TOKENS = (1, 16, 64, 256, 1024, 4096)
SHAPES = {"small": (128, 2048, 768, 8), "large": (256, 7168, 2048, 8), "lite": (64, 2048, 1408, 6),
          "kimi": (384, 7168, 2048, 8), "glm": (128, 4096, 1408, 8), "oss": (32, 2880, 2880, 4),
          "mixtral": (8, 4096, 14336, 2)}  # fmt: skip
"""Experts, hidden size, width, experts per token: Qwen3-30B-A3B, DeepSeek-V3, DeepSeek-V2-Lite, Kimi-K2, GLM-4.5-Air,
gpt-oss-20b, Mixtral-8x7B."""
PACKAGES = ("sgl-deep-gemm", "apache-tvm-ffi", "humming-kernels")


def foreign() -> dict[str, Scheme]:
    """Pairs that only other packages' kernels multiply, under names of their own."""
    ours = {(each.weight.name, each.activation.name) for each in SCHEMES.values()}
    pairs = sorted((HUMMING[0].pairs or frozenset()) - ours)
    return {f"{form}+{rows}": Scheme(f"{form}+{rows}", WeightFormat(form), Encoding(rows)) for form, rows in pairs}


FOREIGN = foreign()


class Bench:
    def __init__(self, backends: list[str], sustain: float = 0.0) -> None:
        found = local_gpu()
        if found is None:
            raise SystemExit("needs a GPU")
        self.hardware: Hardware = found
        self.backends, self.sustain = backends, sustain
        self.catalogue = local_catalogue()

    def rows(self, case: Case, tokens: list[int], compile_only: bool = False) -> Iterator[dict[str, Any]]:
        """One per kernel, with what it was fastest with, and number of tokens; a failure is a row with the reason."""
        found, rejected = candidates(case, self.hardware, self.catalogue, self.backends)
        for each in rejected:
            print(f"{case}: not {each.candidate}: {each.reason}", file=sys.stderr)
        try:
            w = case.weights("cuda")
        except MoesaicError as error:  # a shape that the format cannot hold
            found = []
            print(f"{case}: {error}", file=sys.stderr)
        for name in sorted({each.backend for each in found}, key=self.backends.index):
            mine = [each for each in found if each.backend == name]
            head = {"shape": shape_of(case), "scheme": case.scheme.name, "format": str(case.scheme.weight),
                    "encoding": str(case.scheme.activation), "backend": name}  # fmt: skip
            try:
                with packed(w, mine[0].packer) as ready:
                    for count in tokens:
                        times = self.times(case, mine, ready, count, compile_only)
                        yield head | self.judged(case, ready, count, times)
            except Exception as error:  # another package's kernel may raise anything: the other rows still count
                yield head | {"error": f"{error!r:.300}"}

    def times(self, case: Case, mine: list[Candidate], w: ExpertWeights, tokens: int,
              compile_only: bool) -> dict[Candidate, float]:  # fmt: skip
        inputs, times = Inputs.of(case, w, tokens), {}
        for each in (one for one in mine if one.worth(case, tokens)):
            calls = inputs.calls(case, ops_of(each, case, self.hardware, self.catalogue), w)
            if compile_only:
                calls[0]()
            times[each] = 1.0 if compile_only else time_calls(calls, sustain=self.sustain)
        return times

    def judged(self, case: Case, w: ExpertWeights, tokens: int, times: dict[Candidate, float]) -> dict[str, Any]:
        """Milliseconds, the floor, and the share of the floor."""
        best = min(times, key=lambda each: times[each])
        nbytes = Inputs.of(case, w, tokens).touched * (w.w13.nbytes + w.w2.nbytes) / case.experts
        products = 2 * tokens * case.top_k * 3 * case.hidden * case.width
        peak = gpu.limits().fp8 if case.scheme.activation.name.startswith("fp8") else gpu.limits().bf16
        floor = max(nbytes / gpu.limits().read, products / peak) * 1e3
        row = {"tokens": tokens, "parameters": dict(best.parameters), "ms": times[best], "floor_ms": floor,
               "share": floor / times[best]}  # fmt: skip
        return row | self.usual(case, tokens, times)

    def usual(self, case: Case, tokens: int, times: dict[Candidate, float]) -> dict[str, float]:
        """Milliseconds with what the kernel chooses without having been measured, if it does choose."""
        chooses = getattr(backends()[next(iter(times)).backend], "usual", None)
        if chooses is None:
            return {}
        lone = 3 * case.hidden * case.width if tokens == 1 else 0
        own = chooses(case.scheme.weight, case.scheme.activation, tokens * case.top_k, case.experts, lone)
        found = [ms for each, ms in times.items() if dict(each.parameters) == own]
        return {"usual_ms": found[0]} if found else {}


def shape_of(case: Case) -> str:
    return f"E{case.experts} K{case.hidden} N{case.width} top{case.top_k}"


def line(row: dict[str, Any]) -> str:
    head = [row["shape"], row["scheme"], row["backend"]]
    if "error" in row:
        return f"| {' | '.join(head)} | failed: {row['error']} |"
    given = "".join(f" {name}={value}" for name, value in row["parameters"].items())
    tail = [str(row["tokens"]), f"{row['ms']:.4f}", f"{row['floor_ms']:.4f}", f"{row['share']:.2f}"]
    return f"| {' | '.join(head)}{given} | {' | '.join(tail)} |"


def fastest(rows: list[dict[str, Any]]) -> Iterator[str]:
    """For each format of weights the fastest of all kernels and rows: what a peer could be."""
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["shape"], row["format"], row.get("tokens", 0))
        if "ms" in row and (key not in best or row["ms"] < best[key]["ms"]):
            best[key] = row
    for (shape, form, tokens), row in best.items():
        yield f"| {shape} | {form} | {tokens} | {row['backend']} | {row['encoding']} | {row['ms']:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "large"], choices=sorted(SHAPES))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=sorted(SCHEMES | FOREIGN))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--backends", nargs="+", default=["triton"])
    parser.add_argument("--peers", action="store_true", help="also pairs that no scheme asks for")
    parser.add_argument("--compile", action="store_true", help="only compile, for another process to find it done")
    parser.add_argument("--sustain", type=float, default=0.0, help="seconds of load before each measurement")
    parser.add_argument("--name", help="of the result (default: by the shapes)")
    args = parser.parse_args()
    bench, rows = Bench(args.backends, args.sustain), []
    names = dict.fromkeys([*args.schemes, *(FOREIGN if args.peers else ())])
    about = gpu.describe() | ({"sustain_s": args.sustain} if args.sustain else {})
    about["versions"] |= {name: installed(name) for name in PACKAGES}
    name = f"{args.name or 'experts-' + '-'.join(args.shapes)}-{gpu.device_slug()}"
    print("| shape | scheme | kernel | tokens | ms | floor ms | floor / time |\n|---|---|---|---|---|---|---|")
    for shape in (SHAPES[name] for name in args.shapes):
        for scheme in ((SCHEMES | FOREIGN)[name] for name in names):
            for row in bench.rows(Case(scheme, *shape), args.tokens, args.compile):
                rows.append(row)
                print(line(row), flush=True)
                if not args.compile:
                    keep(name, {"what": "experts", **about, "rows": rows})
    if args.compile:
        return
    if len({row["backend"] for row in rows}) > 1:
        print("\n| shape | weights | tokens | fastest | rows | ms |\n|---|---|---|---|---|---|")
        print("\n".join(fastest(rows)))
    save(name, {"what": "experts", **about, "rows": rows})


if __name__ == "__main__":
    main()
