"""One file of a quantised checkpoint: converted, written, flushed, read again, and only then given its name.

One unit is in memory at a time. What was written is remembered as digests of the fields that the quantiser made; what
is read back goes through the dialect as a loader reads it, so that a wrong conversion is found like a bad disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.formats.base import QuantTensor
from moesaic.formats.checkpoint import invertible, storable, to_checkpoint
from moesaic.formats.safetensors_file import SafetensorsFile
from moesaic.formats.safetensors_write import write_file
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.hold import quantized
from moesaic.models.quantize_plan import Plan, Shard, Unit
from moesaic.models.quantize_read import BIAS, read_common, read_fields, weight_of, wide
from moesaic.models.quantize_report import Row, errors

PARTIAL = ".partial"

Digests = dict[str, dict[str, str]]
"""Unit -> field -> digest of its bytes."""


@dataclass
class Writer:
    """Writes the shards of a plan. scales: calibrated input scale per module, where the scheme has static ones.

    advance: told the bytes of the source that are done with.
    """

    source: Checkpoint
    plan: Plan
    scales: Mapping[str, float]
    advance: Callable[[int], None]
    rows: list[Row] = field(default_factory=list)
    digests: Digests = field(default_factory=dict)

    def write(self, shard: Shard, directory: Path) -> list[Row]:
        """The file under its final name, durably; returns a row per converted weight.

        Raises CheckpointError where the source, or what was read back, is not as it should be; OSError of the disk.
        """
        self.rows, self.digests = [], {}
        partial = directory / (shard.name + PARTIAL)
        write_file(partial, [entry for unit in shard.units for entry in unit.writes], self.tensors(shard))
        flush(partial)
        self.verify(partial, shard)
        replace_durably(partial, directory / shard.name)
        return self.rows

    def tensors(self, shard: Shard) -> Iterator[Tensor]:
        for unit in shard.units:
            if unit.part is None:
                tensor = self.taken_over(unit)
                self.digests[unit.name] = {"": digest(tensor)}
                yield tensor
            else:
                found = self.convert(unit)
                yield from (found[entry.name] for entry in unit.writes)
            self.advance(unit.before)

    def taken_over(self, unit: Unit) -> Tensor:
        """A tensor as it is, or an expert's bias out of those of all."""
        if unit.group in self.plan.common:
            return self.plan.common[unit.group].read(self.source, BIAS, unit.expert)
        return self.source.read(unit.name)

    def convert(self, unit: Unit) -> dict[str, Tensor]:
        """The tensors of a projection in the new checkpoint, by name."""
        assert unit.part is not None
        fields = self.read(unit)
        stored = weight_of(unit.part, fields)
        wide_NK = wide(unit.part, stored)
        weight = self.held(unit, stored, wide_NK)
        scale = self.input_scale(unit, fields.get("input_scale"))
        self.digests[unit.name] = {name: digest(value) for name, value in weight.parts.items()}
        if scale is not None:
            self.digests[unit.name]["input_scale"] = digest(scale)
        self.rows.append(row_of(unit, wide_NK, weight))
        return to_checkpoint(self.plan.scheme, weight, unit.name, scale)

    def held(self, unit: Unit, stored: QuantTensor, wide_NK: Tensor) -> QuantTensor:
        """The weight in its new format; in the one that it has, its very codes: decoding first could move them."""
        scheme = unit.written.scheme
        if stored.form == scheme.weight:
            return storable(self.plan.scheme, stored)
        if not scheme.quantized:
            return replace(stored, form=scheme.weight, parts={"data": wide_NK.to(unit.writes[0].dtype)})
        weight = quantized(wide_NK, scheme)
        weight.check(unit.name)
        return weight

    def input_scale(self, unit: Unit, stored: Tensor | None) -> Tensor | None:
        """FP32 [1], as it will be read back: NVFP4's is stored inverted."""
        encoding = unit.written.scheme.activation
        if not encoding.static:
            return None
        scale = torch.tensor([self.scales[unit.name]]) if unit.calibrated else stored
        return invertible(scale) if scale is not None and encoding.name == "nvfp4" else scale

    def read(self, unit: Unit) -> dict[str, Tensor]:
        assert unit.part is not None
        if unit.group in self.plan.common:
            return read_common(self.source, self.plan.common[unit.group], unit.expert)
        return read_fields(self.source, unit.part, self.plan.dialect)

    def verify(self, path: Path, shard: Shard) -> None:
        """Raises CheckpointError unless the file holds exactly what was made."""
        with SafetensorsFile(path) as file:
            wanted = {entry.name: entry for unit in shard.units for entry in unit.writes}
            if set(file.names()) != set(wanted):
                refuse(path, "its names are not those that were written")
            for entry in wanted.values():
                info = file.info(entry.name)
                if (info.dtype, info.shape) != (entry.dtype, entry.shape):
                    refuse(path, f"{entry.name} is read back as {info.dtype} {list(info.shape)}")
            for unit in shard.units:
                if self.digests[unit.name] != self.read_back(file, unit):
                    refuse(path, f"{unit.name} is read back with other values than were written")

    def read_back(self, file: SafetensorsFile, unit: Unit) -> dict[str, str]:
        """The digests of a unit, of what a loader makes of the file."""
        if unit.part is None:
            return {"": digest(file.read(unit.name))}
        if self.plan.written is None:
            return {"data": digest(file.read(unit.writes[0].name))}
        found: dict[str, str] = {}
        held = {entry.name for entry in unit.writes}
        for each in self.plan.written.sources(unit.written, unit.name):
            if each.name in held:
                value = each.read(file.read(each.name), unit.written)
                found |= {each.field: digest(value)} if each.field else {}
        return found


def row_of(unit: Unit, wide_NK: Tensor, weight: QuantTensor) -> Row:
    assert unit.part is not None
    rms, worst, beyond = errors(wide_NK, weight)
    return Row(
        unit.name, unit.kind, tuple(wide_NK.shape), str(unit.part.scheme.weight), unit.written.scheme.name,
        rms, worst, beyond, unit.before, unit.after,
    )  # fmt: skip


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def flush(path: Path) -> None:
    """To the disk, and out of the page cache, so that what is read next comes from there."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def replace_durably(partial: Path, path: Path) -> None:
    """Gives a flushed file its name: after a crash there is the whole file under that name, or none."""
    partial.replace(path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(
        what, where=str(path), remedy="Run again; if it stays so, the disk or the memory of this machine is faulty."
    )
