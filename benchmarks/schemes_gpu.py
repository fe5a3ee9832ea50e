"""Is `tiny` on a GPU, in every scheme, as far from the exact model as on a CPU?

    python benchmarks/schemes_gpu.py [--limit 8] [--schemes all] [--kv bf16]

The exact model runs on the CPU in FP32, as for `schemes.py`; every scheme then runs on the GPU in BF16, on its kernels,
along the same answers. `bf16` is the noise: what BF16 itself costs there. A scheme agrees where its divergence is that
of the CPU's table (benchmarks/results/schemes.json), but for the noise and three standard errors of both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu
from benchmarks.machine import save
from benchmarks.schemes import FILE, Models
from moesaic import LLM
from moesaic.commands._schemes import How, compare
from moesaic.commands.eval import TASK_TOKENS, of_families
from moesaic.contracts.scheme import SCHEMES
from moesaic.tasks import FAMILIES

HERE = " on the GPU"


class GPUModels(Models):
    """None: the exact model. Any other name, with HERE behind it: a scheme on the GPU."""

    def __init__(self, folder: Path, kv: str) -> None:
        super().__init__(folder)
        self.kv = kv

    def open(self, scheme: str | None) -> LLM:
        if scheme is None:
            return LLM(self.path, device="cpu", dtype="float32", progress=False)
        name = scheme.removesuffix(HERE)
        static = SCHEMES[name].activation.static
        held = None if static or name == "bf16" else name
        return LLM(self.calibrated(name) if static else self.path, device="cuda", dtype="bfloat16", kv=self.kv,
                   quantization=held, max_num_seqs=64, graphs=False, progress=False)  # fmt: skip


def verdict(row: dict[str, Any], noise: float, cpu: dict[str, Any] | None) -> dict[str, Any]:
    """agrees: None where the CPU's table has no such row."""
    if cpu is None or "kl" not in cpu:
        return {"cpu_kl": None, "agrees": None}
    room = noise + 3 * (row["kl_error"] + cpu["kl_error"])
    return {"cpu_kl": cpu["kl"], "agrees": bool(abs(row["kl"] - cpu["kl"]) <= room)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=8, help="items per family")
    parser.add_argument("--schemes", default="all", help="names, separated by commas")
    parser.add_argument("--kv", default="bf16", choices=("bf16", "fp8"))
    args = parser.parse_args()
    names = list(SCHEMES) if args.schemes == "all" else ["bf16", *args.schemes.split(",")]
    table = {row["scheme"]: row for row in json.loads(FILE.read_text())["rows"]} if FILE.exists() else {}
    began, rows, noise = time.perf_counter(), [], 0.0
    print("| scheme | right | KL on the GPU | KL on the CPU | agrees | seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models, how = GPUModels(Path(folder), args.kv), How(TASK_TOKENS)
        ask = lambda llm: of_families(llm, FAMILIES, args.limit)  # noqa: E731
        for row in compare(models.open, ask, [name + HERE for name in names], how):
            name = row["scheme"].removesuffix(HERE)
            if "kl" in row:
                noise = row["kl"] if name == "bf16" else noise
                row |= verdict(row, noise, table.get(name))
                cpu = "" if row["cpu_kl"] is None else f"{row['cpu_kl']:.2e}"
                print(f"| {name} | {row['right']}/{row['count']} | {row['kl']:.2e} ± {row['kl_error']:.0e} | {cpu} | "
                      f"{row['agrees']} | {row['seconds']} |", flush=True)  # fmt: skip
            elif "error" in row:
                print(f"| {name} | | | | {row['error']:.160} | |", flush=True)
            rows.append({**row, "scheme": name})
    wrong = [row["scheme"] for row in rows if row.get("agrees") is False]
    print(f"{time.perf_counter() - began:.0f} s; differ from the CPU: {', '.join(wrong) or 'none'}")
    name = f"schemes-{'kv8-' if args.kv == 'fp8' else ''}{gpu.device_slug()}"
    save(name, {"what": "schemes on a GPU", "limit": args.limit, "kv": args.kv, **gpu.describe(), "noise": noise,
                "rows": rows})  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
