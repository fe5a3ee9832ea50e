"""What a checkpoint says about its own numbers: `quantization_config`, in every dialect that is known here.

A dialect gives each projection of a model spec its scheme, and names the tensors that fill its fields:

    dialect = read_quantization(config, sidecar)
    spec, notes = dialect.apply(spec)                          # from the config alone
    dialect, spec, notes = dialect.settle(spec, headers)       # what only the tensors' headers can say
    for source in dialect.sources(part, name): ...             # `expert_sources(layer)`, where experts lie together

`write_config` and `to_checkpoint` go the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moesaic.errors import UnsupportedError
from moesaic.formats.dialects import compressed_tensors, fp8, modelopt, mxfp4, w4afp8
from moesaic.formats.dialects.base import Dialect, Settled, Stored
from moesaic.formats.dialects.check import check_field
from moesaic.formats.dialects.section import Section
from moesaic.formats.dialects.source import FusedSource, Source
from moesaic.formats.dialects.writing import (
    dialect_of,
    excluded_names,
    invertible,
    part_scheme,
    storable,
    to_checkpoint,
    write_config,
)

SIDECAR = "hf_quant_config.json"
"""Where ModelOpt writes what others put into config.json."""

READERS: Mapping[str, Callable[[Section, str], Dialect]] = {
    "fp8": fp8.read, "mxfp8": fp8.read, "w4afp8": w4afp8.read, "mxfp4": mxfp4.read,
    "compressed-tensors": compressed_tensors.read,
    **dict.fromkeys(("modelopt", "modelopt_fp4", "modelopt_fp8", "modelopt_mxfp8", "modelopt_mixed"), modelopt.read),
}  # fmt: skip


def read_quantization(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None) -> Dialect | None:
    """The dialect of a config.json and, where there is one, of the file beside it; None: nothing is quantised.

    Raises UnsupportedError for a method, a field or a value that is not supported, CheckpointError for a malformed one.
    """
    own = config.get("quantization_config") or config.get("compression_config")
    sidecar = Section(hf_quant_config, SIDECAR) if hf_quant_config else None
    if not own:
        return modelopt.read(sidecar, "") if sidecar else None
    section = Section(own, "config.json: quantization_config")
    method = section.text("quant_method").lower() or ("modelopt" if "quant_algo" in section.values else "")
    if not method:
        raise section.bad("quant_method", "is missing")
    if method not in READERS:
        raise UnsupportedError(
            f"quant_method {method!r:.60} is not supported", where=section.where,
            remedy=f"Supported: {', '.join(READERS)}; or use the BF16, FP16 or FP32 release of the model.",
        )  # fmt: skip
    if sidecar:
        modelopt.check_agree(section, sidecar)
    return READERS[method](section, _dtype(config))


def _dtype(config: Mapping[str, Any]) -> str:
    named = config.get("dtype") or config.get("torch_dtype")
    return named.removeprefix("torch.") if isinstance(named, str) else "bfloat16"


__all__ = [
    "SIDECAR", "Dialect", "FusedSource", "Settled", "Source", "Stored", "check_field", "dialect_of", "excluded_names",
    "invertible", "part_scheme", "read_quantization", "storable", "to_checkpoint", "write_config",
]  # fmt: skip
