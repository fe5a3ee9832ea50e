"""From what a model wants of a checkpoint to what is read: each weight in the format that is stored, kept in the
format that is held.

Where the two agree, the fields of the format are filled one by one. Where they differ (a quantised projection that must
stay plain, or quantisation at load), the fields of one weight are gathered, decoded, and quantised anew: at most a few
projections are in memory in both forms at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.formats.base import QuantTensor
from moesaic.formats.checkpoint import Dialect, Source
from moesaic.layers.linear import Sources, Stored
from moesaic.models.loading import FLOATS, Slot, Take


def slots_of(wanted: Sources, dialect: Dialect | None) -> list[Slot | Take]:
    """dialect: how the checkpoint stores what its `quantization_config` says is quantised."""
    slots: list[Slot | Take] = []
    for item in wanted:
        slots += weight_slots(item, dialect) if isinstance(item, Stored) else [Slot(*item)]
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
        return Gather(stored, sources).slots()
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
    return Take(source.name, source.shape, source.dtypes, partial(put, source, stored, dest), source.optional)


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

    def __init__(self, stored: Stored, sources: tuple[Source, ...]) -> None:
        self.stored, self.sources = stored, sources
        self.lock, self.got = threading.Lock(), dict[str, Tensor]()
        self.fields = {s.field for s in sources if s.field not in (None, "input_scale")}

    def slots(self) -> list[Slot | Take]:
        slots: list[Slot | Take] = []
        for source in self.sources:
            taker: Callable[[Tensor], None] = partial(self.receive, source)
            if source.field not in self.fields:
                scale = self.stored.input_scale if source.field == "input_scale" else None
                taker = partial(put, source, self.stored, scale)
            slots.append(Take(source.name, source.shape, source.dtypes, taker, source.optional))
        return slots

    def receive(self, source: Source, tensor: Tensor) -> None:
        value = converted(source, self.stored, tensor)
        with self.lock:
            self.got[str(source.field)] = value
            if set(self.got) != self.fields:
                return
            fields, self.got = self.got, {}
        self.finish(fields)

    def finish(self, fields: Mapping[str, Tensor]) -> None:
        part, held = self.stored.part, self.stored.weight
        values = QuantTensor(part.scheme.weight, (part.outputs,), part.inputs, fields)
        wide_NK = values.plain if part.scheme.weight.name == "bf16" else values.dequantize()
        if not bool(torch.isfinite(wide_NK).all()):
            raise CheckpointError(
                "its values are not finite once decoded", where=self.stored.name, remedy="Download the file again."
            )
        for name, value in QuantTensor.of(wide_NK, held.form).parts.items():
            held.parts[name].copy_(value.view(held.parts[name].shape))
