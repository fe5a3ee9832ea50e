"""Is `tiny` on a GPU, in every scheme, as far from the exact model as on a CPU?

    python benchmarks/schemes_gpu.py [--limit 8] [--schemes all] [--kv bf16]

The exact model runs on the CPU in FP32, as for `schemes.py`; every scheme then runs on the GPU in BF16, on its kernels,
along the same answers. `bf16` is the noise: what BF16 itself costs there. A scheme agrees where its divergence is that
of the CPU's table, but for the noise and three standard errors of both. The table is one of the same items, if there is
one (`schemes.py --limit 3 --name schemes-limit3`), else that of all (benchmarks/results/schemes.json).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu
from benchmarks.machine import RESULTS
from benchmarks.schemes import FILE, Models
from moesaic import LLM
from moesaic.commands._schemes import How, Sound, listen, measured
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


def cpu_table(limit: int) -> dict[str, dict[str, Any]]:
    """The CPU's rows by scheme, of the same items where they were measured."""
    files = [file for file in (RESULTS / f"schemes-limit{limit}.json", FILE) if file.exists()]
    return {row["scheme"]: row for row in json.loads(files[0].read_text())["rows"]} if files else {}


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
    table = cpu_table(args.limit)
    report = gpu.Report("schemes-kv8" if args.kv == "fp8" else "schemes",
                        {"what": "schemes on a GPU", "limit": args.limit, "kv": args.kv})  # fmt: skip
    began = time.perf_counter()
    print("| scheme | right | KL on the GPU | KL on the CPU | agrees | seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models, how = GPUModels(Path(folder), args.kv), How(TASK_TOKENS)
        llm = models.open(None)
        sound, exact = listen(llm, of_families(llm, FAMILIES, args.limit), how)
        report.result["exact"] = {**exact, "scheme": "as stored, on the CPU"}
        for name in names:
            one = partial(judged, models, name, sound, how, report.result, table.get(name))
            if row := report.measure("rows", {"scheme": name}, one):
                show(row)
    wrong = [row["scheme"] for row in report.result["rows"] if row.get("agrees") is False]
    print(f"{time.perf_counter() - began:.0f} s; differ from the CPU: {', '.join(wrong) or 'none'}", flush=True)
    report.failed += len(wrong)
    report.end()


def judged(models: GPUModels, name: str, sound: Sound, how: How, result: dict[str, Any],
           cpu: dict[str, Any] | None) -> dict[str, Any]:  # fmt: skip
    """One scheme's row; `bf16` leaves its divergence as the noise."""
    row = measured(models.open, name + HERE, sound, how) | {"scheme": name}
    if "kl" not in row:
        return row
    if name == "bf16":
        result["noise"] = row["kl"]
    return row | verdict(row, result.get("noise", 0.0), cpu)


def show(row: dict[str, Any]) -> None:
    if "kl" not in row:
        print(f"| {row['scheme']} | | | | {row.get('error', '')} | |", flush=True)
        return
    cpu = "" if row["cpu_kl"] is None else f"{row['cpu_kl']:.2e}"
    print(f"| {row['scheme']} | {row['right']}/{row['count']} | {row['kl']:.2e} ± {row['kl_error']:.0e} | {cpu} | "
          f"{row['agrees']} | {row['seconds']} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
