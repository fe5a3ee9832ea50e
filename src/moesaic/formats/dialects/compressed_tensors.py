"""`quant_method: compressed-tensors` (llm-compressor, Kimi-K2, GLM): groups of modules, each with arguments of its own.

A module belongs to the group whose target names it, else to one whose expression matches it, else to one that names its
class; `ignore` takes modules out of all groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moesaic.contracts.scheme import UNQUANTIZED, Encoding, Scheme, WeightFormat
from moesaic.contracts.spec import LinearSpec
from moesaic.errors import UnsupportedError
from moesaic.formats.dialects import fp8, layouts
from moesaic.formats.dialects.base import Dialect, scheme_of
from moesaic.formats.dialects.exclusions import Entries, Found
from moesaic.formats.dialects.section import Section
from moesaic.formats.dialects.source import Source

_CONTAINERS = {
    "fp8_tensor": ("float-quantized", "naive-quantized"), "fp8_channel": ("float-quantized", "naive-quantized"),
    "fp8_block": ("float-quantized", "naive-quantized"), "mxfp8": ("mxfp8-quantized",),
    "nvfp4": ("nvfp4-pack-quantized",), "mxfp4": ("mxfp4-pack-quantized",), "int4": ("pack-quantized",),
}  # fmt: skip
"""How compressed-tensors calls the storage of each format."""

_CLASSES = ("Linear", "FusedMoE")
_SCALES = ("bfloat16", "float16", "float32")
_METADATA = ("quant_method", "version", "quantization_status", "global_compression_ratio", "producer")


@dataclass(frozen=True)
class CompressedTensors(Dialect):
    """group_of: the group of each entry of `targets`.  An int4 form with group -1 has one scale per row."""

    group_of: tuple[int, ...] = ()
    groups: tuple[Scheme, ...] = field(default=())

    def scheme(self, part: LinearSpec, expert: bool, found: Found) -> Scheme:
        closest = min(found, key=lambda i: (_closeness(self.targets.entries[i]), self.group_of[i]), default=None)
        if closest is None:
            return UNQUANTIZED
        scheme = self.groups[self.group_of[closest]]
        if scheme.weight.group >= 0:
            return scheme
        return scheme_of(replace(scheme.weight, group=part.inputs), scheme.activation)

    def quantized_sources(self, part: LinearSpec, name: str) -> tuple[Source, ...]:
        form, scale = part.scheme.weight.name, f"{name}.weight_scale"
        inverse = form == "nvfp4"
        static = (
            (layouts.tensor_scale(f"{name}.input_{'global_' * inverse}scale", "input_scale", inverse=inverse),)
            if part.scheme.activation.static else ()
        )  # fmt: skip
        if form == "int4":
            return (*layouts.int4_words(name, part), *static)
        packed = f"{name}.weight_packed"
        if form == "nvfp4":
            top = layouts.tensor_scale(f"{name}.weight_global_scale", "global_scale", inverse=True)
            return (layouts.nibbles(packed, part), layouts.nv_scale(scale, part), top, *static)
        if form == "mxfp4":
            return (layouts.nibbles(packed, part), layouts.mx_scale(scale, part), *static)
        if form == "fp8_tensor":
            return (layouts.e4m3(name, part), layouts.tensor_scale(scale, "scale"), *static)
        of = {"fp8_channel": layouts.channel_scale, "fp8_block": layouts.block_scale, "mxfp8": layouts.mx_scale}
        return (layouts.e4m3(name, part), of[form](scale, part), *static)


def read(section: Section, dtype: str) -> CompressedTensors:
    """The config; dtype: of the model, which int4 scales share. Raises UnsupportedError / CheckpointError."""
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        inner = section.inner(name)
        if inner and inner.unread() and inner.values.get("format") != "dense":
            raise section.unsupported(name, "none")
    groups = section.inner("config_groups")
    if not groups or not groups.values:
        raise section.bad("config_groups", "must hold at least one group")
    container = section.text("format")
    targets: list[str] = []
    group_of: list[int] = []
    schemes: list[Scheme] = []
    for i, name in enumerate(groups.values):
        group = groups.inner(name) or Section({}, f"{groups.where}: {name}")
        own = group.texts("targets")
        targets, group_of = targets + own, group_of + [i] * len(own)
        schemes.append(_group(group, group.text("format") or container, dtype))
    for name in _METADATA:
        section.get(name)
    return CompressedTensors(
        "compressed-tensors", Entries(section.texts("ignore"), strict=True, where="ignore"), fp8.remarks(section),
        Entries(targets, strict=True, where="targets"), tuple(group_of), tuple(schemes),
    )  # fmt: skip


def _closeness(target: str) -> int:
    return 1 if target.startswith("re:") else 2 if target in _CLASSES else 0


def _group(group: Section, container: str, dtype: str) -> Scheme:
    weights, rows = group.inner("weights"), group.inner("input_activations")
    if group.inner("output_activations"):
        raise group.unsupported("output_activations", "none")
    if weights is None:
        raise group.unsupported("weights", "weights in FP8, FP4 or INT4")
    form = _weight(weights, container, dtype)
    if container not in _CONTAINERS[form.name]:
        raise group.unsupported("format", f"{' or '.join(_CONTAINERS[form.name])} for {form.name}", container)
    return scheme_of(form, _activation(rows) if rows else Encoding("bf16"))


def _weight(args: Section, container: str, dtype: str) -> WeightFormat:
    kind, bits, strategy, group = _shape(args)
    if args.get("dynamic") not in (None, False):
        raise args.unsupported("dynamic", "false")
    if args.get("actorder") not in (None, False, "weight", "static"):
        raise args.unsupported("actorder", "weight, null")
    symmetric = args.flag("symmetric", True)
    if (kind, bits) == ("int", 4) and strategy in ("group", "channel"):
        stored = (args.text("scale_dtype") or dtype).removeprefix("torch.")
        if stored not in _SCALES:
            raise args.unsupported("scale_dtype", ", ".join(_SCALES), stored)
        if strategy == "group" and group < 2:
            raise args.unsupported("group_size", "2 and more")
        return WeightFormat("int4", group if strategy == "group" else -1, stored, zero_points=not symmetric)
    if not symmetric:
        raise args.unsupported("symmetric", "true, except for INT4")
    scales = args.text("scale_dtype")
    mx = group == 32 and (scales.endswith("uint8") or container.startswith("mx"))
    found = {
        ("float", 8, "tensor"): "fp8_tensor", ("float", 8, "channel"): "fp8_channel",
        ("float", 8, "block"): "fp8_block" if args.block("block_structure") == (128, 128) else "",
        ("float", 8, "group"): "mxfp8" if mx else "", ("float", 4, "group"): "mxfp4" if mx else "",
        ("float", 4, "tensor_group"): "nvfp4" if group == 16 else "",
    }.get((kind, bits, strategy))  # fmt: skip
    if not found:
        raise _unsupported(args, "FP8 per tensor, channel, block of 128x128 or MX group of 32, NVFP4, MXFP4, INT4")
    return WeightFormat(found)


def _activation(args: Section) -> Encoding:
    kind, bits, strategy, group = _shape(args)
    dynamic = args.get("dynamic")
    if dynamic not in (None, True, False, "local"):
        raise args.unsupported("dynamic", "true, false, local")
    if (kind, bits, strategy) == ("float", 8, "tensor"):
        return Encoding("fp8_tensor", static=not dynamic)
    if (kind, bits, strategy, group) == ("float", 4, "tensor_group", 16):
        return Encoding("nvfp4", static=dynamic is not True)
    per_group = {128: "fp8_group128", 32: "mxfp8" if args.text("scale_dtype").endswith("uint8") else ""}
    found: Mapping[str, str] = {"token": "fp8_token", "group": per_group.get(group, "")}
    if not dynamic or (kind, bits) != ("float", 8) or not found.get(strategy):
        raise _unsupported(args, "none; FP8 per tensor, or dynamically per token, group of 128 or MX group; NVFP4")
    return Encoding(found[strategy])


def _shape(args: Section) -> tuple[str, int, str, int]:
    """(type, num_bits, strategy, group_size); a strategy that is not said follows from the group size."""
    group = args.integer("group_size")
    implied = "tensor" if group is None else "channel" if group == -1 else "group"
    for name in ("observer", "observer_kwargs", "zp_dtype", "block_structure", "symmetric"):
        args.get(name)
    bits = args.integer("num_bits")
    kind, strategy = args.text("type", "int").lower(), args.text("strategy", implied).lower()
    return kind, 8 if bits is None else bits, strategy, group or 0


def _unsupported(args: Section, known: str) -> UnsupportedError:
    names = ("type", "num_bits", "strategy", "group_size", "block_structure")
    said = {name: args.values[name] for name in names if args.values.get(name) is not None}
    return args.unsupported("the combination", known, said)
