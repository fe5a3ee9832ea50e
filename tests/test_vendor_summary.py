"""What scripts/gpu_vendor.sh prints last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.vendor_summary import summary

XML = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
<testcase name="test_a[fp8]"><failure message="AssertionError: first product: 3 rows&#10;more">text</failure></testcase>
<testcase name="test_b"><properties><property name="bits" value="True"/></properties></testcase>
<testcase name="test_c"><skipped message="none"/></testcase></testsuite></testsuites>"""


def row(backend: str, encoding: str, ms: float, **more: Any) -> dict[str, Any]:
    return {"shape": "E8", "format": "mxfp4", "encoding": encoding, "scheme": "s", "backend": backend, "tokens": 4,
            "ms": ms, "share": 0.5} | more  # fmt: skip


def test_summary(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(XML)
    broken = {"shape": "E8", "scheme": "fp8", "format": "fp8_block", "backend": "deep_gemm", "error": "no nvcc"}
    rows = [row("triton", "bf16", 0.4), row("triton", "mxfp8", 0.3), row("humming", "bf16", 0.6),
            row("humming", "fp8_group128", 0.15), row("triton", "bf16", 0.2, tokens=8), broken]  # fmt: skip
    (tmp_path / "experts-backends-small-h100.json").write_text(json.dumps({"rows": rows}))
    assert list(summary(tmp_path)) == [
        "tests: 3 tests, 1 failures, 0 errors, 1 skipped",
        "  test_a[fp8]: AssertionError: first product: 3 rows",
        "  bits: True",
        "E8 mxfp4 4: triton mxfp8 0.3000 (0.50), humming fp8_group128 0.1500 (0.50), 0.50",
        "E8 mxfp4 8: triton bf16 0.2000 (0.50)",
        "failed: E8 fp8 deep_gemm: no nvcc",
    ]


def test_nothing_to_tell(tmp_path: Path) -> None:
    assert list(summary(tmp_path)) == []
