"""Cutting a weight for tensor or expert parallelism: data and scales together, each segment by itself.

A cut is legal where it falls between blocks: 768 rows cut in 8 are parts of 96, which blocks of 128 rows do not allow.
The parts of a cut are always equal. Legality follows from the fields alone, before any tensor exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moesaic.errors import UnsupportedError

if TYPE_CHECKING:
    from moesaic.formats.base import Field

Axis = Literal["rows", "columns"]


def step_of(fields: Iterable[Field], axis: Axis) -> int:
    """The smallest number of rows or columns that holds whole elements of every field."""
    return math.lcm(*(size for field in fields if (size := field.rows if axis == "rows" else field.columns)))


def legal_counts(sizes: tuple[int, ...], step: int) -> list[int]:
    """Into how many equal parts every size can be cut such that the parts are multiples of step; 1 is always legal."""
    whole = math.gcd(*sizes)
    return [
        n for n in range(1, whole + 1) if n == 1 or (whole % n == 0 and all(size // n % step == 0 for size in sizes))
    ]


def check_cut(form: object, sizes: tuple[int, ...], step: int, count: int, unit: str) -> None:
    """Raises UnsupportedError, naming what is legal, unless every size can be cut into so many parts."""
    legal = legal_counts(sizes, step)
    if count not in legal:
        blocks = f" in blocks of {step}" if step > 1 else ""
        raise UnsupportedError(
            f"{form} of {'+'.join(map(str, sizes))} {unit}{blocks} cannot be cut in {count}",
            remedy=f"It can be cut in {', '.join(map(str, legal))}: parts are equal"
            + (f" and multiples of {step} {unit}." if step > 1 else "."),
        )


def cut_rows(
    fields: Mapping[str, Field], parts: Mapping[str, Tensor], segments: tuple[int, ...], rank: int, count: int
) -> dict[str, Tensor]:
    """Part `rank` of `count` of every segment, joined again, in new storage. The cut must be legal."""
    found = {}
    for name, field in fields.items():
        part, axis = parts[name], -2 if field.columns else -1
        if not field.rows:
            found[name] = part.clone()
            continue
        start, pieces = 0, []
        for rows in segments:
            height = field.height(rows // count)
            pieces.append(part.narrow(axis, start + rank * height, height))
            start += field.height(rows)
        found[name] = torch.cat(pieces, axis)
    return found


def cut_columns(
    fields: Mapping[str, Field], parts: Mapping[str, Tensor], columns: int, rank: int, count: int
) -> dict[str, Tensor]:
    """Part `rank` of `count` along K, in new storage. The cut must be legal."""
    found = {}
    for name, field in fields.items():
        width = columns // count // field.columns if field.columns else 0
        cut = parts[name].narrow(-1, rank * width, width) if field.columns else parts[name]
        found[name] = cut.clone(memory_format=torch.contiguous_format)
    return found
