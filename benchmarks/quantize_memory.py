"""How much memory does `moesaic quantize` take at its peak, on a checkpoint of more than 2 GB?

Writes a sharded random BF16 checkpoint, then quantises it in a fresh process per scheme, and reports the peak resident
memory above the level just before, when everything is imported. The promise is one file of the result plus one layer
of the source; the exit status is 1 where it is broken. What is measured includes writing, reading back and the report.

    PYTHONPATH=src python benchmarks/quantize_memory.py [--gib 2.0] [--schemes mxfp8,nvfp4a16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.load_memory import SIZES, status_bytes, write_checkpoint
from benchmarks.machine import describe, save
from moesaic.contracts.scheme import SCHEMES
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.quantize import Recipe, prepare, quantize
from moesaic.models.quantize_state import Workspace

SHARDS = 5
SHARD_BYTES = 512 << 20
LAYER_BYTES = 2 * 3 * SIZES["num_local_experts"] * SIZES["intermediate_size"] * SIZES["hidden_size"]
"""Of the experts of one layer of the source, which are nearly all of it."""


def measure(source: str, output: str, scheme: str) -> dict[str, float]:
    """Quantises once, in this process. Memory is in bytes, by the kernel's own count."""
    recipe = Recipe(SCHEMES[scheme], shard_bytes=SHARD_BYTES)
    with Checkpoint.open(source) as checkpoint:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from the present level
        before, began = status_bytes("VmRSS"), time.perf_counter()
        plan = prepare(checkpoint, recipe)
        with Workspace(Path(output), recipe.options(checkpoint)) as work:
            quantize(checkpoint, plan, work, dict, lambda _: None)
        seconds, peak = time.perf_counter() - began, status_bytes("VmHWM") - before
        largest = max(4 * unit.part.inputs * unit.part.outputs for unit in plan.units if unit.part)
        copied = max(unit.before for unit in plan.units if not unit.part)
        return {
            "read_bytes": plan.before, "written_bytes": plan.after, "files": len(plan.shards),
            "largest_file_bytes": max(shard.nbytes for shard in plan.shards), "largest_projection_fp32_bytes": largest,
            "largest_copied_bytes": copied, "peak_bytes": peak, "seconds": round(seconds, 2),
        }  # fmt: skip


def measure_apart(source: Path, scheme: str) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--measure", str(source), directory, scheme]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"scheme": scheme, **json.loads(done.stdout)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the expert weights (default: 2)")
    parser.add_argument("--schemes", default="mxfp8,nvfp4a16", help="comma-separated (default: mxfp8,nvfp4a16)")
    parser.add_argument("--measure", nargs=3, metavar=("SRC", "DST", "SCHEME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), int(options.gib * 2**30), SHARDS)
        rows = [measure_apart(Path(directory), scheme) for scheme in options.schemes.split(",")]
    print(f"{'scheme':14}{'read MB':>9}{'written MB':>12}{'file MB':>9}{'layer MB':>10}{'peak MB':>9}{'seconds':>9}")
    for row in rows:
        keys = ("read_bytes", "written_bytes", "largest_file_bytes", "peak_bytes")
        read, written, file, peak = (float(row[key]) / 1e6 for key in keys)
        print(
            f"{row['scheme']:14}{read:9.0f}{written:12.0f}{file:9.0f}{LAYER_BYTES / 1e6:10.0f}{peak:9.0f}"
            f"{row['seconds']:9.1f}"
        )
    facts = {**describe("torch"), "threads": torch.get_num_threads(), "layer_bytes": LAYER_BYTES}
    save("quantize-memory-cpu", {"what": "quantize-memory", **facts, "rows": rows})
    return 0 if all(float(row["peak_bytes"]) <= float(row["largest_file_bytes"]) + LAYER_BYTES for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
