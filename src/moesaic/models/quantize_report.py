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

# A code whose value is its block's scale, and how far below and above values are still rounded to the outermost codes:
# half a step beyond them (E4M3 ends with steps of 32, E2M1 of 2, INT4 of 1).
_E4M3, _E2M1 = (0x38, -464.0, 464.0), (0x22, -7.0, 7.0)
_CODES: Mapping[str, tuple[int, float, float]] = {
    "fp8_tensor": _E4M3, "fp8_channel": _E4M3, "fp8_block": _E4M3, "mxfp8": _E4M3, "mxfp4": _E2M1, "nvfp4": _E2M1,
    "int4": (0x99, -8.5, 7.5),
}  # fmt: skip


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
    share = saturated(wide_NK, weight) / max(wide_NK.numel(), 1)
    off_NK = weight.dequantize() - wide_NK  # not in place: an unquantised FP32 weight decodes to its own storage
    size, off = (float(torch.linalg.vector_norm(x_NK, dtype=torch.float64)) for x_NK in (wide_NK, off_NK))
    worst = float(off_NK.abs_().max()) if off_NK.numel() else 0.0
    return off / size if size else 0.0, worst, share


def saturated(wide_NK: Tensor, weight: QuantTensor) -> int:
    """How many values lie beyond the codes of their block. Blocks whose scale is 0 hold none."""
    if weight.form.name == "bf16":
        return 0
    if weight.form.zero_points:
        raise UnsupportedError(f"{weight.form} is not written here, so nobody asks what it saturates")
    code, low, high = _CODES[weight.form.name]
    units = torch.empty_like(weight.parts["data"])
    units.view(torch.uint8).fill_(code)
    scale_NK = QuantTensor(weight.form, weight.segments, weight.columns, {**weight.parts, "data": units}).dequantize()
    beyond = (wide_NK > scale_NK * high).logical_or_(wide_NK < scale_NK * low)
    return int(beyond.logical_and_(scale_NK > 0).sum())


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
