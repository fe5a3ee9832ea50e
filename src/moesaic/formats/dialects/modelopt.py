"""NVIDIA ModelOpt: `hf_quant_config.json`, or the same in `config.json` under `quant_method: modelopt`.

One algorithm for all but the excluded, or MIXED_PRECISION with one per module in `quantized_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.contracts.scheme import SCHEMES, UNQUANTIZED, Scheme
from moesaic.contracts.spec import LinearSpec
from moesaic.errors import CheckpointError
from moesaic.formats.dialects import fp8, layouts
from moesaic.formats.dialects.base import Dialect
from moesaic.formats.dialects.exclusions import Entries, Found
from moesaic.formats.dialects.section import Section
from moesaic.formats.dialects.source import Source

_ALGORITHMS = {
    "FP8": "fp8_tensor_static", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel", "FP8_PB_WO": "fp8a16",
    "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4a16", "MXFP8": "mxfp8",
}  # fmt: skip
_GROUPS = {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32}
_KNOWN = ", ".join([*_ALGORITHMS, "MIXED_PRECISION"])


@dataclass(frozen=True)
class ModelOpt(Dialect):
    """schemes: the one of each entry of `targets`, or of everything where there are no targets."""

    schemes: tuple[Scheme, ...] = ()

    def scheme(self, part: LinearSpec, expert: bool, found: Found) -> Scheme:
        if not len(self.targets):
            return self.schemes[0]
        closest = max(found, key=lambda i: len(self.targets.entries[i]), default=None)
        return UNQUANTIZED if closest is None else self.schemes[closest]

    def quantized_sources(self, part: LinearSpec, name: str) -> tuple[Source, ...]:
        form, static = part.scheme.weight.name, part.scheme.activation.static
        scale = f"{name}.weight_scale"
        if form == "nvfp4":
            found: tuple[Source, ...] = (
                layouts.nibbles(f"{name}.weight", part), layouts.nv_scale(scale, part),
                layouts.tensor_scale(f"{name}.weight_scale_2", "global_scale"),
            )  # fmt: skip
        elif form == "fp8_tensor":
            found = (layouts.e4m3(name, part), layouts.tensor_scale(scale, "scale"))
        else:
            of = {"fp8_channel": layouts.channel_scale, "fp8_block": layouts.block_scale, "mxfp8": layouts.mx_scale}
            return layouts.e4m3(name, part), of[form](scale, part)
        return (*found, layouts.tensor_scale(f"{name}.input_scale", "input_scale" if static else None,
                                             optional=not static))  # fmt: skip


def read(section: Section, dtype: str) -> ModelOpt:
    """Either spelling of the config. Raises UnsupportedError / CheckpointError naming the field."""
    for name in ("quant_method", "producer", "config_groups"):  # the groups repeat, for others, what the rest says
        section.get(name)
    nested = section.inner("quantization")
    section = nested or section
    algorithm = section.text("quant_algo").upper()
    entries, where = section.exclusions()
    targets: dict[str, Scheme] = {}
    if algorithm == "MIXED_PRECISION":
        targets = _layers(section)
        section.get("group_size")
        schemes: tuple[Scheme, ...] = tuple(targets.values())
    else:
        section.get("quantized_layers")
        schemes = (_scheme(section),)
    return ModelOpt(
        "modelopt", Entries(entries, where=where), fp8.remarks(section),
        Entries(list(targets), where="quantized_layers"), schemes,
    )  # fmt: skip


def check_agree(config: Section, sidecar: Section) -> None:
    """Where both files say something, it must be the same algorithm. Raises CheckpointError."""
    said = [(s.inner("quantization") or s).text("quant_algo").upper() for s in (config, sidecar)]
    if said[0] != said[1]:
        raise CheckpointError(
            f"quant_algo is {said[0] or 'missing'} here and {said[1] or 'missing'} in {sidecar.where}",
            where=config.where, remedy="Remove the one that does not belong to these weights.",
        )  # fmt: skip


def _layers(section: Section) -> dict[str, Scheme]:
    layers: Mapping[str, Any] = layer.values if (layer := section.inner("quantized_layers")) else {}
    if not layers:
        raise section.bad("quantized_layers", "must name the modules of a MIXED_PRECISION model")
    return {name: _scheme(Section(each, f"{section.where}: quantized_layers: {name}")) for name, each in layers.items()}


def _scheme(section: Section) -> Scheme:
    algorithm = section.text("quant_algo").upper()
    if algorithm not in _ALGORITHMS:
        raise section.unsupported("quant_algo", _KNOWN)
    if section.flag("pre_quant_scale", False):
        raise section.unsupported("pre_quant_scale", "false (activations are not scaled per column)")
    section.flag("has_zero_point", False)
    group = section.integer("group_size") or _GROUPS.get(algorithm)
    if algorithm in _GROUPS and group != _GROUPS[algorithm]:
        raise section.unsupported("group_size", f"{_GROUPS[algorithm]} for {algorithm}")
    return SCHEMES[_ALGORITHMS[algorithm]]
