"""Is what a checkpoint stored a number? Found while loading, named by field, without a wide copy of the data.

Codes are checked as integers, by their extremes: E4M3's NaNs are 0x7F, the largest as INT8, and 0xFF, the largest as
UINT8; a UINT8 above 0x80 is a negative E4M3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.errors import CheckpointError

_LARGEST = {"fp8_tensor": 448.0, "fp8_channel": 448.0, "fp8_block": 448.0, "nvfp4": 448.0 * 6, "int4": 15.0}
"""By format: what its FP32, BF16 or FP16 scales are multiplied by at most; the product must be finite in FP32."""


def check_parts(name: str, parts: Mapping[str, Tensor], where: str | None) -> None:
    """The fields of format `name`. Raises CheckpointError for the first that holds what it must not.

    An unquantised weight is not looked at: its values are the model's business.
    """
    if name == "bf16":
        return
    for field, part in parts.items():
        if part.numel() and (fault := _fault(name, field, part)):
            raise CheckpointError(
                f"the {field} of a weight in {name} {fault}",
                where=where,
                remedy="The file is damaged, or was written in another format than its configuration says.",
            )


def _fault(name: str, field: str, part: Tensor) -> str | None:
    if part.dtype == torch.float8_e4m3fn:
        return _fault_e4m3(part, signed=field == "data")
    if part.dtype == torch.uint8:
        if field == "scale" and part.amax().item() == 255:
            return "holds 255, the NaN of UE8M0"
        return "holds a code above 15" if field == "zero" and part.amax().item() > 15 else None
    low, high = (each.item() for each in part.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):  # aminmax returns NaN where there is one
        return "holds Inf or NaN"
    if low < 0:
        return f"holds a negative number, {low:g}"
    limit = torch.finfo(torch.float32).max / _LARGEST[name]
    return f"holds {high:g}: its products overflow FP32" if high > limit else None


def _fault_e4m3(part: Tensor, signed: bool) -> str | None:
    if part.view(torch.int8).amax().item() == 0x7F or part.view(torch.uint8).amax().item() == 0xFF:
        return "holds NaN"
    if not signed and part.view(torch.uint8).amax().item() > 0x80:
        return "holds a negative number"
    return None
