"""What a result file says of where it came from. Shared by the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def describe(*packages: str) -> dict[str, Any]:
    """device (processor, its vector extensions), cores, commit, and the versions of packages."""
    from moesaic.hardware import local_cpu

    cpu = local_cpu()
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in cpu.features]
    return {
        "device": f"{cpu.name} ({', '.join(vectors) or platform.machine()})",
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
    }


def commit() -> str:
    """The checkout's commit, with a mark where source files differ from it. MOESAIC_COMMIT names it for a copy that has
    no history of its own."""
    if given := os.environ.get("MOESAIC_COMMIT"):
        return given
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + ("+changes" if changed.stdout.strip() else "")


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def save(name: str, result: dict[str, Any]) -> None:
    """Writes benchmarks/results/<name>.json and prints the one line of JSON that ends every benchmark."""
    keep(name, result)
    print(json.dumps(result))


def keep(name: str, result: dict[str, Any]) -> None:
    """Writes benchmarks/results/<name>.json, all at once: who is killed leaves the old file or the new one."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    new = RESULTS / f"{name}.tmp"
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(RESULTS / f"{name}.json")
