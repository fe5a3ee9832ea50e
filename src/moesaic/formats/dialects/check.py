"""What the numbers of a quantised checkpoint may be. A scale that is not one is an error here, not noise in an answer.

Refused: NaN codes in the data; scales that are negative, infinite or NaN; an input scale of zero, since activations are
divided by it; zero points beyond 15. A weight's scale may be zero: blocks of zeros, or of tiny weights, have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import CheckpointError


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
        _check_scale(name, value, positive=field == "input_scale")


def _check_scale(name: str, value: Tensor, *, positive: bool) -> None:
    wide = value.float()
    low, high = torch.aminmax(wide)  # NaN comes through both
    if bool((low >= 0) & (high < torch.inf)) and not (positive and bool(low == 0)):
        return
    what = "an input scale that is not positive and finite" if positive else "a scale that is negative or not finite"
    wrong = ~((wide >= 0) & (wide < torch.inf)) | (positive & (wide == 0))
    _refuse(name, wrong, wide, what)


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
