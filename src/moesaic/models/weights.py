"""From what a model wants of a checkpoint to what is read: each weight in the format that is stored, kept in the
format that is held.

Where the two agree, the fields of the format are filled one by one. Where they differ (a quantised projection that must
stay plain, or quantisation at load), the fields of one weight are gathered, decoded, and quantised anew: at most a few
projections are in memory in both forms at once. Experts that lie together in common tensors are read one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from moesaic.contracts.spec import LinearSpec, MoESpec
from moesaic.errors import CheckpointError
from moesaic.formats.base import QuantTensor, format_of
from moesaic.formats.checkpoint import Dialect, FusedSource, Source, check_field
from moesaic.layers.linear import Sources, Stored, Together
from moesaic.models.hold import quantized
from moesaic.models.loading import FLOATS, Slot, Take


def slots_of(wanted: Sources, dialect: Dialect | None) -> list[Slot | Take]:
    """dialect: how the checkpoint stores what its `quantization_config` says is quantised."""
    slots: list[Slot | Take] = []
    dealt: set[str] = set()
    items = list(wanted)
    for call in dict.fromkeys(item.open for item in items if isinstance(item, Stored) and item.open):
        call()
    for item in items:
        if (item[0] if isinstance(item, tuple) else item.name) in dealt:
            continue
        if isinstance(item, tuple):
            slots.append(Slot(*item))
        elif item.together and (sources := common_sources(item.together.spec, dialect)) is not None:
            slots += together_slots(item.together, sources)
            dealt |= names_in(item.together.spec)
        else:
            slots += weight_slots(item, dialect)
    return slots


def settle(wanted: Sources) -> None:
    """After everything is filled: whatever is derived from it is derived."""
    for call in dict.fromkeys(item.settle for item in wanted if isinstance(item, Stored)):
        call()


def weight_slots(stored: Stored, dialect: Dialect | None) -> Iterable[Slot | Take]:
    part, weight = stored.part, stored.weight
    if not part.scheme.quantized and weight.form.name == "bf16":
        return [Slot(f"{stored.name}.weight", weight.plain)]
    sources = sources_of(stored, dialect)
    if weight.form != part.scheme.weight:
        fields = (s.field for s in sources if s.field not in (None, "input_scale"))
        return Gather(stored.name, part, weight, map(str, fields)).slots(stored, sources)
    return [slot_of(stored, source) for source in sources]


def sources_of(stored: Stored, dialect: Dialect | None) -> tuple[Source, ...]:
    part = stored.part
    if part.scheme.quantized:
        if dialect is None:
            raise ValueError(f"{stored.name} has the scheme {part.scheme.name}, and nobody says how it is stored")
        return dialect.sources(part, stored.name)
    return (Source(f"{stored.name}.weight", "data", (part.outputs, part.inputs), FLOATS),)


def slot_of(stored: Stored, source: Source) -> Slot | Take:
    """A field that is held as it is stored."""
    if source.field == "input_scale":
        dest = stored.input_scale
    else:
        dest = stored.weight.parts[source.field] if source.field else None
    if dest is not None and source.convert is None:
        return Slot(source.name, dest, source.optional)
    return take(source, partial(put, source, stored, dest))


def take(source: Source, taker: Callable[[Tensor], None]) -> Take:
    return Take(source.name, source.shape, source.dtypes, taker, source.optional, also=source.also)


def put(source: Source, stored: Stored, dest: Tensor | None, tensor: Tensor) -> None:
    """Converts one tensor of the checkpoint into one field, checked. dest None: it is only checked."""
    value = converted(source, stored, tensor)
    if dest is not None:
        dest.copy_(value.view(dest.shape))


def converted(source: Source, stored: Stored, tensor: Tensor) -> Tensor:
    value = tensor if source.convert is None else source.convert(tensor, stored.part)
    source.check(value)
    return value


class Gather:
    """The fields of one weight on their way from the stored format to the held one. Two readers may call at once."""

    def __init__(self, name: str, part: LinearSpec, held: QuantTensor, fields: Iterable[str]) -> None:
        self.name, self.part, self.held, self.fields = name, part, held, set(fields)
        self.lock, self.got = threading.Lock(), dict[str, Tensor]()

    def slots(self, stored: Stored, sources: Iterable[Source]) -> list[Slot | Take]:
        slots: list[Slot | Take] = []
        for source in sources:
            taker: Callable[[Tensor], None] = partial(self.receive, source, stored)
            if source.field not in self.fields:
                scale = stored.input_scale if source.field == "input_scale" else None
                taker = partial(put, source, stored, scale)
            slots.append(take(source, taker))
        return slots

    def receive(self, source: Source, stored: Stored, tensor: Tensor) -> None:
        self.add(str(source.field), converted(source, stored, tensor))

    def add(self, field: str, value: Tensor) -> None:
        """One field; the last one finishes the weight."""
        with self.lock:
            self.got[field] = value
            if set(self.got) != self.fields:
                return
            fields, self.got = self.got, {}
        self.finish(fields)

    def finish(self, fields: Mapping[str, Tensor]) -> None:
        part, held = self.part, self.held
        values = QuantTensor(part.scheme.weight, (part.outputs,), part.inputs, fields)
        wide_NK = values.plain if part.scheme.weight.name == "bf16" else values.dequantize()
        if not bool(torch.isfinite(wide_NK).all()):
            raise CheckpointError(
                "its values are not finite once decoded", where=self.name, remedy="Download the file again."
            )
        for name, value in quantized(wide_NK, replace(part.runs, weight=held.form)).parts.items():
            held.parts[name].copy_(value.view(held.parts[name].shape))


def together_slots(stored: Together, sources: tuple[FusedSource, ...]) -> Iterable[Slot | Take]:
    """One reading per tensor and expert, so that one expert at a time is in memory twice."""
    dealer, experts = Dealer(stored), range(stored.spec.router.experts)
    return [Take(s.name, s.shape, s.dtypes, partial(dealer.deal, s, e), index=e) for s in sources for e in experts]


def names_in(spec: MoESpec) -> set[str]:
    """Modules and biases of the experts by the names that each has for itself."""
    parts, experts = (spec.gate, spec.up, spec.down), range(spec.router.experts)
    return {part.name.format(e=e) + end for part in parts for e in experts for end in ("", ".bias")}


def common_sources(spec: MoESpec, dialect: Dialect | None) -> tuple[FusedSource, ...] | None:
    """The tensors that hold all experts, or None where each has its own."""
    if spec.gate.scheme.quantized:
        return dialect.expert_sources(spec) if dialect else None
    how, experts, width, hidden = spec.fused, spec.router.experts, spec.intermediate, spec.gate.inputs
    if how is None:
        return None
    turn = -1 if how.transposed else 1
    both, down = (experts, *(2 * width, hidden)[::turn]), (experts, *(hidden, width)[::turn])
    of_both = Cut(("gate", "up"), how.interleaved)
    found = [
        FusedSource(how.gate_up, both, FLOATS, replace(of_both, transposed=how.transposed)),
        FusedSource(how.down, down, FLOATS, Cut(("down",), transposed=how.transposed)),
    ]
    if how.biases:
        found.append(FusedSource(how.biases[0], (experts, 2 * width), FLOATS, replace(of_both, field="bias")))
        found.append(FusedSource(how.biases[1], (experts, hidden), FLOATS, Cut(("down",), field="bias")))
    return tuple(found)


@dataclass(frozen=True)
class Cut:
    """`FusedSource.take` of an unquantised tensor: an expert's rows, dealt out to one or two projections."""

    projections: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    field: str = "data"

    def __call__(self, tensor: Tensor, e: int) -> Mapping[tuple[str, str], Tensor]:
        rows, count = tensor[e].t() if self.transposed else tensor[e], len(self.projections)
        parts = [rows[i::count] for i in range(count)] if self.interleaved else rows.chunk(count)
        return {(name, self.field): part for name, part in zip(self.projections, parts, strict=True)}


class Dealer:
    """Gives what common tensors hold of each expert to that expert's storage."""

    def __init__(self, stored: Together) -> None:
        self.stored, spec = stored, stored.spec
        self.gathers = dict[tuple[str, int], Gather]()
        for name, part in (("gate", spec.gate), ("up", spec.up), ("down", spec.down)):
            held, form = stored.weights[name], part.scheme.weight
            if held.form != form:
                fields = format_of(form).fields(form)
                each = (Gather(part.name.format(e=e), part, held[e], fields) for e in range(spec.router.experts))
                self.gathers |= {(name, e): gather for e, gather in enumerate(each)}

    def deal(self, source: FusedSource, e: int, tensor: Tensor) -> None:
        """tensor: of one expert, as stored."""
        for (name, field), value in source.take(tensor[None], 0).items():
            check_field(source.name, "data" if field == "bias" else field, value)
            if field == "bias":
                fill(source.name, self.stored.biases[name][e], value)
            elif (name, e) in self.gathers:
                self.gathers[name, e].add(field, value)
            else:
                fill(source.name, self.stored.weights[name].parts[field][e], value)


def fill(name: str, dest: Tensor, value: Tensor) -> None:
    """Raises CheckpointError for a value that the destination's dtype cannot hold."""
    dest.copy_(value.reshape(dest.shape))
    if dest.dtype != value.dtype and not bool(torch.isfinite(dest).all()):
        short = str(dest.dtype).removeprefix("torch.")
        raise CheckpointError(f"a weight is too large for {short}", where=name, remedy="Load it in another dtype.")
