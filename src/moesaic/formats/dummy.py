"""Random weights in any format, made in place on their own device: for benchmarks and `--load-format dummy`.

Codes are random bits, which cost the most power to move; scales bring products of unit rows to about unit size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.formats.base import QuantTensor

SPREAD = {"bf16": 1.0, "mxfp4": 2.9, "nvfp4": 2.9 * 2.5, "int4": 4.2}
"""Root mean square of random codes (of NVFP4: times its random block scales); of E4M3 about 100."""


def fill(w: QuantTensor, gain: float = 1.0) -> QuantTensor:
    """Overwrites the fields of a weight. gain: norm of a product's row over norm of the row; NaN codes never occur.

    Nor does INT4's lowest code: the others' mean is 0. Else all rows' products would have a part in common, which
    chooses the same experts for all of them.
    """
    size = gain / (SPREAD.get(w.form.name, 100.0) * math.sqrt(w.columns))
    for name, part in w.parts.items():
        if name == "data":
            fill_codes(part, size)
            if w.form.name == "int4":
                for some in part.split(1 if part.dim() > 2 else 1 << 14):  # few bytes at a time
                    for nibble, middle in ((0x0F, 0x08), (0xF0, 0x80)):
                        some.bitwise_or_((some & nibble == 0).to(torch.uint8) * middle)
        elif part.dtype == torch.uint8:
            middle = 8 if name == "zero" else 127 + round(math.log2(size))
            part.random_(middle - 2, middle + 3)
        elif part.dtype == torch.float8_e4m3fn:
            part.view(torch.uint8).random_(0x38, 0x48)  # 1 to 4
        else:
            part.uniform_(0.7 * size, 1.3 * size)
    return w


def fill_codes(data: Tensor, size: float) -> None:
    """E4M3: any finite value. Bytes of 4-bit codes: any. Plain weights: normal numbers of a standard deviation."""
    if data.dtype == torch.uint8:
        data.random_(0, 256)
    elif data.dtype == torch.float8_e4m3fn:
        codes = data.view(torch.uint8).random_(0, 254)
        codes.add_(codes >= 127)  # 127 and 255 are the NaNs
    else:
        data.normal_(0, size)
