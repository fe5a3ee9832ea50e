"""What every number format shares: fields that scale with rows and columns, tensors made of them, cutting them.

A weight `[..., N, K]` in a format is a handful of tensors. Each of them is a *field*: one element per so many rows and
so many columns of the weight. From that alone follow sizes, shapes, the seams of stacked projections, and where a cut
for tensor parallelism is legal. A format file adds only the arithmetic: `fields`, `quantize` and `dequantize`.

A stacked weight (gate over up; q over k over v) is a tuple of row *segments*. Fields of one element per tensor have one
per segment, and blocks of rows start anew at every segment, so nothing is lost where segments were scaled apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from moesaic.contracts.scheme import FORMATS, WeightFormat
from moesaic.errors import UnsupportedError
from moesaic.formats import shard
from moesaic.formats.check import check_parts
from moesaic.formats.shard import Axis

Rule = Literal["ceil", "floor", "even"]
"""How the exponent of an MX block is rounded; see `formats/mx.py`."""


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a format: an element per `rows` rows and `columns` columns of the weight, edges rounded up.

    rows == 0: one element per segment.  columns == 0: the field has no column axis.  dtype None: the model's own.
    """

    dtype: torch.dtype | None
    rows: int
    columns: int

    def height(self, rows: int) -> int:
        """Elements along the row axis for a segment of so many rows."""
        return -(-rows // self.rows) if self.rows else 1

    def shape(self, segments: tuple[int, ...], columns: int) -> tuple[int, ...]:
        height = sum(map(self.height, segments))
        return (height, -(-columns // self.columns)) if self.columns else (height,)


class Format(Protocol):
    """A file of this folder that bears the name of a format."""

    def fields(self, form: WeightFormat) -> dict[str, Field]:
        """The fields by name; `data` is always among them."""
        ...

    def quantize(self, w: Tensor, form: WeightFormat, rule: Rule = "ceil") -> dict[str, Tensor]:
        """One segment, FP32 `[..., N, K]` -> its fields. Zeros give zeros; never NaN for finite input."""
        ...

    def dequantize(self, parts: Mapping[str, Tensor], form: WeightFormat, shape: tuple[int, int]) -> Tensor:
        """The fields of one segment of `shape` (N, K) -> FP32 `[..., N, K]`, each value rounded at most once."""
        ...


def format_of(form: WeightFormat) -> Format:
    """The file that knows a format. Raises UnsupportedError for a name that is none of FORMATS."""
    if form.name not in FORMATS:
        raise UnsupportedError(f"weight format {form.name!r} is unknown", remedy=f"Known: {', '.join(FORMATS)}.")
    return cast(Format, import_module(f"moesaic.formats.{form.name}"))


@dataclass(frozen=True)
class QuantTensor:
    """A weight `[*lead, N, K]` in a format, as fields `[*lead, ...]`; N is the sum of its segments.

    The fields are storage: a loader writes into them, a kernel reads them; they are never replaced.
    """

    form: WeightFormat
    segments: tuple[int, ...]
    columns: int
    parts: Mapping[str, Tensor]

    @staticmethod
    def empty(form: WeightFormat, segments: tuple[int, ...], columns: int, like: Tensor,
              lead: tuple[int, ...] = ()) -> QuantTensor:  # fmt: skip
        """Uninitialised storage on like's device; the field of an unquantised weight takes like's dtype.

        Raises UnsupportedError where a block of the format does not divide the columns.
        """
        fields = format_of(form).fields(form)
        check_columns(form, fields, columns)
        parts = {
            name: like.new_empty((*lead, *field.shape(segments, columns)), dtype=field.dtype or like.dtype)
            for name, field in fields.items()
        }
        return QuantTensor(form, segments, columns, parts)

    @staticmethod
    def of(w: Tensor, form: WeightFormat, segments: tuple[int, ...] | None = None, rule: Rule = "ceil") -> QuantTensor:
        """Quantises `[*lead, N, K]`, each segment (default: one, of all rows) by itself."""
        segments, module = segments or (w.shape[-2],), format_of(form)
        check_columns(form, module.fields(form), w.shape[-1])
        wide = w if form.name == "bf16" else w.float()
        each = [module.quantize(part.contiguous(), form, rule) for part in wide.split(list(segments), -2)]
        fields = module.fields(form)
        parts = {
            name: torch.cat([one[name] for one in each], -2 if field.columns else -1) for name, field in fields.items()
        }
        return QuantTensor(form, segments, w.shape[-1], parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this stands for: (*lead, N, K)."""
        lead = self.parts["data"].shape[:-2]
        return (*lead, sum(self.segments), self.columns)

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def plain(self) -> Tensor:
        """The tensor of an unquantised weight; KeyError-free only for `bf16`."""
        if self.form.name != "bf16":
            raise UnsupportedError(f"a weight in {self.form} has no plain tensor")
        return self.parts["data"]

    def dequantize(self) -> Tensor:
        """FP32 `[*lead, N, K]`."""
        module = format_of(self.form)
        each = [self.segment(i) for i in range(len(self.segments))]
        wide = [module.dequantize(one.parts, self.form, (one.segments[0], self.columns)) for one in each]
        return wide[0] if len(wide) == 1 else torch.cat(wide, -2)

    def segment(self, index: int) -> QuantTensor:
        """One segment as views of this storage."""
        fields, parts = format_of(self.form).fields(self.form), {}
        for name, field in fields.items():
            heights = [field.height(rows) for rows in self.segments]
            parts[name] = self.parts[name].narrow(-2 if field.columns else -1, sum(heights[:index]), heights[index])
        return QuantTensor(self.form, (self.segments[index],), self.columns, parts)

    def __getitem__(self, index: int | slice) -> QuantTensor:
        """A view along the first leading axis (an expert, or a range of experts)."""
        return replace(self, parts={name: part[index] for name, part in self.parts.items()})

    def shard(self, axis: Axis, rank: int, count: int) -> QuantTensor:
        """Part `rank` of `count` along the rows (of each segment) or the columns, in storage of its own.

        Scales are cut with the data; those of a whole tensor or row stay with every part. count 1 gives this tensor.
        Raises UnsupportedError, naming the legal counts, for a cut inside a block.
        """
        if not 0 <= rank < count:
            raise ValueError(f"rank {rank} of {count}")
        if count == 1:
            return self
        fields = format_of(self.form).fields(self.form)
        sizes = self.segments if axis == "rows" else (self.columns,)
        shard.check_cut(self.form, sizes, shard.step_of(fields.values(), axis), count, axis)
        if axis == "columns":
            parts = shard.cut_columns(fields, self.parts, self.columns, rank, count)
            return replace(self, columns=self.columns // count, parts=parts)
        parts = shard.cut_rows(fields, self.parts, self.segments, rank, count)
        return replace(self, segments=tuple(rows // count for rows in self.segments), parts=parts)

    def shard_experts(self, rank: int, count: int) -> QuantTensor:
        """Part `rank` of `count` along the first leading axis, in storage of its own; count 1 gives this tensor.

        Raises UnsupportedError, naming the legal counts, where the experts cannot be shared out equally.
        """
        if not 0 <= rank < count:
            raise ValueError(f"rank {rank} of {count}")
        if count == 1:
            return self
        experts = self.shape[0]
        shard.check_cut(self.form, (experts,), 1, count, "experts")
        part = self[rank * experts // count : (rank + 1) * experts // count]
        return replace(part, parts={name: each.clone() for name, each in part.parts.items()})

    def check(self, where: str | None = None) -> None:
        """Raises CheckpointError, naming the field, for NaN codes and for scales that are NaN, infinite or negative.

        Cheap enough for load time: integer extremes, no wide copies. where: the tensor's name in the checkpoint.
        """
        check_parts(self.form.name, self.parts, where)


def nbytes_of(
    form: WeightFormat,
    segments: tuple[int, ...],
    columns: int,
    lead: tuple[int, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """`QuantTensor.empty(...).nbytes` without allocating. dtype: the model's, which matters for `bf16` only."""
    fields = format_of(form).fields(form)
    check_columns(form, fields, columns)
    one = sum(math.prod(field.shape(segments, columns)) * (field.dtype or dtype).itemsize for field in fields.values())
    return math.prod(lead) * one


def check_columns(form: WeightFormat, fields: Mapping[str, Field], columns: int) -> None:
    """Blocks along K must divide K, except where a block spans rows as well (fp8_block allows ragged edges)."""
    for field in fields.values():
        if field.columns > 1 and field.rows == 1 and columns % field.columns:
            step = math.lcm(*(each.columns for each in fields.values() if each.columns and each.rows == 1))
            raise UnsupportedError(
                f"{form} has one scale per {step} columns, which does not divide {columns}",
                remedy=f"Use a width that is a multiple of {step}, or keep this weight unquantised.",
            )
