"""`moesaic doctor`: what is installed, what it makes possible, and what to do about the rest."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moesaic import __version__

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "huggingface_hub")
OPTIONAL = {
    "triton": ("GPU kernels", "gpu"),
    "sgl-deep-gemm": ("FP8 expert products on Hopper and Blackwell", "deepgemm"),
    "flashinfer-python": ("attention and expert kernels on NVIDIA GPUs", "flashinfer"),
    "humming-kernels": ("expert products with 4-bit and 8-bit weights", "humming"),
    "starlette": ("moesaic serve", "serve"),
    "uvicorn": ("moesaic serve", "serve"),
    "httptools": ("moesaic serve", "serve"),
    "pydantic": ("moesaic serve", "serve"),
    "prometheus-client": ("/metrics of moesaic serve", "serve"),
    "msgpack": ("messages between the server and its engine", "serve"),
    "pyyaml": ("moesaic serve --config", "serve"),
    "uvloop": ("a faster event loop for moesaic serve", "serve"),
    "xgrammar": ("answers held to a JSON schema, a regular expression or a choice", "grammar"),
    "gguf": ("checkpoints in GGUF", "convert"),
    "matplotlib": ("the curves of training", "train"),
}
"""Distribution -> (what it enables, the extra of moesaic that installs it)."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor", help="say what is installed and what is missing", usage="moesaic doctor [options]",
        description="Say what is installed here, what each optional package enables, and how to get the rest.",
        epilog="examples:\n  moesaic doctor\n  moesaic doctor --json\n",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report = {"moesaic": __version__, "python": platform.python_version(), "system": platform.platform(),
              "packages": packages(), "hardware": hardware(), "kernels": kernels()}  # fmt: skip
    missing = [name for name in NEEDED if installed(name) is None]
    report["problems"] = [f"{name} is missing: pip install moesaic" for name in missing]
    if args.json:
        json.dump(report, sys.stdout, indent=1)
        print()
    else:
        show(report)
    return int(bool(missing))


def packages() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in (*NEEDED, *OPTIONAL):
        enables, extra = OPTIONAL.get(name, ("everything", None))
        remedy = f"pip install 'moesaic[{extra}]'" if extra else "pip install moesaic"
        found[name] = {"version": installed(name), "enables": enables, "remedy": remedy}
    return found


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """The processor, and the GPUs that torch sees."""
    if installed("torch") is None:
        return {}
    import torch

    from moesaic.hardware import local_cpu

    cpu = local_cpu()
    found: dict[str, Any] = {"cpu": cpu.name, "native_bf16": cpu.native_bf16, "memory_bytes": cpu.memory,
                             "threads": torch.get_num_threads(), "cuda": torch.version.cuda, "gpus": []}  # fmt: skip
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        arch = f"sm_{gpu.major}{gpu.minor}"
        found["gpus"].append({"name": gpu.name, "arch": arch, "memory_bytes": gpu.total_memory})
    return found


def kernels() -> dict[str, str]:
    """Backend -> why it cannot run on this machine, found by trying; empty where it can."""
    if installed("torch") is None:
        return {}
    from moesaic.kernels.registry import local_catalogue

    device = "cuda" if hardware()["gpus"] else "cpu"
    found: dict[str, str] = {}
    for contract in local_catalogue():
        if contract.built:
            other = f"needs {', '.join(sorted(contract.devices))}" if device not in contract.devices else ""
            found[contract.backend] = contract.broken or other
    return found


def show(report: dict[str, Any]) -> None:
    print(f"moesaic {report['moesaic']}, Python {report['python']}, {report['system']}")
    machine = report["hardware"]
    if machine:
        bf16 = "with" if machine["native_bf16"] else "without"
        print(f"processor: {machine['cpu']}, {machine['threads']} threads, {bf16} BF16 products, "
              f"{machine['memory_bytes'] / 2**30:.1f} GiB free")  # fmt: skip
        for gpu in machine["gpus"]:
            print(f"GPU: {gpu['name']} ({gpu['arch']}), {gpu['memory_bytes'] / 2**30:.1f} GiB")
        if not machine["gpus"]:
            why = "this torch has no CUDA" if machine["cuda"] is None else "torch finds none: check the driver"
            print(f"GPU: none ({why})")
        for name, why in report["kernels"].items():
            print(f"kernels {name}: {why or 'can run here'}")
    for name, each in report["packages"].items():
        state = each["version"] or "missing"
        tail = "" if each["version"] else f"; {each['remedy']}"
        print(f"  {name:<18} {state:<14} {each['enables']}{tail}")
    for problem in report["problems"]:
        print(f"problem: {problem}")
    if not report["problems"]:
        print("no problems")
