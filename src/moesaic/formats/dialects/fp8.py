"""`quant_method: fp8` (DeepSeek-V3, the Qwen3 FP8 releases, Mistral) and `mxfp8`: everything but the excluded is E4M3.

`weight_block_size` says which: [128, 128] is fp8_block, [1, 32] is mxfp8, none is fp8_tensor. The scales of blocks are
called `weight_scale_inv`, yet are multiplied with; a scale per tensor goes by either of two names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moesaic.contracts.scheme import SCHEMES, Scheme
from moesaic.contracts.spec import LinearSpec, ModelSpec
from moesaic.formats.dialects import layouts
from moesaic.formats.dialects.base import Dialect, Settled, Stored, kv_cache_remark
from moesaic.formats.dialects.exclusions import Entries, Found
from moesaic.formats.dialects.modules import linears
from moesaic.formats.dialects.section import Section
from moesaic.formats.dialects.source import Source

_KNOWN_BLOCKS = {(128, 128): "fp8", (1, 32): "mxfp8"}
_METADATA = ("dequantize", "is_checkpoint_fp8_serialized", "packed_modules_mapping", "producer")


@dataclass(frozen=True)
class Fp8(Dialect):
    """whole: the one scheme.  scale, input_scale: what tensor-wide scales are called."""

    whole: Scheme = SCHEMES["fp8"]
    scale: str = "weight_scale"
    input_scale: str = "input_scale"

    def scheme(self, part: LinearSpec, expert: bool, found: Found) -> Scheme:
        return self.whole

    def quantized_sources(self, part: LinearSpec, name: str) -> tuple[Source, ...]:
        data, form = layouts.e4m3(name, part), part.scheme.weight.name
        if form == "fp8_block":
            return data, layouts.block_scale(f"{name}.weight_scale_inv", part)
        if form == "mxfp8":
            return data, layouts.mx_scale(f"{name}.weight_scale_inv", part)
        found = (data, layouts.tensor_scale(f"{name}.{self.scale}", "scale"))
        if not part.scheme.activation.static:
            return found
        return (*found, layouts.tensor_scale(f"{name}.{self.input_scale}", "input_scale"))

    def settle(self, spec: ModelSpec, stored: Stored) -> Settled:
        """Learns besides by which name tensor-wide scales go."""
        found, dialect = super().settle(spec, stored), self
        tensorwide = [part.name.format(e=0) for part, _ in linears(spec) if part.scheme.weight.name == "fp8_tensor"]
        if any(f"{name}.weight_scale_inv" in stored for name in tensorwide):
            dialect = replace(self, scale="weight_scale_inv", input_scale="activation_scale")
        return found._replace(dialect=dialect)


def read(section: Section, dtype: str) -> Fp8:
    """The config. Raises UnsupportedError / CheckpointError naming the field."""
    method = section.text("quant_method").lower()
    if section.text("fmt", "e4m3") not in ("e4m3", "e4m3fn", "float8_e4m3fn"):
        raise section.unsupported("fmt", "e4m3")
    if section.text("expert_dtype", "fp8") != "fp8":
        raise section.unsupported("expert_dtype", "fp8")
    if section.texts("modules_to_convert"):
        raise section.unsupported("modules_to_convert", "none (embeddings are taken unquantised only)")
    entries, where = section.exclusions()
    whole = _scheme(section, method == "mxfp8")
    return Fp8(method, Entries(entries, where=where), remarks(section), whole=whole)


def remarks(section: Section) -> tuple[str, ...]:
    """Of a config that has been read: what it says that changes nothing here."""
    found = kv_cache_remark(any(section.get(n) is not None for n in ("kv_cache_scheme", "kv_cache_quant_algo")))
    if section.text("scale_fmt", "float") == "ue8m0" and section.block("weight_block_size") == (128, 128):
        found += ("scale_fmt ue8m0: weights have power-of-two scales; those of activations are not rounded to such",)
    for name in _METADATA:
        section.get(name)
    unread = section.unread()
    return (*found, *([f"{section.where}: not known, and left aside: {', '.join(unread)}"] if unread else []))


def _scheme(section: Section, mx: bool) -> Scheme:
    static = section.text("activation_scheme", "dynamic").lower()
    if static not in ("static", "dynamic"):
        raise section.unsupported("activation_scheme", "static, dynamic")
    block = section.block("weight_block_size") or ((1, 32) if mx else None)
    if block is None:
        return SCHEMES["fp8_tensor_static" if static == "static" else "fp8_tensor"]
    if _KNOWN_BLOCKS.get(block) not in (("mxfp8",) if mx else ("fp8", "mxfp8")):
        raise section.unsupported("weight_block_size", "[1, 32]" if mx else "[128, 128], [1, 32]")
    if static == "static":
        raise section.unsupported("activation_scheme", "dynamic, where weights have block scales")
    return SCHEMES[_KNOWN_BLOCKS[block]]
