"""Reading one projection from a checkpoint that will be converted, however the checkpoint stores it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.contracts.spec import LinearSpec, ModelSpec, MoESpec
from moesaic.errors import CheckpointError
from moesaic.formats.base import QuantTensor
from moesaic.formats.checkpoint import Dialect, FusedSource, Source, check_field
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.loading import FLOATS
from moesaic.models.weights import common_sources

BIAS = "bias"


@dataclass(frozen=True)
class Common:
    """Experts that lie together.  projection: gate, up or down.  sources: the tensors that hold fields of it, by field.

    A tensor may hold those of several projections: `sharers` of them.
    """

    projection: str
    experts: int
    sources: Mapping[str, FusedSource]
    sharers: Mapping[str, int]

    def nbytes(self, checkpoint: Checkpoint, field: str) -> int:
        """Of one expert's field."""
        info = checkpoint.tensors()[self.sources[field].name].info
        return info.nbytes // self.experts // self.sharers[field]

    def read(self, checkpoint: Checkpoint, field: str, e: int) -> Tensor:
        """One expert's field, checked; nothing else of the tensor is read but what shares its rows."""
        source = self.sources[field]
        stored = checkpoint.tensors()[source.name]
        own = torch.empty(stored.info.shape[1:], dtype=stored.info.dtype)
        if own.numel():
            view = own.reshape(-1).view(torch.uint8).numpy().data
            stored.file.read_bytes(stored.info, e * len(view), view)
        value = source.take(own[None], 0)[self.projection, field]
        check_field(source.name, "data" if field == BIAS else field, value)
        return value.contiguous()


def common_experts(spec: ModelSpec, dialect: Dialect | None) -> dict[str, Common]:
    """By module name (with `{e}`), for those layers whose experts lie in common tensors."""
    found: dict[str, Common] = {}
    for block in [*spec.layers, *(draft.block for draft in spec.drafts)]:
        if isinstance(block.mlp, MoESpec) and (sources := common_sources(block.mlp, dialect)) is not None:
            parts = {"gate": block.mlp.gate, "up": block.mlp.up, "down": block.mlp.down}
            keys = {source.name: list(source.take(like(source), 0)) for source in sources}
            for projection, part in parts.items():
                mine = {field: s for s in sources for which, field in keys[s.name] if which == projection}
                sharers = {field: len(keys[source.name]) for field, source in mine.items()}
                found[part.name] = Common(projection, block.mlp.router.experts, mine, sharers)
    return found


def like(source: FusedSource) -> Tensor:
    return torch.empty((1, *source.shape[1:]), dtype=source.dtypes[0], device="meta")


def sources_of(part: LinearSpec, name: str, dialect: Dialect | None) -> tuple[Source, ...]:
    """The tensors of a projection that has its own."""
    if dialect is None:
        return (Source(f"{name}.weight", "data", (part.outputs, part.inputs), FLOATS),)
    return dialect.sources(part, name)


def read_fields(checkpoint: Checkpoint, part: LinearSpec, dialect: Dialect | None) -> dict[str, Tensor]:
    """What the checkpoint says of a projection, `input_scale` included, by field. part.name: with the expert's number.

    Raises CheckpointError, naming the tensor, for what is missing or no number.
    """
    found: dict[str, Tensor] = {}
    for source in sources_of(part, part.name, dialect):
        if not source.optional or source.name in checkpoint.tensors():
            value = source.read(checkpoint.read(source.name), part)
            found |= {source.field: value} if source.field else {}
    return found


def read_common(checkpoint: Checkpoint, common: Common, e: int) -> dict[str, Tensor]:
    return {field: common.read(checkpoint, field, e) for field in common.sources if field != BIAS}


def weight_of(part: LinearSpec, fields: Mapping[str, Tensor]) -> QuantTensor:
    own = {name: value for name, value in fields.items() if name != "input_scale"}
    return QuantTensor(part.scheme.weight, (part.outputs,), part.inputs, own)


def wide(part: LinearSpec, weight: QuantTensor) -> Tensor:
    """FP32 [N, K]. Raises CheckpointError for what is not finite."""
    wide_NK = weight.plain.float() if weight.form.name == "bf16" else weight.dequantize()
    if wide_NK.numel() and not all(math.isfinite(extreme) for extreme in map(float, wide_NK.aminmax())):
        raise CheckpointError("is not finite once decoded", where=part.name, remedy="Download the file again.")
    return wide_NK
