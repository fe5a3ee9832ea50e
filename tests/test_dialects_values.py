"""Numbers that no quantiser writes, and tensors that are not what the config means: found, and named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.formats.checkpoint import FusedSource, check_field
from tests import dialect_cases as cases
from tests.dialect_cases import compressed, group
from tests.dialect_load import NAME, load

E4M3 = torch.float8_e4m3fn
PACKED = compressed("pack-quantized", [], group({**cases.INT4_G32, "symmetric": False}))
NVFP4 = compressed("nvfp4-pack-quantized", [], group(cases.NV4, {**cases.NV4, "dynamic": "local"}))


def e4m3(*codes: int) -> Tensor:
    return torch.tensor(codes, dtype=torch.uint8).view(E4M3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", e4m3(0, 1, 0x7F)), ("data", e4m3(0xFF)), ("data", torch.tensor([[1.0], [math.nan]])),
        ("data", torch.tensor([math.inf]).bfloat16()), ("scale", torch.tensor([[1.0, -1.0]])),
        ("scale", torch.tensor([math.nan])), ("scale", torch.tensor([-math.inf])), ("scale", torch.tensor([math.inf])),
        ("scale", torch.tensor([1.0, math.nan]).bfloat16()), ("scale", e4m3(0x38, 0x7F)), ("scale", e4m3(0xB8)),
        ("scale", torch.tensor([0, 254, 255], dtype=torch.uint8)), ("global_scale", torch.tensor([-1e-9])),
        ("global_scale", torch.tensor([math.inf])), ("input_scale", torch.tensor([0.0])),
        ("input_scale", torch.tensor([math.nan])), ("zero", torch.tensor([[15, 16]], dtype=torch.uint8)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(field: str, value: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"layer\.9\.weight: element \[") as caught:
        check_field("layer.9.weight", field, value)
    assert caught.value.remedy


def test_the_first_bad_element_is_shown() -> None:
    value = torch.ones(3, 5)
    value[1, 4] = value[2, 0] = -2
    with pytest.raises(CheckpointError, match=r"element \[1, 4\] .*\(-2\)"):
        check_field("x", "scale", value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", e4m3(*(c for c in range(256) if c & 0x7F != 0x7F))), ("data", torch.arange(256).to(torch.uint8)),
        ("data", torch.tensor([-0.0, 65504.0]).half()), ("scale", torch.tensor([0.0, 1e-45, 3e38])),
        ("scale", e4m3(0, 0x7E)), ("scale", torch.arange(255).to(torch.uint8)), ("scale", torch.empty(0, 4)),
        ("global_scale", torch.tensor([0.0])), ("input_scale", torch.tensor([1e-30])),
        ("zero", torch.arange(16).to(torch.uint8)), (None, torch.tensor([math.nan])),
    ],
)  # fmt: skip
def test_values_in_range_pass(field: str | None, value: Tensor) -> None:
    check_field("x", field, value)


def packed(**changes: Tensor) -> dict[str, Tensor]:
    """A legal asymmetric INT4 projection of 9 rows and 64 columns."""
    return {
        "weight_packed": torch.zeros(9, 8, dtype=torch.int32), "weight_scale": torch.ones(9, 2).bfloat16(),
        "weight_zero_point": torch.zeros(2, 2, dtype=torch.int32), "weight_shape": torch.tensor([9, 64]), **changes,
    }  # fmt: skip


def nvfp4(**changes: Tensor) -> dict[str, Tensor]:
    return {
        "weight_packed": torch.zeros(9, 32, dtype=torch.uint8), "weight_scale": torch.ones(9, 4).to(E4M3),
        "weight_global_scale": torch.ones(1), "input_global_scale": torch.ones(1), **changes,
    }  # fmt: skip


def test_the_legal_ones() -> None:
    assert load(PACKED, packed(), 9, 64)[0].count_nonzero() == 0
    assert load(NVFP4, nvfp4(), 9, 64)[0].count_nonzero() == 0
    in_order = torch.arange(64, dtype=torch.int32) // 32
    load(PACKED, packed(weight_g_idx=in_order), 9, 64)
    load(PACKED, packed(weight_g_idx=torch.full((64,), -1, dtype=torch.int32)), 9, 64)
    without = packed()
    del without["weight_shape"]
    load(PACKED, without, 9, 64)


@pytest.mark.parametrize(
    ("config", "tensors", "tensor", "what"),
    [
        (PACKED, packed(weight_packed=torch.zeros(9, 9, dtype=torch.int32)), "weight_packed", r"\[9, 9\].*\[9, 8\]"),
        (PACKED, packed(weight_packed=torch.zeros(9, 8, dtype=torch.int64)), "weight_packed", "int64"),
        (PACKED, packed(weight_scale=torch.ones(9, 4).bfloat16()), "weight_scale", r"\[9, 4\].*\[9, 2\]"),
        (PACKED, packed(weight_scale=-torch.ones(9, 2).bfloat16()), "weight_scale", "negative"),
        (PACKED, packed(weight_zero_point=torch.zeros(9, 2, dtype=torch.int32)), "weight_zero_point", r"\[9, 2\]"),
        (PACKED, packed(weight_shape=torch.tensor([9, 65])), "weight_shape", r"\[9, 65\].*\[9, 64\]"),
        (PACKED, packed(weight_g_idx=torch.arange(64, dtype=torch.int32) % 2), "weight_g_idx", "permutes"),
        (NVFP4, nvfp4(weight_scale=torch.ones(9, 4)), "weight_scale", "float32.*float8_e4m3fn"),
        (NVFP4, nvfp4(weight_scale=e4m3(*[0x7F] * 36).view(9, 4)), "weight_scale", "nan"),
        (NVFP4, nvfp4(weight_global_scale=torch.zeros(1)), "weight_global_scale", "inf"),
        (NVFP4, nvfp4(input_global_scale=torch.tensor([math.inf])), "input_global_scale", "not positive"),
        (NVFP4, nvfp4(weight_global_scale=torch.ones(2)), "weight_global_scale", r"\[2\].*\[\] or \[1\]"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_what_is_meant(config: Any, tensors: dict[str, Tensor], tensor: str, what: str) -> None:
    with pytest.raises(CheckpointError, match=what) as caught:
        load(config, tensors, 9, 64)
    assert caught.value.where == f"{NAME}.{tensor}"


def test_fused_tensors_are_checked_whole() -> None:
    """Of a bad scale in the last expert, too."""
    source = FusedSource("all_scales", (3, 4, 2), (torch.uint8,), lambda tensor, e: {("down", "scale"): tensor[e]})
    good = torch.full((3, 4, 2), 127, dtype=torch.uint8)
    source.check(good)
    good[2, 3, 1] = 255
    with pytest.raises(CheckpointError, match=r"all_scales: element \[2, 3, 1\]"):
        source.check(good)
    with pytest.raises(CheckpointError, match=r"all_scales: its shape is \[3, 4\]"):
        source.check(good[..., 0])
