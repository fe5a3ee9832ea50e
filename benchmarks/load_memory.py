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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.machine import describe, save
from moesaic.hardware import local_cpu
from moesaic.kernels.registry import Kernels
from moesaic.models.build import build, plan_here, spec_of
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder
from moesaic.models.loading import Slot
from moesaic.models.weights import slots_of

LIMIT = 1.15
SIZES = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32_000, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


# --- the ways of loading: each takes an open checkpoint and returns the bytes of the weights that it filled ---


def load_model(checkpoint: Checkpoint, dtype: str) -> int:
    """The whole model, as `moesaic generate` builds it."""
    spec = spec_of(checkpoint.config)
    return build(checkpoint, spec, plan_here(spec, local_cpu(), dtype), spec.max_length).model.nbytes()


def copy_mapped(checkpoint: Checkpoint, dtype: str) -> int:
    """The peer: the safetensors package maps a shard; its tensors are copied into the same parameters, unchecked."""
    spec = spec_of(checkpoint.config)
    kernels, like = Kernels(plan_here(spec, local_cpu(), dtype)), torch.empty(0, dtype=getattr(torch, dtype))
    model = Decoder(spec, kernels, like, spec.max_length)
    dest = views(model)
    for file in checkpoint.files:
        with safe_open(file.path, "pt") as mapped:
            for name in mapped.keys():  # noqa: SIM118 - the object is not iterable
                dest[name].copy_(mapped.get_tensor(name))
    return model.nbytes()


def views(model: Decoder) -> dict[str, torch.Tensor]:
    """The storage of each tensor of an unquantised checkpoint."""
    return {slot.name: slot.dest for slot in slots_of(model.sources(), None) if isinstance(slot, Slot)}


WAYS: dict[str, Callable[[Checkpoint], int]] = {
    "bfloat16, as stored": lambda checkpoint: load_model(checkpoint, "bfloat16"),
    "float32, converted": lambda checkpoint: load_model(checkpoint, "float32"),
    "peer: mapped, copied": lambda checkpoint: copy_mapped(checkpoint, "bfloat16"),
    "peer: mapped, converted": lambda checkpoint: copy_mapped(checkpoint, "float32"),
}


# --- the process that is measured ---


def measure(directory: str, way: str) -> dict[str, float]:
    """Load once, in this process. Memory is in bytes, by the kernel's own count."""
    with Checkpoint.open(directory) as checkpoint:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from the present level
        before = status_bytes("VmRSS")
        began = time.perf_counter()
        weights = WAYS[way](checkpoint)
        seconds = time.perf_counter() - began
        peak = status_bytes("VmHWM") - before
        return {"weights": weights, "read": checkpoint.nbytes, "peak": peak, "seconds": seconds}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


# --- the process that measures ---


def write_checkpoint(directory: Path, nbytes: int, shards: int) -> None:
    """A random Mixtral with layers until `nbytes` are reached, dealt out to `shards` files with an index."""
    layer_bytes = 2 * SIZES["num_local_experts"] * 3 * SIZES["intermediate_size"] * SIZES["hidden_size"]
    layers = -(-nbytes // layer_bytes)
    config = {"model_type": "mixtral", "num_hidden_layers": layers, "torch_dtype": "bfloat16", **SIZES}
    (directory / "config.json").write_text(json.dumps(config))
    spec = spec_of(config)
    model = Decoder(spec, Kernels(plan_here(spec, local_cpu(), "bfloat16")), torch.empty(0, device="meta"), 8)
    shapes = {name: view.shape for name, view in views(model).items()}
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: torch.randn(shapes[name], dtype=torch.bfloat16) for name in mine}, directory / file)
        weight_map |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


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
    facts = describe("torch", "safetensors")
    result = {"what": "load-memory", **facts, "shards": options.shards, "limit": LIMIT, "rows": rows}
    save("load-memory-cpu", result)
    return 0 if all(float(row["peak_ratio"]) <= LIMIT for row in rows if "peer" not in str(row["way"])) else 1


if __name__ == "__main__":
    sys.exit(main())
