"""The CUDA C++ kernel for prompts without a GPU: it compiles for sm_90a, in registers alone, and fits.

What it computes is tested on a GPU (test_hopper_prompt_gpu.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from moesaic.kernels._hopper import attend_prompt
from moesaic.kernels._hopper.attend_prompt import Variant
from moesaic.kernels._triton.attend_paged import Heads, Tables
from moesaic.kernels.ops import KVView
from tests.hopper_layout import check_layouts
from tests.test_hopper import compiler, dump

__all__ = ["compiler"]


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("size", attend_prompt.SIZES)
def test_compiles_without_spills(size: int, turns: bool, tmp_path: Path) -> None:
    image = attend_prompt.machine_code(Variant(size, turns))
    used = re.search(r"Function attend_prompt:\s*REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage", image, tmp_path))
    assert used is not None
    registers, stack = map(int, used.groups())
    assert stack == 0, "registers spill"
    assert registers * 128 * 3 <= 65536
    text = dump("-sass", image, tmp_path)
    assert "USETMAXREG" in text, "registers move from the warp that fetches to those that compute"
    assert "UTMALDG.2D" in text
    assert "tnspB" in text
    steps = re.findall(r"\b(MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x0)", loop(text))
    before = steps[: steps.index("WARPGROUP.DEPBAR.LE gsb0, 0x0")]
    assert before.count("MUFU.EX2") >= attend_prompt.TILE // 2, "exponentials run beside products"


def loop(text: str) -> str:
    """Machine code from the first wait that leaves a product running."""
    return text[text.index("WARPGROUP.DEPBAR.LE gsb0, 0x1") :]


def test_arguments_lie_as_the_source_has_them() -> None:
    products = {"products.cuh": attend_prompt.products(128, 128)}
    check_layouts({"Prompts": attend_prompt.Prompts}, "attend_prompt.cu", Variant(128).defines, products)


def test_what_it_serves() -> None:
    def served(size: int = 128, block: int = 16, dtype: torch.dtype = torch.bfloat16,
               view: KVView | None = None) -> bool:  # fmt: skip
        view = view or KVView(2, size, 2 * size, size)
        q = torch.empty(9, 8, view.key_dim, dtype=dtype)
        width = view.parts.fp8_bytes if dtype == torch.uint8 else view.value_at + view.kv_heads * view.value_dim
        pool = torch.empty(64, width, dtype=dtype)
        q = q if dtype != torch.uint8 else q.bfloat16()
        tables = Tables(torch.zeros(1, 4, dtype=torch.int32), block, torch.zeros(1, 3, dtype=torch.int64), 1, 9)
        return attend_prompt.serves(q, Heads.of(pool, view), tables)

    assert served()
    assert served(64)
    assert served(block=64)
    assert not served(96)
    assert not served(256)
    assert not served(block=1), "rows one by one take the copy engine too long"
    assert not served(block=24), "pages are found by shifts"
    assert not served(dtype=torch.float16)
    assert not served(dtype=torch.uint8), "an FP8 cache"
    assert not served(view=KVView(1, 576, 0, 512)), "latents"
