"""The Triton kernels compiled ahead of time for Hopper and Blackwell: the second of their rings; see triton_ahead.py.

In a process of its own, since Triton decides for a whole process whether it interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
SHARED = 227 * 1024
"""Bytes of shared memory that one program can have, on both."""
USUAL = ("row wise", "gate", "grouped decode", "latent decode", "experts fp8 64", "experts mxfp8 64", "fused fp8 64",
         "fused latent fp8", "invariant fp8")  # fmt: skip
EIGHT = {"fp8", "fp8_tensor", "fp8_tensor_static", "fp8_channel", "w4afp8", "w4afp8_static", "w4afp8_token"}
"""Schemes whose products are FP8's; all others are BF16's."""


def compiled(arch: int, cases: tuple[str, ...]) -> list[dict[str, Any]]:
    """What triton_ahead.py reports of some cases; of all of them where none is named."""
    return [json.loads(line) for line in said("tests/triton_ahead.py", str(arch), *cases).splitlines()]


def said(program: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, str(ROOT / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_step_with_static_scales_is_compiled_before_it_is_measured() -> None:
    """Rows are encoded by the kernel in front of a product, as they are with weights: one launch less per layer."""
    assert "675 kernels" in said("benchmarks/warm.py", "qwen3-30b-a3b", "nvfp4", "bf16", "8x1")


def check(found: list[dict[str, Any]], arch: int) -> None:
    """Fits the machine, spills little, and multiplies on the tensor core, in the operands that the scheme promises."""
    for each in found:
        assert each["shared"] <= SHARED, each
        assert each["registers"] * each["warps"] * 32 <= 65536, each
        assert each["stack"] <= 256, each
        waits, early = each["pdl"]
        assert waits == early, f"a kernel that starts early must wait, and only one that waits may start early: {each}"
        assert early or not each["case"].startswith("fused"), f"nothing hides the launch of {each}"
        if each["kernel"] in ("expert_kernel", "linear_kernel", "attention_kernel"):
            assert each["products"], each
        if each["kernel"] in ("expert_kernel", "linear_kernel") and arch == 90:
            scheme = each["case"].split()[1] if each["case"] != "oai" else "mxfp4"
            operand = "e4m3" if scheme in EIGHT else "bf16"
            assert all(product.split()[1] == operand for product in each["products"]), each


@pytest.mark.parametrize("arch", [90, 100])
def test_the_usual_kernels(arch: int) -> None:
    found = compiled(arch, USUAL if arch == 90 else USUAL[3:6])
    assert len(found) >= (10 if arch == 90 else 5)
    check(found, arch)
    if arch == 90:
        large = [each for each in found if each["case"] == "experts fp8 64" and each["kernel"] == "expert_kernel"]
        assert all(product.startswith("wgmma") for each in large for product in each["products"])


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [90, 100])
def test_every_kernel(arch: int) -> None:
    check(compiled(arch, ()), arch)
