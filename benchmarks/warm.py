"""Compiles a model's kernels before they are measured, on all processors at once. Shared by the GPU benchmarks.

A process per step size runs the forward pass on `meta` tensors: what is launched is compiled into Triton's cache, where
the engine finds it. Compiling kernels one after another, while graphs are captured, takes minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from moesaic.contracts.plan import Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.engine.draw import pick
from moesaic.hardware import GPUS
from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.kernels.registry import Kernels, catalogue
from moesaic.layers.step import StepInput
from moesaic.models.build import plan_here, spec_of
from moesaic.models.decoder import Decoder
from moesaic.models.hold import hold
from moesaic.moe.dispatch import contracts
from tests.triton_ahead import collect, meta

ROOT = Path(__file__).resolve().parent.parent


def compile_step(config: str, scheme: str, kv: str, rows: int, count: int) -> Counter[str]:
    """A step of `rows` sequences with `count` new tokens each; kernels by name, as often as they are launched."""
    from benchmarks.models import MODELS

    spec = spec_of(MODELS[config])
    spec = spec if scheme == "bf16" else hold(spec, SCHEMES[scheme])
    own = [each for each in catalogue() if each.backend in ("triton", "reference")]
    plan = plan_here(spec, GPUS["h100"], "bfloat16", Wishes(kv=kv, max_batch=256), (*own, *contracts()))
    model = Decoder(spec, Kernels(plan), torch.empty(0, dtype=torch.bfloat16, device="meta"), 4096)
    pool, tokens = model.pool(64, 16), rows * count
    spans = tuple(Span(s * count, count, 4096) for s in range(rows))
    table, spans_S3 = meta(rows, 256, dtype=torch.int32), meta(rows, 3, dtype=torch.int64)
    batch = AttentionBatch(spans, rows if count == 1 else 0, table, 16, spans_S3)
    numbers = [meta(tokens, dtype=torch.int64) for _ in range(4)]
    step = StepInput(*numbers[:3], batch, pool, live_T=numbers[3] if count == 1 else None)

    def forward() -> None:
        with model.meter.counting():
            pick(model.ops, model.scores(model(step)[:rows]))

    return Counter(each["kernel"] for each in collect(90, forward, measure=False))


def compile_all(config: str, scheme: str, kv: str, sizes: Sequence[tuple[int, int]]) -> float:
    """(rows, tokens of each) of every step, each in a process. Seconds."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    jobs = [
        subprocess.Popen([sys.executable, __file__, config, scheme, kv, f"{rows}x{count}"], env=environment, cwd=ROOT,
                         stdout=subprocess.DEVNULL)
        for rows, count in sizes
    ]  # fmt: skip
    failed = [size for size, job in zip(sizes, jobs, strict=True) if job.wait()]
    for size in failed:
        print(f"could not be compiled ahead: {size}", file=sys.stderr)
    return time.perf_counter() - began


def main(config: str, scheme: str, kv: str, *sizes: str) -> None:
    for size in sizes:
        rows, count = map(int, size.split("x"))
        found = compile_step(config, scheme, kv, rows, count)
        print(f"{size}: {sum(found.values())} kernels", dict(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
