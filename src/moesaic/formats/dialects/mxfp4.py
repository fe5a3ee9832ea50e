"""`quant_method: mxfp4` (gpt-oss): the experts are MXFP4, in one tensor per layer and projection; all else is plain.

`gate_up_proj_blocks` UINT8 [E, 2I, K/32, 16]: gate in the even rows, up in the odd; `_scales` UINT8 [E, 2I, K/32];
`_bias` [E, 2I]; the same for `down_proj` [E, K, I/32, 16]. Activations are not quantised.
Legend: E experts, I expert width, K hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.contracts.scheme import SCHEMES, UNQUANTIZED, Scheme
from moesaic.contracts.spec import LinearSpec, MoESpec
from moesaic.errors import UnsupportedError
from moesaic.formats.dialects import fp8
from moesaic.formats.dialects.base import Dialect
from moesaic.formats.dialects.exclusions import Entries, Found
from moesaic.formats.dialects.section import Section
from moesaic.formats.dialects.source import FLOATS, FusedSource, Source


@dataclass(frozen=True)
class Mxfp4(Dialect):
    def scheme(self, part: LinearSpec, expert: bool, found: Found) -> Scheme:
        return SCHEMES["mxfp4"] if expert else UNQUANTIZED

    def quantized_sources(self, part: LinearSpec, name: str) -> tuple[Source, ...]:
        raise UnsupportedError(f"{name} has no tensors of its own: this dialect stores all experts of a layer together")

    def expert_sources(self, layer: MoESpec) -> tuple[FusedSource, ...] | None:
        if not layer.gate.scheme.quantized:
            return None
        base = layer.gate.name.partition(".{e}")[0]
        return (
            *_tensors(f"{base}.gate_up_proj", layer.router.experts, 2 * layer.intermediate, layer.gate, ("gate", "up")),
            *_tensors(f"{base}.down_proj", layer.router.experts, layer.down.outputs, layer.down, ("down",)),
        )


def read(section: Section, dtype: str) -> Mxfp4:
    """The config. Raises CheckpointError naming the field."""
    method = section.text("quant_method").lower()
    entries, where = section.exclusions()
    return Mxfp4(method, Entries(entries, where=where), fp8.remarks(section))


def _tensors(name: str, experts: int, rows: int, part: LinearSpec, projections: tuple[str, ...]) -> list[FusedSource]:
    blocks = part.inputs // 32
    found = [
        FusedSource(f"{name}_blocks", (experts, rows, blocks, 16), (torch.uint8,), _Rows(projections, "data")),
        FusedSource(f"{name}_scales", (experts, rows, blocks), (torch.uint8,), _Rows(projections, "scale")),
    ]
    if part.bias:
        found.append(FusedSource(f"{name}_bias", (experts, rows), FLOATS, _Rows(projections, "bias")))
    return found


@dataclass(frozen=True)
class _Rows:
    """Deals the rows of an expert out to the projections in turn; blocks of bytes become rows of them."""

    projections: tuple[str, ...]
    field: str

    def __call__(self, tensor: Tensor, e: int) -> Mapping[tuple[str, str], Tensor]:
        own, count = tensor[e], len(self.projections)
        views = {(name, self.field): own[i::count] for i, name in enumerate(self.projections)}
        return {key: view.flatten(1) if view.dim() == 3 else view for key, view in views.items()}
