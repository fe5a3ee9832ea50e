"""What Humming is told of a format and an encoding, and in which order it then reads the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesaic.contracts.scheme import Encoding, WeightFormat
from moesaic.kernels._humming.layout import Order

PLAIN = frozenset({"bf16", "mxfp8", "nvfp4"})
"""Encodings whose rows are multiplied as BF16 numbers."""
PAIRS = frozenset({
    ("mxfp8", "bf16"), ("mxfp8", "mxfp8"), ("mxfp4", "bf16"), ("mxfp4", "mxfp8"), ("nvfp4", "bf16"),
    ("nvfp4", "nvfp4"), ("int4", "bf16"), ("int4", "fp8_token"), ("int4", "fp8_tensor"), ("fp8_block", "bf16"),
    ("fp8_block", "fp8_group128"), ("mxfp8", "fp8_token"), ("mxfp4", "fp8_token"), ("mxfp4", "fp8_group128"),
})  # fmt: skip
_WEIGHTS: dict[str, dict[str, Any]] = {
    "mxfp8": {"b_dtype": "float8e4m3", "bs_dtype": "float8e8m0", "weight_scale_group_size": 32},
    "mxfp4": {"b_dtype": "float4e2m1", "bs_dtype": "float8e8m0", "weight_scale_group_size": 32},
    "nvfp4": {"b_dtype": "float4e2m1", "bs_dtype": "float8e4m3", "weight_scale_group_size": 16},
    "int4": {"b_dtype": "uint4", "bs_dtype": "bfloat16"},
    "fp8_block": {"b_dtype": "float8e4m3", "bs_dtype": "float32", "weight_scale_group_size": 128,
                  "weight_scale_group_size_n": 128},
}  # fmt: skip
_ROWS: dict[str, dict[str, Any]] = {
    "fp8_token": {"input_quant_mode": "dynamic_token"},
    "fp8_tensor": {"input_quant_mode": "static_tensor"},
    "fp8_group128": {"input_quant_mode": "dynamic_group", "input_scale_group_size": 128},
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """group: of INT4.  rows: the encoding, `bf16` for all that are multiplied so."""

    form: str
    group: int
    rows: str

    @property
    def order(self) -> Order:
        bits = 8 if self.form in ("mxfp8", "fp8_block") else 4
        if self.rows == "bf16":
            return Order(bits, 16)
        if bits == 8:
            return Order(8, 8, flat=True)
        if self.form == "int4":
            wide = self.group == 128
            return Order(4, 8, long=wide, transposed=wide, folded=True)
        return Order(4, 8, long=self.rows == "fp8_group128", signs=True)

    @property
    def folds(self) -> bool:
        """Whether exponents of block scales are added to those of codes, within reach of one exponent per expert."""
        return self.order.signs

    def layer(self) -> dict[str, Any]:
        """The library's options."""
        group = {"weight_scale_group_size": self.group} if self.form == "int4" else {}
        rows = _ROWS.get(self.rows, {})
        return {"a_dtype": "float8e4m3" if rows else "bfloat16", **_WEIGHTS[self.form], **group, **rows}


def recipe_of(form: WeightFormat, encoding: Encoding) -> Recipe:
    return Recipe(form.name, form.group, "bf16" if encoding.name in PLAIN else encoding.name)
