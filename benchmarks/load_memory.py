"""How much memory, beyond the weights themselves, does loading a checkpoint take at its peak?

Writes a sharded random BF16 checkpoint, then loads it in fresh processes, in each of several ways, and reports the
peak resident memory above the level just before the load, over the bytes of the final weights. The promise is a ratio
of at most 1.15; the exit status is 1 where it is broken. The files are in the page cache, so the speed is the
loader's, not the disk's.

    PYTHONPATH=src python benchmarks/load_memory.py [--gib 1.25] [--shards 5] [--repeat 3]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moesaic.models.checkpoint import Checkpoint
from moesaic.models.loading import Slot, load

LIMIT = 1.15
RESULT = Path(__file__).parent / "results" / "load-memory-cpu.json"
EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 8, 1024, 2048, 32_000


# --- the ways of loading: each takes an open checkpoint and returns the parameters that it allocated and filled ---


def load_slots(checkpoint: Checkpoint, dtype: torch.dtype) -> list[torch.Tensor]:
    """Each tensor into a fresh parameter; the experts of a layer side by side in one, as mixture layers hold them."""
    parameters, slots = make_slots(checkpoint, dtype)
    load(checkpoint, slots, ignore=lambda name: False, progress=False)
    return parameters


def copy_mapped(checkpoint: Checkpoint, dtype: torch.dtype) -> list[torch.Tensor]:
    """The peer: the safetensors package maps a shard; its tensors are copied into the same parameters, unchecked."""
    parameters, slots = make_slots(checkpoint, dtype)
    dest = {slot.name: slot.dest for slot in slots}
    for file in checkpoint.files:
        with safe_open(file.path, "pt") as mapped:
            for name in mapped.keys():  # noqa: SIM118 - the object is not iterable
                dest[name].copy_(mapped.get_tensor(name))
    return parameters


def make_slots(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[Slot]]:
    parameters: dict[str, torch.Tensor] = {}
    slots = []
    for name, stored in checkpoint.tensors().items():
        owner, _, expert = name.partition(".experts.")
        if owner not in parameters:
            shape = (EXPERTS, *stored.info.shape) if expert else stored.info.shape
            parameters[owner] = torch.empty(shape, dtype=dtype)
        slots.append(Slot(name, parameters[owner][int(expert)] if expert else parameters[owner]))
    return list(parameters.values()), slots


WAYS: dict[str, Callable[[Checkpoint], list[torch.Tensor]]] = {
    "bfloat16, as stored": lambda checkpoint: load_slots(checkpoint, torch.bfloat16),
    "float32, converted": lambda checkpoint: load_slots(checkpoint, torch.float32),
    "peer: mapped, copied": lambda checkpoint: copy_mapped(checkpoint, torch.bfloat16),
    "peer: mapped, converted": lambda checkpoint: copy_mapped(checkpoint, torch.float32),
}


# --- the process that is measured ---


def measure(directory: str, way: str) -> dict[str, float]:
    """Load once, in this process. Memory is in bytes, by the kernel's own count."""
    with Checkpoint.open(directory) as checkpoint:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from the present level
        before = status_bytes("VmRSS")
        began = time.perf_counter()
        parameters = WAYS[way](checkpoint)
        seconds = time.perf_counter() - began
        peak = status_bytes("VmHWM") - before
        weights = sum(parameter.nbytes for parameter in parameters)
        return {"weights": weights, "read": checkpoint.nbytes, "peak": peak, "seconds": seconds}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


# --- the process that measures ---


def write_checkpoint(directory: Path, nbytes: int, shards: int) -> None:
    """Mixture layers until `nbytes` are reached, dealt out to `shards` files with an index."""
    layer_bytes = 2 * EXPERTS * 3 * INTERMEDIATE * HIDDEN
    shapes = {"embed_tokens": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)}
    for layer in range(-(-nbytes // layer_bytes)):
        for kind in ("gate", "up", "down"):
            shape = (HIDDEN, INTERMEDIATE) if kind == "down" else (INTERMEDIATE, HIDDEN)
            shapes |= {f"layers.{layer}.{kind}.experts.{expert}": shape for expert in range(EXPERTS)}
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: torch.randn(shapes[name], dtype=torch.bfloat16) for name in mine}, directory / file)
        weight_map |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "mixtral"}))


def measure_apart(directory: str, way: str, repeat: int) -> dict[str, float | str]:
    """The worst peak and the median time of `repeat` fresh processes."""
    command = [sys.executable, __file__, "--measure", directory, "--way", way]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repeat)]
    runs = [json.loads(output) for output in outputs]
    seconds = statistics.median(run["seconds"] for run in runs)
    peak = max(run["peak"] for run in runs)
    return {
        "way": way,
        "read_bytes": runs[0]["read"],
        "weight_bytes": runs[0]["weights"],
        "peak_bytes": peak,
        "peak_ratio": round(peak / runs[0]["weights"], 4),
        "seconds": round(seconds, 3),
        "read_gb_per_s": round(runs[0]["read"] / seconds / 1e9, 3),
    }


def environment() -> dict[str, object]:
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "device": cpus[0].split(":", 1)[1].strip() if cpus else platform.machine(),
        "cores": len(cpus),
        "versions": {
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        "commit": git.stdout.strip() if git.returncode == 0 else "unknown",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.25, help="size of the expert weights (default: 1.25)")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3, help="processes per way of loading (default: 3)")
    parser.add_argument("--measure", metavar="DIRECTORY", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.way)))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), int(options.gib * 2**30), options.shards)
        rows = [measure_apart(directory, way, options.repeat) for way in WAYS]
    print(f"{'way':24}{'read GB':>9}{'weights GB':>12}{'peak GB':>9}{'ratio':>8}{'seconds':>9}{'GB/s':>7}")
    for row in rows:
        read, weights, peak = (float(row[key]) / 1e9 for key in ("read_bytes", "weight_bytes", "peak_bytes"))
        print(
            f"{row['way']:24}{read:9.2f}{weights:12.2f}{peak:9.2f}"
            f"{row['peak_ratio']:8.3f}{row['seconds']:9.2f}{row['read_gb_per_s']:7.2f}"
        )
    result = {"what": "load-memory", **environment(), "shards": options.shards, "limit": LIMIT, "rows": rows}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0 if all(float(row["peak_ratio"]) <= LIMIT for row in rows if "peer" not in str(row["way"])) else 1


if __name__ == "__main__":
    sys.exit(main())
