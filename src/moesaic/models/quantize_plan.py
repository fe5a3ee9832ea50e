"""What `moesaic quantize` will write, decided from headers alone: which tensors become which, in which file.

A *unit* is what is converted at once: one projection with all its fields, or one tensor that is taken over as it is.
Units follow the order of the source's bytes, so that it is read once from beginning to end, and a unit is never split
between files, so that each file can be checked by itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from moesaic.contracts.scheme import Scheme
from moesaic.contracts.spec import LayerSpec, LinearSpec, MLASpec, ModelSpec, MoESpec
from moesaic.errors import OptionError, UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.checkpoint import Dialect, excluded_names, read_quantization, to_checkpoint, write_config
from moesaic.formats.dialects.modules import linears, names_of
from moesaic.formats.safetensors_write import SINGLE, Entry
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.hold import as_stored
from moesaic.models.quantize_read import BIAS, Common, common_experts, sources_of

COPIED = "taken over"
"""Kind of the units that are not converted; the others are named after the part of the model that they belong to."""


@dataclass(frozen=True)
class Unit:
    """name: a module, or a tensor that is taken over (part None).  reads: the source tensors.  writes: the new ones.

    part: how the source stores the projection (`scheme`) and how it will be stored (`runs`).  before: bytes read.
    group, expert: the module's name with `{e}` for the expert's number, and that number.
    """

    name: str
    kind: str
    part: LinearSpec | None
    reads: tuple[str, ...]
    writes: tuple[Entry, ...]
    before: int
    group: str = ""
    expert: int = 0

    @property
    def after(self) -> int:
        return sum(entry.nbytes for entry in self.writes)

    @property
    def written(self) -> LinearSpec:
        """The projection as it stands in the new checkpoint."""
        assert self.part is not None
        return replace(self.part, scheme=self.part.runs, held=None)

    @property
    def calibrated(self) -> bool:
        """Whether its input scale has to be measured."""
        return self.part is not None and self.part.runs.activation.static and self.part.runs != self.part.scheme


@dataclass(frozen=True)
class Shard:
    name: str
    units: tuple[Unit, ...]

    @property
    def nbytes(self) -> int:
        return sum(unit.after for unit in self.units)


@dataclass(frozen=True)
class Plan:
    """spec: of the new checkpoint, with the schemes that its config.json will say.  dialect, written: how source and
    result store what is quantised; common: where the source has all experts of a layer together.  quantization: the
    result's quantization_config, None where nothing is quantised."""

    scheme: Scheme
    spec: ModelSpec
    dialect: Dialect | None
    written: Dialect | None
    common: Mapping[str, Common]
    quantization: Mapping[str, Any] | None
    shards: tuple[Shard, ...]

    @property
    def units(self) -> Iterator[Unit]:
        return (unit for shard in self.shards for unit in shard.units)

    @property
    def before(self) -> int:
        return sum(unit.before for unit in self.units)

    @property
    def after(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def make_plan(source: Checkpoint, held: ModelSpec, dialect: Dialect | None, scheme: Scheme, limit: int) -> Plan:
    """held: from `hold`.  limit: most bytes of one file; a larger unit gets a file of its own.

    Raises OptionError where nothing would change, UnsupportedError for experts that cannot be written decoded.
    """
    written = as_stored(held)
    quantization = write_config(scheme, excluded_names(written)) if scheme.quantized else None
    common = common_experts(held, dialect)
    units = [*converted(source, held, dialect, scheme, common)]
    if all(unit.part is None or unit.part.scheme == unit.part.runs for unit in units):
        raise OptionError(
            f"the source is in {scheme.name} already", where="--scheme", remedy="Choose another, or take it as it is."
        )
    units += copied(source, dialect, {name for unit in units for name in unit.reads})
    place = {name: (stored.order, stored.info.offset) for name, stored in source.tensors().items()}
    units.sort(key=lambda unit: min(place[name] for name in unit.reads))
    reader = read_quantization({**source.config, "quantization_config": quantization}) if quantization else None
    return Plan(scheme, written, dialect, reader, common, quantization, shards(units, limit))


def converted(source: Checkpoint, held: ModelSpec, dialect: Dialect | None, scheme: Scheme,
              common: Mapping[str, Common]) -> Iterator[Unit]:  # fmt: skip
    """The projections that are stored otherwise in source and result."""
    kinds, dtype, stored = kind_of(held), getattr(torch, held.checkpoint_dtype), source.tensors()
    for part, experts in linears(held):
        if not (part.scheme.quantized or part.runs.quantized):
            continue
        if part.name in common:
            yield from from_common(source, part, common[part.name], kinds[part.name], entries(part, scheme, dtype))
            continue
        writes = entries(part, scheme, dtype)  # with `{e}` in their names
        for e, name in enumerate(names_of(part, experts)):
            reads = tuple(each.name for each in sources_of(part, name, dialect) if each.name in stored)
            before = sum(stored[each].info.nbytes for each in reads)
            own = tuple(replace(entry, name=entry.name.format(e=e)) for entry in writes) if experts else writes
            yield Unit(name, kinds[part.name], replace(part, name=name), reads, own, before, part.name, e)


def from_common(source: Checkpoint, part: LinearSpec, common: Common, kind: str,
                writes: tuple[Entry, ...]) -> Iterator[Unit]:  # fmt: skip
    """Experts that lie together in the source, and each by itself in the result, with its own bias."""
    if not part.runs.quantized:
        raise UnsupportedError(
            f"all experts of {part.name} lie together as {part.scheme.name}, and are written decoded by no one here",
            where="--scheme", remedy="Quantise them too, or start from a BF16 release.",
        )  # fmt: skip
    reads = tuple(common.sources[field].name for field in common.sources if field != BIAS)
    before = sum(common.nbytes(source, field) for field in common.sources if field != BIAS)
    for e in range(common.experts):
        name, own = part.name.format(e=e), tuple(replace(each, name=each.name.format(e=e)) for each in writes)
        yield Unit(name, kind, replace(part, name=name), reads, own, before, part.name, e)
        if BIAS in common.sources:
            origin = common.sources[BIAS].name
            entry = Entry(f"{name}.{BIAS}", source.tensors()[origin].info.dtype, (part.outputs,))
            yield Unit(entry.name, COPIED, None, (origin,), (entry,), entry.nbytes, part.name, e)


def copied(source: Checkpoint, dialect: Dialect | None, used: set[str]) -> Iterator[Unit]:
    """All other tensors, but those that stand for nothing here (scales of a quantised KV cache)."""
    dropped = re.compile("|".join(f"(?:{each})" for each in (dialect.ignore if dialect else ())) or r"(?!)")
    for name, stored in source.tensors().items():
        if name not in used and not dropped.fullmatch(name):
            entry = Entry(name, stored.info.dtype, stored.info.shape)
            yield Unit(name, COPIED, None, (name,), (entry,), entry.nbytes)


def entries(part: LinearSpec, scheme: Scheme, dtype: torch.dtype) -> tuple[Entry, ...]:
    """What one projection becomes. dtype: of what is stored unquantised."""
    base, _, last = part.name.rpartition(".")
    found = entries_of(last, replace(part, name="", scheme=part.runs, held=None), scheme, dtype)
    return tuple(replace(entry, name=base + entry.name) for entry in found)


@cache
def entries_of(last: str, part: LinearSpec, scheme: Scheme, dtype: torch.dtype) -> tuple[Entry, ...]:
    """By writing one, of storage that nobody fills: once per shape. last: the end of its name, which may decide.

    (Not on the meta device: the first operator there would import 150 MB of torch.)
    """
    weight = QuantTensor.empty(part.scheme.weight, (part.outputs,), part.inputs, torch.empty(0, dtype=dtype))
    scale = torch.empty(1) if part.scheme.activation.static else None
    found = to_checkpoint(scheme, weight, f".{last}", scale)
    return tuple(Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items())


def shards(units: Sequence[Unit], limit: int) -> tuple[Shard, ...]:
    """In order, as many units per file as fit."""
    runs: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if runs[-1] and size + unit.after > limit:
            runs.append([])
            size = 0
        runs[-1].append(unit)
        size += unit.after
    if len(runs) == 1:
        return (Shard(SINGLE, tuple(runs[0])),)
    return tuple(Shard(f"model-{i:05}-of-{len(runs):05}.safetensors", tuple(run)) for i, run in enumerate(runs, 1))


def kind_of(spec: ModelSpec) -> dict[str, str]:
    """Module name (with `{e}`) -> the part of the model that it belongs to, for reports."""
    found: dict[str, str] = {}
    for block in spec.layers:
        found |= kinds_in(block)
    for draft in spec.drafts:
        found |= dict.fromkeys([draft.join.name, *kinds_in(draft.block)], "draft")
    return found


def kinds_in(block: LayerSpec) -> dict[str, str]:
    found = {part.name: "attention" for part, _ in linears(block.attention)}
    if isinstance(block.attention, MLASpec):
        found[block.attention.kv_b.name] = "kv_b_proj"
    kind = "dense" if not isinstance(block.mlp, MoESpec) else "shared experts"
    return found | {part.name: "experts" if experts else kind for part, experts in linears(block.mlp)}


def fingerprint(source: Checkpoint) -> str:
    """Changes with the config, and with any file's name, header, size or time of change; weights are not read."""
    digest = hashlib.sha256(repr(sorted(source.config.items())).encode())
    for file in source.files:
        facts = file.path.stat()
        digest.update(repr((file.path.name, facts.st_size, facts.st_mtime_ns)).encode())
        digest.update(repr([file.info(name) for name in file.names()]).encode())
    return digest.hexdigest()
