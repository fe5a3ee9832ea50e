"""The tables and drawings of docs/gpu.md, from results made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from scripts import draw_gpu, gpu_tables

ABOUT = {"device": "NVIDIA H100", "commit": "abc", "versions": {"torch": "2", "triton": "3"}}
STEP = {"batch": 1, "context": 1024, "step_ms": 2.5, "floor_ms": 1.25, "step_over_floor": 2.0, "tokens_per_s": 400.0,
        "experts_touched": 0.0625, "idle": 0.05, "kernels": 530}  # fmt: skip
PROMPTS = {"prompts": 8, "length": 4096, "tokens_per_s": 1e5, "tflops": 600.0, "of_fp8_peak": 0.48}
FAILED = {"batch": 64, "error": "RuntimeError()"}
RESULTS: dict[str, dict[str, Any]] = {
    "throughput-qwen-fp8": {"model": "qwen", "scheme": "fp8", "kv": "bf16", "prompts": [PROMPTS],
                            "first": [{"length": 64, "ms": 5.04}, {"length": 9, "error": "RuntimeError()"}],
                            "rows": [STEP, FAILED, {**STEP, "batch": 16, "step_over_floor": 1.0}]},
    "experts-small": {"rows": [{"shape": "E8", "scheme": s, "backend": "triton", "tokens": n, "ms": 0.1, "share": share}
                               for s, n, share in (("fp8", 64, 0.5), ("fp8", 1, 0.25), ("bf16", 1, 0.75))]},
    "gemm": {"rows": [{"shape": "qkv", "scheme": "fp8", "backend": "triton", "tokens": 1, "ms": 0.2, "share": 0.9}]},
    "route": {"rows": [{"router": "E128", "tokens": 1, "gate_fp32": 1.0, "gate_bf16": 2.0, "route": 3.0, "sort": 4.0,
                        "route_sort": 5.0}]},
    "attention": {"rows": [{"what": "GQA", "phase": "decode", "cache": "fp8", "sequences": 1, "length": 9, "ms": 1.0,
                            "floor_ms": 0.5, "share": 0.5}]},
    "schemes": {"kv": "bf16", "limit": 3, "rows": [
        {"scheme": "fp8", "right": 3, "count": 4, "kl": 1e-5, "kl_error": 1e-6, "cpu_kl": 2e-5, "agrees": False},
        {"scheme": "int9", "error": "no such thing"}]},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, result in RESULTS.items():
        (tmp_path / f"{name}-h100-80gb-hbm3.json").write_text(json.dumps(ABOUT | result))
    (tmp_path / "throughput-cpu.json").write_text("not of a GPU, and not read")
    return tmp_path


def test_every_result_is_in_its_table(folder: Path) -> None:
    found = gpu_tables.tables(folder)
    assert "| 1 | 1024 | 2.500 | 1.250 | 2.00 | 400 | 6% | 5.0% | 530 |" in found["gpu-throughput"]
    assert "| 64 |" not in found["gpu-throughput"], "a row that failed"
    assert "first token: 64 tokens 5.0 ms." in found["gpu-throughput"]
    assert "600 TFLOPS" in found["gpu-throughput"]
    assert "| E8 | fp8 | triton | 0.1000 (0.25) | 0.1000 (0.50) |" in found["gpu-experts"]
    assert "| E8 | bf16 | triton | 0.1000 (0.75) |  |" in found["gpu-experts"]
    assert "| qkv | fp8 | triton | 0.2000 (0.90) |" in found["gpu-gemm"]
    assert "| E128 | 1 | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 |" in found["gpu-route"]
    assert "| GQA | triton | decode | fp8 | 1 | 9 | 1.0000 | 0.5000 | 0.50 |" in found["gpu-attention"]
    assert "| 1.0e-05 ± 1e-06 | 2.0e-05 | **no** |" in found["gpu-schemes"]
    assert "no such thing" in found["gpu-schemes"]
    assert "](gpu-steps.svg)" in found["gpu-throughput"]
    assert all("NVIDIA H100, torch 2, Triton 3, commit abc" in table for table in found.values())


def test_devices_stand_beside_each_other(folder: Path) -> None:
    """A faster card hides nothing of a slower one, whatever the files are called."""
    rows = [{**row, "ms": 0.05, "share": 0.4} for row in RESULTS["experts-small"]["rows"]]
    (folder / "experts-early-h200.json").write_text(json.dumps({**ABOUT, "device": "NVIDIA H200", "rows": rows}))
    table = gpu_tables.tables(folder)["gpu-experts"]
    assert table.index("](gpu-experts.svg)") < table.index("](gpu-experts-h200.svg)")
    assert table.index("| E8 | fp8 | triton | 0.1000 (0.25) | 0.1000 (0.50) |") < table.index("0.0500 (0.40)")
    assert set(gpu_tables.drawings(folder)) == {"gpu-steps.svg", "gpu-experts.svg", "gpu-experts-h200.svg"}


def test_products_alone_are_told_from_those_with_encoding(folder: Path) -> None:
    """Last, however their file is called."""
    rows = [{**row, "ms": 0.1} for row in RESULTS["gemm"]["rows"]]
    (folder / "gemm-alone-h100-80gb-hbm3.json").write_text(json.dumps({**ABOUT, "terms": True, "rows": rows}))
    encoded, alone = gpu_tables.tables(folder)["gpu-gemm"].split("products alone")
    assert "encoding included. NVIDIA H100" in encoded
    assert "| qkv | fp8 | triton | 0.2000 (0.90) |" in encoded
    assert "| qkv | fp8 | triton | 0.1000 (0.90) |" in alone


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    assert set(gpu_tables.tables(tmp_path).values()) == {"Not measured yet."}
    assert gpu_tables.drawings(tmp_path) == {}


def test_curves_are_where_their_numbers_are(folder: Path) -> None:
    made = gpu_tables.drawings(folder)
    assert made == gpu_tables.drawings(folder)
    steps, experts = (ElementTree.fromstring(made[name]) for name in ("gpu-steps.svg", "gpu-experts.svg"))
    height, width = draw_gpu.HEIGHT, draw_gpu.WIDTH
    assert curves(steps)[0] == [(0.0, height / 2), (width, 3 * height / 4)], "2 and 1 of 4"
    assert curves(steps)[1] == [(0.0, 3 * height / 4), (width, 3 * height / 4)], "5% of 20%"
    assert curves(experts) == [[(0.0, 3 * height / 4), (width, height / 2)], [(width / 2, height / 4)]], "by tokens"


def curves(picture: ElementTree.Element) -> list[list[tuple[float, float]]]:
    paths = (each for each in picture.iter() if each.tag.endswith("path") and each.get("fill") == "none")
    texts = (path.attrib["d"][1:].split("L") for path in paths)
    return [[(float(point.split()[0]), float(point.split()[1])) for point in text] for text in texts]


def test_names_do_not_lie_on_one_another() -> None:
    found = draw_gpu.spread([50.0, 10.0, 12.0, 11.0])
    assert found == [50.0, 10.0, 36.0, 23.0]
