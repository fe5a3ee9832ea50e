"""From one encoding to another, where a dispatcher delivers what the next kernel does not take.

Legend: E experts, C slots per expert, H columns, G groups of 128 along H, R rows in use.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.formats import blocks, e4m3
from moesaic.formats.encodings.fp8_group128 import GROUP


def requantize_slots(
    data_ECH: Tensor, scale_ECG: Tensor, counts_E: Tensor, scale: Tensor, out_ECH: Tensor | None = None
) -> Tensor:
    """Slots in `fp8_group128` -> `fp8_tensor` with one static scale: codes = E4M3(data x group scale / scale).

    data: E4M3. scale_ECG: FP32, any strides. counts_E: integers; only the first counts[e] rows of expert e are read
    or written. scale: FP32 scalar. out: E4M3, may be data itself; default: a copy of data.
    Lossy: every value is rounded again. Raises UnsupportedError for shapes, dtypes or counts that do not fit,
    CheckpointError for a scale that is not a positive finite number.
    """
    _check(data_ECH, scale_ECG, counts_E, scale, out_ECH)
    out = data_ECH.clone() if out_ECH is None else out_ECH
    slots = torch.arange(data_ECH.shape[1], device=data_ECH.device)
    expert_R, slot_R = (slots < counts_E[:, None]).nonzero(as_tuple=True)
    data_RH, scale_RG = _bytes(data_ECH)[expert_R, slot_R].view(torch.float8_e4m3fn), scale_ECG[expert_R, slot_R]
    groups_RGJ = blocks.split(data_RH.float(), GROUP).mul_(scale_RG[..., None])
    codes_RH = e4m3.cast(groups_RGJ.div_(scale)).flatten(-2)
    _bytes(out)[expert_R, slot_R] = _bytes(codes_RH)
    return out


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)  # indexing is not implemented for E4M3 everywhere


def _check(data: Tensor, scales: Tensor, counts: Tensor, scale: Tensor, out: Tensor | None) -> None:
    where = "requantize_slots"
    if data.ndim != 3 or data.dtype != torch.float8_e4m3fn:
        raise UnsupportedError(f"slots are E4M3 [E, C, H], not {data.dtype} {list(data.shape)}", where=where)
    experts, capacity, width = data.shape
    if width % GROUP:
        raise UnsupportedError(f"rows of {width} columns are not whole groups of {GROUP}", where=where)
    if scales.dtype != torch.float32 or scales.shape != (experts, capacity, width // GROUP):
        want = f"FP32 {[experts, capacity, width // GROUP]}"
        raise UnsupportedError(f"group scales are {want}, not {scales.dtype} {list(scales.shape)}", where=where)
    if counts.shape != (experts,) or counts.is_floating_point():
        raise UnsupportedError(f"counts are {experts} integers, not {counts.dtype} {list(counts.shape)}", where=where)
    if experts and not 0 <= int(counts.min()) <= int(counts.max()) <= capacity:
        raise UnsupportedError(
            f"counts from {int(counts.min())} to {int(counts.max())}, for {capacity} slots", where=where
        )
    if out is not None and (out.shape != data.shape or out.dtype != data.dtype):
        raise UnsupportedError(f"out is {out.dtype} {list(out.shape)}, unlike the slots", where=where)
    if scale.numel() != 1 or not (math.isfinite(value := scale.item()) and value > 0):
        raise CheckpointError(f"a static scale of {scale.tolist()} is not a positive number", where=where)
