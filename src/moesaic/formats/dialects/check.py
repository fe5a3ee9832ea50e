"""What the numbers of a quantised checkpoint may be. A scale that is not one is an error here, not noise in an answer.

Refused: NaN codes in the data; scales that are negative, infinite or NaN; a zero where one scale stands for a whole
tensor, since kernels divide by it; zero points beyond 15. A zero *block* scale is legal: a block of tiny weights
rounds to it, and its values are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import CheckpointError

_SINGLE = ("global_scale", "input_scale")


def check_field(name: str, field: str | None, value: Tensor) -> None:
    """value: a canonical field (see `formats/base.py`).  name: the checkpoint tensor, for the error.

    Raises CheckpointError naming the tensor and the first element that is out of range.
    """
    if field is None or value.numel() == 0:
        return
    if field == "data":
        _refuse(name, _bad_data(value), value, "a NaN or infinite weight")
    elif field == "zero":
        _refuse(name, value > 15, value, "a zero point beyond 15")
    elif value.dtype == torch.uint8:
        _refuse(name, value == 255, value, "a scale of 255, which is NaN")
    else:
        _check_scale(name, value, positive=field in _SINGLE or (field == "scale" and value.numel() == 1))


def _check_scale(name: str, value: Tensor, *, positive: bool) -> None:
    wide = value.float()
    low, high = torch.aminmax(wide)  # NaN comes through both
    if bool((low >= 0) & (high < torch.inf)) and not (positive and bool(low == 0)):
        return
    wrong = ~((wide >= 0) & (wide < torch.inf)) | (positive & (wide == 0))
    _refuse(name, wrong, wide, "a scale that is not a positive number" if positive else "a scale that is no number >= 0")


def _bad_data(value: Tensor) -> Tensor | None:
    if value.dtype == torch.float8_e4m3fn:
        return (value.view(torch.uint8) & 0x7F) == 0x7F
    return ~torch.isfinite(value) if value.is_floating_point() else None


def _refuse(name: str, wrong: Tensor | None, value: Tensor, what: str) -> None:
    if wrong is None or not bool(wrong.any()):
        return
    at = wrong.nonzero()[0].tolist()
    raise CheckpointError(
        f"element {at} is {what} ({float(value[tuple(at)]):g})",
        where=name,
        remedy="Download the checkpoint again; if it stays so, the file was written wrong.",
    )
