"""`quant_method: w4afp8`: experts are INT4 with a scale per 128 (signed pairs), all else fp8_block as in DeepSeek-V3.

Input scales of experts go by older names: `experts.7.w1.input_scale` beside `experts.7.gate_proj.weight`.
Engines take 1.0 where a checkpoint has none; here activations are then scaled by what they are, and the user is told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moesaic.contracts.scheme import SCHEMES, Scheme
from moesaic.contracts.spec import LinearSpec, ModelSpec
from moesaic.errors import CheckpointError
from moesaic.formats.dialects import fp8, layouts
from moesaic.formats.dialects.base import Dialect, Settled, Stored
from moesaic.formats.dialects.exclusions import Entries, Found
from moesaic.formats.dialects.modules import change_linears, linears, names_of
from moesaic.formats.dialects.section import Section
from moesaic.formats.dialects.source import Source

_OLD_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class W4AFp8(Dialect):
    def scheme(self, part: LinearSpec, expert: bool, found: Found) -> Scheme:
        return SCHEMES["w4afp8_static" if expert else "fp8"]

    def quantized_sources(self, part: LinearSpec, name: str) -> tuple[Source, ...]:
        scale = f"{name}.weight_scale_inv"
        if part.scheme.weight.name != "int4":
            return layouts.e4m3(name, part), layouts.block_scale(scale, part)
        found = (layouts.int4_pairs(name, part), layouts.int4_scale(scale, part))
        if not part.scheme.activation.static:
            return found
        return (*found, layouts.tensor_scale(input_scale_name(name), "input_scale"))

    def settle(self, spec: ModelSpec, stored: Stored) -> Settled:
        """Learns besides whether experts have input scales: all, or none and then dynamic ones."""
        found = super().settle(spec, stored)
        names = [n for part, experts in linears(found.spec) if part.scheme.activation.static
                 for n in names_of(part, experts)]  # fmt: skip
        lacking = [name for name in names if input_scale_name(name) not in stored]
        if not lacking:
            return found
        if len(lacking) < len(names):
            raise CheckpointError(
                f"is missing, while {len(names) - len(lacking)} other expert projections have theirs",
                where=input_scale_name(lacking[0]), remedy="Download the checkpoint again.",
            )  # fmt: skip
        note = "no expert has an input_scale: activations are scaled by their own largest magnitude instead"
        return found._replace(spec=change_linears(found.spec, _dynamic), notes=(*found.notes, note))


def read(section: Section, dtype: str) -> W4AFp8:
    """The config. Raises UnsupportedError / CheckpointError naming the field."""
    method = section.text("quant_method").lower()
    if (section.integer("group_size") or 128) != 128:
        raise section.unsupported("group_size", "128")
    if section.block("weight_block_size") not in (None, (128, 128)):
        raise section.unsupported("weight_block_size", "[128, 128]")
    for name in ("activation_scheme", "linear_activation_scheme", "moe_activation_scheme", "fmt"):
        section.text(name)  # what is stored decides; see `settle`
    entries, where = section.exclusions()
    return W4AFp8(method, Entries(entries, where=where), fp8.remarks(section))


def input_scale_name(name: str) -> str:
    """model..experts.7.gate_proj -> model..experts.7.w1.input_scale"""
    base, _, last = name.rpartition(".")
    return f"{base}.{_OLD_NAMES.get(last, last)}.input_scale"


def _dynamic(part: LinearSpec, experts: int) -> LinearSpec:
    if not part.scheme.activation.static:
        return part
    return replace(part, scheme=replace(SCHEMES["w4afp8"], weight=part.scheme.weight))
