"""Gate product and expert choice in one launch (gate.cu): compiled, and run on the CPU's stand-in of Hopper."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.models import MODELS
from moesaic.contracts.plan import Wishes
from moesaic.contracts.spec import RouterSpec
from moesaic.hardware import GPUS
from moesaic.kernels import hopper, triton
from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper import gate
from moesaic.kernels._hopper.gate import Cut, GateC, Variant
from moesaic.kernels.registry import Kernels, catalogue
from moesaic.models.build import plan_here, spec_of
from moesaic.moe.dispatch import contracts
from tests.hopper_gate import SPECS, check_gate, check_ties_and_nan
from tests.hopper_layout import check_layouts
from tests.hopper_machine import machine
from tests.native_support import needs_compiler
from tests.test_hopper import compiler, dump
from tests.triton_support import randn

__all__ = ["compiler", "machine"]
QWEN = SPECS[0]


@pytest.mark.parametrize("variant", [Variant(4, 1), Variant(4, 4), Variant(8, 2), Variant(8, 4)], ids=str)
def test_compiles(variant: Variant, tmp_path: Path) -> None:
    image = code.machine_code(variant.defines, main="gate.cu")
    used = re.search(r"Function gate:\s*REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage", image, tmp_path))
    assert used is not None
    registers, stack = map(int, used.groups())
    assert registers * gate.WARPS * 32 <= 65536
    assert stack == 0, "registers spill"
    text = dump("-sass", image, tmp_path)
    assert "HMMA.1688.F32.TF32" in text
    assert text.index("LDG.E.128") < text.index("ACQBULK"), "weights are asked for before the kernel in front has ended"


def test_arguments_lie_as_the_source_has_them() -> None:
    check_layouts({"Gate": GateC}, "gate.cu", Variant(4, 2).defines)


@pytest.mark.parametrize(("tokens", "experts", "hidden", "cut"), [
    (1, 128, 2048, Cut(8, 2, 16)), (48, 128, 2048, Cut(8, 2, 16)), (49, 128, 2048, Cut(8, 1, 8)),
    (64, 128, 4096, Cut(8, 1, 8)), (65, 128, 2048, None), (4, 128, 4096, Cut(8, 2, 16)), (4, 8, 4096, Cut(1, 8, 8)),
    (4, 32, 2880, Cut(2, 4, 8)), (4, 160, 5120, None), (4, 160, 4096, None), (4, 160, 2048, Cut(10, 1, 16)),
    (64, 256, 2048, None), (4, 256, 7168, None), (4, 64, 2048, Cut(4, 4, 16)), (1, 1, 64, Cut(1, 1, 1)),
    (4, 128, 2080, None), (4, 257, 2048, None),
])  # fmt: skip
def test_how_a_cluster_shares_a_product(tokens: int, experts: int, hidden: int, cut: Cut | None) -> None:
    x, w = torch.empty(tokens, hidden, dtype=torch.bfloat16), torch.empty(experts, hidden)
    assert gate.cut_of(x, w, None, replace(QWEN, experts=experts, top_k=1)) == cut
    assert cut is None or cut.tiles * cut.splits <= cut.blocks <= gate.MOST_BLOCKS


def test_what_is_left_to_triton() -> None:
    x, w, bias = torch.empty(4, 128, dtype=torch.bfloat16), torch.empty(128, 128), torch.empty(128)
    assert gate.cut_of(x, w, bias, QWEN)
    for what, (rows, weights, logit_bias, spec) in {
        "rows in FP32": (x.float(), w, None, QWEN), "weights in BF16": (x, w.bfloat16(), None, QWEN),
        "a bias in BF16": (x, w, bias.bfloat16(), QWEN), "no rows": (x[:0], w, None, QWEN),
        "many rows": (x.repeat(17, 1), w, None, QWEN), "groups": (x, w, None, replace(QWEN, groups=4, top_groups=2)),
        "33 choices": (x, w, None, replace(QWEN, top_k=33)), "rows that lie askew": (x[:, :64].t(), w, None, QWEN),
        "off 16 bytes": (torch.empty(4, 132, dtype=torch.bfloat16)[:, 2:130], w, None, QWEN),
    }.items():  # fmt: skip
        assert gate.cut_of(rows, weights, logit_bias, spec) is None, what
    assert hopper.gate(randn(3, 192), torch.randn(16, 192).bfloat16(), None, None, RouterSpec(16, 4, "softmax", "w"))


@pytest.mark.parametrize(("router", "backend"), [("float32", hopper), ("bfloat16", None)])
def test_plans_take_it(router: str, backend: ModuleType | None) -> None:
    """Where Triton chooses experts otherwise, in each cell; not for gates in BF16, which are one of Triton's ops."""
    spec = spec_of(MODELS["qwen3-30b-a3b"])
    own = tuple(each for each in catalogue() if each.backend in ("hopper", "triton", "reference"))
    wishes = Wishes(router_dtype=router)
    kernels = Kernels(plan_here(spec, GPUS["h100"], "bfloat16", wishes, (*own, *contracts())))
    cells = kernels.mixture(0)
    assert {cell.phase for cell in cells} == {"prefill", "decode"}
    assert all(cell.ops.gate is (backend or triton).gate for cell in cells)


@pytest.mark.usefixtures("machine")
@needs_compiler
@pytest.mark.parametrize(
    "spec", [*SPECS[:3], *(pytest.param(spec, marks=pytest.mark.long) for spec in SPECS[3:])], ids=str
)
def test_gate(spec: RouterSpec) -> None:
    """Rows that fill no cluster and more than one; K that no, one or several steps of a warp are."""
    for tokens, hidden in ((1, 64), (3, 2112), (9, 640)):
        check_gate(spec, tokens, hidden)
    check_ties_and_nan(spec)
