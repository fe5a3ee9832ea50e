"""The other direction: the config and the tensors of a checkpoint that Moesaic quantised, in dialects that others read.

fp8, mxfp8 and w4afp8 go out as DeepSeek-V3 and its kin store them; every other scheme as compressed-tensors. Reading
gives back the very fields that were written; for NVFP4, whose scales compressed-tensors inverts, see `invertible`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.scheme import SCHEMES, Encoding, Scheme, WeightFormat
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.dialects.modules import linears, plain_modules
from moesaic.formats.dialects.w4afp8 import input_scale_name

_CONTAINERS = {
    "fp8_tensor": "float-quantized", "fp8_channel": "float-quantized", "fp8_block": "float-quantized",
    "mxfp8": "mxfp8-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized",
    "int4": "pack-quantized",
}  # fmt: skip
_MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_FLOAT8, _FLOAT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float"}
_NV = {**_FLOAT4, "strategy": "tensor_group", "group_size": 16}
_WEIGHTS: dict[str, dict[str, Any]] = {
    "fp8_tensor": {**_FLOAT8, "strategy": "tensor"}, "fp8_channel": {**_FLOAT8, "strategy": "channel"},
    "fp8_block": {**_FLOAT8, "strategy": "block", "block_structure": [128, 128]},
    "mxfp8": {**_FLOAT8, **_MX}, "mxfp4": {**_FLOAT4, **_MX}, "nvfp4": _NV,
    "int4": {"num_bits": 4, "type": "int", "strategy": "group"},
}  # fmt: skip
_ROWS: dict[str, dict[str, Any]] = {
    "fp8_tensor": {**_FLOAT8, "strategy": "tensor"}, "fp8_token": {**_FLOAT8, "strategy": "token"},
    "fp8_group128": {**_FLOAT8, "strategy": "group", "group_size": 128}, "mxfp8": {**_FLOAT8, **_MX}, "nvfp4": _NV,
}  # fmt: skip


def dialect_of(scheme: Scheme) -> str:
    """The quant_method under which checkpoints of a scheme are written."""
    name = scheme.name.removesuffix("_static")
    return name if name in ("fp8", "mxfp8", "w4afp8") else "compressed-tensors"


def part_scheme(scheme: Scheme, *, expert: bool) -> Scheme:
    """Of one projection of a model in `scheme`: W4AFP8 is about experts, beside which all else is fp8."""
    return SCHEMES["fp8"] if dialect_of(scheme) == "w4afp8" and not expert else scheme


def excluded_names(spec: ModelSpec) -> list[str]:
    """What `write_config` must list for a spec with schemes: unquantised projections, routers, the head."""
    plain = [part.name for part, _ in linears(spec) if not part.scheme.quantized]
    return list(dict.fromkeys([spec.head, *(n for n in plain_modules(spec) if n != spec.embed), *plain]))


def write_config(scheme: Scheme, excluded: Iterable[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of a model in one scheme.  excluded: module names; `{e}` stands for every expert."""
    method = dialect_of(scheme)
    if method == "compressed-tensors":
        return _groups(scheme, [_expression(name) for name in excluded])
    dynamic = "static" if scheme.activation.static else "dynamic"
    config: dict[str, Any] = {"quant_method": method, "activation_scheme": dynamic, "fmt": "e4m3"}
    config["weight_block_size"] = [1, 32] if method == "mxfp8" else [128, 128]
    if method == "mxfp8":
        config["scale_fmt"] = "ue8m0"
    if method == "w4afp8":
        config["group_size"] = scheme.weight.group
    return config | {"modules_to_not_convert": [name.replace("{e}", "*") for name in excluded]}


def to_checkpoint(scheme: Scheme, q: QuantTensor, name: str, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of one projection.  scheme: the model's.  q: one segment.  name: with the expert's number.

    input_scale: FP32 [1], where the activation's is static. Nothing is copied that is stored as it is held.
    """
    if len(q.segments) != 1:
        raise ValueError(f"{name} has {len(q.segments)} segments; write them one by one")
    if q.form.name == "bf16":
        return {f"{name}.weight": q.parts["data"]}
    method = dialect_of(scheme)
    if method != "compressed-tensors":
        return _deepseek(method, q, name, input_scale)
    parts = _compressed(q)
    if input_scale is not None:
        inverse = q.form.name == "nvfp4"
        value = input_scale.float().reshape(1)
        parts["input_global_scale" if inverse else "input_scale"] = value.reciprocal() if inverse else value
    return {f"{name}.{field}": tensor for field, tensor in parts.items()}


def invertible(scale: Tensor) -> Tensor:
    """The FP32 number nearest to a scale, or next to that, which survives being stored as its inverse.

    Not every FP32 number is the rounded inverse of another; 1/(1/x) is, and stays itself from then on.
    """
    return scale.reciprocal().reciprocal()


def storable(scheme: Scheme, q: QuantTensor) -> QuantTensor:
    """What will be read after `to_checkpoint`: the same, but for the last bit of NVFP4's global scale."""
    if q.form.name != "nvfp4" or dialect_of(scheme) != "compressed-tensors":
        return q
    return replace(q, parts={**q.parts, "global_scale": invertible(q.parts["global_scale"])})


def _deepseek(method: str, q: QuantTensor, name: str, input_scale: Tensor | None) -> dict[str, Tensor]:
    found = {f"{name}.weight": q.parts["data"], f"{name}.weight_scale_inv": q.parts["scale"]}
    if q.form.name == "int4":
        if method != "w4afp8" or q.form.zero_points:
            raise UnsupportedError(f"{q.form} cannot be written as {method}")
        found[f"{name}.weight"] = (q.parts["data"] ^ 0x88).view(torch.int8)
        if input_scale is not None:
            found[input_scale_name(name)] = input_scale.float().reshape(1)
    return found


def _compressed(q: QuantTensor) -> dict[str, Tensor]:
    data, scale, form = q.parts["data"], q.parts["scale"], q.form
    if form.name == "int4":
        return _words(q)
    if form.name in ("mxfp4", "nvfp4"):
        top = {"weight_global_scale": q.parts["global_scale"].reciprocal()} if form.name == "nvfp4" else {}
        return {"weight_packed": data, "weight_scale": scale, **top}
    return {"weight": data, "weight_scale": scale[:, None] if form.name == "fp8_channel" else scale}


def _words(q: QuantTensor) -> dict[str, Tensor]:
    """Codes into INT32 along K, zero points along N, eight to a word."""
    data, rows = q.parts["data"], q.segments[0]
    padded = torch.nn.functional.pad(data, (0, -data.shape[1] % 4)).contiguous()
    shape = torch.tensor([rows, q.columns], dtype=torch.int64)
    found = {"weight_packed": padded.view(torch.int32), "weight_scale": q.parts["scale"], "weight_shape": shape}
    if q.form.zero_points:
        eights = torch.nn.functional.pad(q.parts["zero"], (0, 0, 0, -rows % 8)).unflatten(0, (-1, 8)).int()
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=eights.device)[:, None]
        found["weight_zero_point"] = (eights << shifts).sum(1, dtype=torch.int32)
    return found


def _groups(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    container = _CONTAINERS[scheme.weight.name]
    group = {
        "targets": ["Linear"], "weights": _weight_arguments(scheme.weight),
        "input_activations": _row_arguments(scheme.activation), "output_activations": None, "format": container,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": container, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignore, "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def _weight_arguments(form: WeightFormat) -> dict[str, Any]:
    own = {"group_size": form.group} if form.name == "int4" else {}
    return {"dynamic": False, "symmetric": not form.zero_points, **_WEIGHTS[form.name], **own}


def _row_arguments(encoding: Encoding) -> dict[str, Any] | None:
    if encoding.name == "bf16":
        return None
    dynamic: bool | str = not encoding.static
    if encoding.name == "nvfp4" and encoding.static:
        dynamic = "local"  # the block scales are found as one goes, the one above them is not
    return {"dynamic": dynamic, "symmetric": True, **_ROWS[encoding.name]}


def _expression(name: str) -> str:
    return "re:^" + re.escape(name).replace(r"\{e\}", r"\d+") + "$" if "{e}" in name else name
