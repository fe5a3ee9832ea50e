"""Bytes of weights and where they may be cut, without torch: for planning. A twin of the fields in the format files.

A format is fields of (bits per element, rows per element, columns per element); rows 0 is one element per tensor,
columns 0 is no column axis. tests/test_planning_sizes.py holds every entry against the format's own file.
"""

from __future__ import annotations

import math

from moesaic.contracts.scheme import WeightFormat

Fields = tuple[tuple[float, int, int], ...]
_FIXED: dict[str, Fields] = {
    "bf16": ((16, 1, 1),),
    "fp8_tensor": ((8, 1, 1), (32, 0, 0)),
    "fp8_channel": ((8, 1, 1), (32, 1, 0)),
    "fp8_block": ((8, 1, 1), (32, 128, 128)),
    "mxfp8": ((8, 1, 1), (8, 1, 32)),
    "mxfp4": ((8, 1, 2), (8, 1, 32)),
    "nvfp4": ((8, 1, 2), (8, 1, 16), (32, 0, 0)),
}
_SCALE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def fields_of(form: WeightFormat) -> Fields:
    if form.name != "int4":
        return _FIXED[form.name]
    zero: Fields = ((8, 1, form.group),) if form.zero_points else ()
    return ((8, 1, 2), (_SCALE_BITS[form.scale_dtype], 1, form.group), *zero)


def weight_bytes(form: WeightFormat, rows: int, columns: int, bits_plain: int = 16) -> int:
    """Bytes of one unstacked weight [rows, columns]; bits_plain: of an element that is not quantised."""
    total = 0.0
    for bits, high, wide in fields_of(form):
        count = (-(-rows // high) if high else 1) * (-(-columns // wide) if wide else 1)
        total += count * (bits_plain if form.name == "bf16" else bits) / 8
    return int(total)


def grain(form: WeightFormat) -> tuple[int, int]:
    """(rows, columns) at whose multiples a weight can be cut without cutting a block or a byte."""
    fields = fields_of(form)
    return math.lcm(*(high for _, high, _ in fields if high)), math.lcm(*(wide for _, _, wide in fields if wide))


def illegal_cut(form: WeightFormat, size: int, ways: int, axis: int) -> str | None:
    """Why a side of `size` elements cannot be cut `ways` ways (axis 0 rows, 1 columns), with the ways that can."""
    step = grain(form)[axis]
    if size % ways == 0 and (size // ways) % step == 0:
        return None
    legal = [n for n in range(1, 129) if n == 1 or (size % n == 0 and (size // n) % step == 0)]
    what = f"{size} / {ways} = {size / ways:g} cuts a block of {step} of {form}"
    return f"{what}; legal: {', '.join(map(str, legal))} ways"
