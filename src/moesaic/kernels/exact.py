"""Encoded rows as BF16 numbers, for kernels that multiply them so."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.formats import mx, nv
from moesaic.formats.encodings import Rows


def exact(x: Rows) -> Tensor:
    """The BF16 numbers that codes and block scales of MXFP8 or NVFP4 stand for: made with the codes by our own encoder,
    decoded here where rows come from elsewhere. A tensor-wide scale is left out."""
    if "exact" in x.parts:
        return x.parts["exact"]
    if x.encoding.name == "mxfp8":
        return mx.dequantize(x.data.float(), x.parts["scale"]).bfloat16()
    return nv.dequantize(x.data, x.parts["scale"], torch.ones((), device=x.data.device)).bfloat16()
