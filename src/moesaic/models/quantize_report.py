"""How much quantising changed each weight, and what that sums up to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor

# A code whose value is its block's scale, and half of the widest step between codes (E4M3 ends with steps of 32, E2M1
# with 2, INT4 has 1). A value that is off by more than that lies beyond the outermost code.
_E4M3, _E2M1 = (0x38, 16.0), (0x22, 1.0)
_CODES: Mapping[str, tuple[int, float]] = {
    "fp8_tensor": _E4M3, "fp8_channel": _E4M3, "fp8_block": _E4M3, "mxfp8": _E4M3, "mxfp4": _E2M1, "nvfp4": _E2M1,
    "int4": (0x99, 0.5),
}  # fmt: skip
_TIE = 1 + 2**-16
"""A value half way between two codes is off by half a step, give or take the roundings of a product up to 28 times as
large: three of 2^-24 each, so 2^-17.6 of the half step."""


@dataclass(frozen=True)
class Row:
    """One converted weight. stored, scheme: names of its format before and of its scheme after.

    rms: root mean square of the error over that of the weight.  worst: the largest error, in the weight's own unit.
    saturated: share of weights that lie more than half a step beyond the outermost code of their block.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stored: str
    scheme: str
    rms: float
    worst: float
    saturated: float
    before: int
    after: int

    @staticmethod
    def of(values: Mapping[str, Any]) -> Row:
        return Row(**{**values, "shape": tuple(values["shape"])})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def errors(wide_NK: Tensor, weight: QuantTensor) -> tuple[float, float, float]:
    """(rms, worst, saturated) of a weight in one segment, against its FP32 values."""
    off_NK = weight.dequantize()
    if off_NK.data_ptr() == weight.parts["data"].data_ptr():  # an unquantised FP32 weight decodes to its own storage
        off_NK = off_NK.clone()
    off_NK.sub_(wide_NK).abs_()
    size, off = norm(wide_NK), norm(off_NK)
    worst = float(off_NK.max()) if off_NK.numel() else 0.0
    return off / size if size else 0.0, worst, saturated(off_NK, weight) / max(wide_NK.numel(), 1)


def norm(x_NK: Tensor) -> float:
    """Rows in FP32, their norms in FP64."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(x_NK, dim=-1), dtype=torch.float64))


def saturated(off_NK: Tensor, weight: QuantTensor) -> int:
    """How many values lie beyond the codes of their block. off_NK: magnitudes of the errors.

    In a block whose scale is 0 all values are too small, and none is too large.
    """
    if weight.form.name == "bf16":
        return 0
    if weight.form.zero_points:
        raise UnsupportedError(f"{weight.form} is not written here, so nobody asks what it saturates")
    code, half = _CODES[weight.form.name]
    units = torch.empty_like(weight.parts["data"])
    units.view(torch.uint8).fill_(code)
    scale_NK = QuantTensor(weight.form, weight.segments, weight.columns, {**weight.parts, "data": units}).dequantize()
    if scale_NK.numel() and not float(scale_NK.min()) > 0:
        scale_NK.masked_fill_(scale_NK == 0, torch.inf)
    return int((off_NK > scale_NK.mul_(half * _TIE)).count_nonzero())


@dataclass(frozen=True)
class Total:
    """Of all converted weights of a kind. rms: mean over its tensors; worst_rms: of the tensor `worst_name`."""

    kind: str
    scheme: str
    tensors: int
    weights: int
    before: int
    after: int
    rms: float
    worst_rms: float
    worst_name: str
    saturated: float


def totals(rows: Iterable[Row]) -> list[Total]:
    """By kind and scheme, in the order of their first rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.scheme), []).append(row)
    return [total(kind, scheme, group) for (kind, scheme), group in groups.items()]


def total(kind: str, scheme: str, rows: list[Row]) -> Total:
    sizes = [math.prod(row.shape) for row in rows]
    worst = max(rows, key=lambda row: row.rms)
    beyond = sum(row.saturated * size for row, size in zip(rows, sizes, strict=True)) / max(sum(sizes), 1)
    return Total(
        kind, scheme, len(rows), sum(sizes), sum(row.before for row in rows), sum(row.after for row in rows),
        sum(row.rms for row in rows) / len(rows), worst.rms, worst.name, beyond,
    )  # fmt: skip


def table(rows: list[Row], taken_over: tuple[int, int]) -> str:
    """For a terminal. taken_over: (tensors, bytes) of what was not converted."""
    count, nbytes = taken_over
    lines = [f"{'':16}{'scheme':>18}{'tensors':>9}{'before':>11}{'after':>11}{'error':>9}{'worst':>9}{'beyond':>9}"]
    for each in totals(rows):
        lines.append(
            f"{each.kind:16}{each.scheme:>18}{each.tensors:9}{mib(each.before)}{mib(each.after)}"
            f"{each.rms:9.2%}{each.worst_rms:9.2%}{each.saturated:9.2%}"
        )
    lines.append(f"{'taken over':16}{'':18}{count:9}{mib(nbytes)}{mib(nbytes)}")
    before, after = (sum(getattr(row, side) for row in rows) + nbytes for side in ("before", "after"))
    part = f"{after / before:.1%} of the source"
    lines.append(f"{'all':16}{'':18}{len(rows) + count:9}{mib(before)}{mib(after)}   {part}")
    lines.append("error: RMS of the difference over RMS of the weight, mean and worst tensor; beyond: share saturated")
    return "\n".join(lines)


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:7.1f} MiB"
