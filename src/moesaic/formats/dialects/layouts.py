"""How checkpoints store each format: names, shapes and dtypes of its tensors, and the way from them to its fields.

The functions are shared by dialects that differ in names only. The fields are described in `formats/base.py`.
Legend: N rows, K columns, G scales along K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import LinearSpec
from moesaic.errors import CheckpointError
from moesaic.formats.dialects.source import Convert, Source

E4M3, E8M0, U8 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


def e4m3(name: str, part: LinearSpec) -> Source:
    return Source(f"{name}.weight", "data", (part.outputs, part.inputs), (E4M3,))


def tensor_scale(name: str, field: str | None, *, inverse: bool = False, optional: bool = False) -> Source:
    """A single number, a scalar or of shape [1] -> FP32 [1]; inverse: the checkpoint has 1 / it."""
    convert = inverted if inverse else single
    return Source(name, field, (), _SCALES, convert, optional, also=((1,), (1, 1)))


def channel_scale(name: str, part: LinearSpec) -> Source:
    """[N, 1] or [N] -> FP32 [N]."""
    return Source(name, "scale", (part.outputs, 1), _SCALES, column, also=((part.outputs,),))


def block_scale(name: str, part: LinearSpec) -> Source:
    """One per 128 x 128, edges rounded up; FP32, 16 bits, or a power of two -> FP32. ModelOpt keeps the block axes."""
    rows, columns = -(-part.outputs // 128), -(-part.inputs // 128)
    dtypes = (*_SCALES, E8M0)
    return Source(name, "scale", (rows, columns), dtypes, blocks, also=((rows, 1, columns, 1),))


def mx_scale(name: str, part: LinearSpec) -> Source:
    """UE8M0, one per 32 along K."""
    return Source(name, "scale", (part.outputs, part.inputs // 32), (U8, E8M0), octets)


def nibbles(name: str, part: LinearSpec) -> Source:
    """E2M1, two per byte, the even index in the low nibble."""
    return Source(name, "data", (part.outputs, part.inputs // 2), (U8,))


def nv_scale(name: str, part: LinearSpec) -> Source:
    return Source(name, "scale", (part.outputs, part.inputs // 16), (E4M3,))


def int4_scale(name: str, part: LinearSpec) -> Source:
    """[N, K/g] in the dtype of the form; see `Dialect.settle`."""
    form = part.scheme.weight
    dtype: torch.dtype = getattr(torch, form.scale_dtype)
    return Source(name, "scale", (part.outputs, part.inputs // form.group), (dtype,))


def int4_words(name: str, part: LinearSpec) -> tuple[Source, ...]:
    """compressed-tensors' pack-quantized: eight codes with offset 8 per INT32, the first in the low nibble."""
    form, (rows, columns) = part.scheme.weight, (part.outputs, part.inputs)
    groups = columns // form.group
    found = [
        Source(f"{name}.weight_packed", "data", (rows, -(-columns // 8)), (torch.int32,), from_words),
        int4_scale(f"{name}.weight_scale", part),
        Source(f"{name}.weight_shape", None, (2,), (torch.int64, torch.int32), _same_shape(name), optional=True),
        Source(f"{name}.weight_g_idx", None, (columns,), (torch.int32, torch.int64), _in_order(name), optional=True),
    ]
    if form.zero_points:
        shape = (-(-rows // 8), groups)
        found.append(Source(f"{name}.weight_zero_point", "zero", shape, (torch.int32,), from_zero_words))
    return tuple(found)


def int4_pairs(name: str, part: LinearSpec) -> Source:
    """Two signed codes per INT8 byte, the even index in the low nibble."""
    return Source(f"{name}.weight", "data", (part.outputs, part.inputs // 2), (torch.int8, U8), from_signed_pairs)


def single(tensor: Tensor, part: LinearSpec) -> Tensor:
    return tensor.reshape(1).float()


def inverted(tensor: Tensor, part: LinearSpec) -> Tensor:
    return tensor.reshape(1).float().reciprocal()


def column(tensor: Tensor, part: LinearSpec) -> Tensor:
    return tensor.reshape(part.outputs).float()


def blocks(tensor: Tensor, part: LinearSpec) -> Tensor:
    return tensor.float().reshape(-(-part.outputs // 128), -(-part.inputs // 128))


def octets(tensor: Tensor, part: LinearSpec) -> Tensor:
    return tensor.view(U8)


def from_words(tensor: Tensor, part: LinearSpec) -> Tensor:
    """A little-endian word is four bytes of two codes each; the last one may be padded."""
    return tensor.contiguous().view(U8)[:, : part.inputs // 2]


def from_zero_words(tensor: Tensor, part: LinearSpec) -> Tensor:
    """INT32 [N/8, G], eight rows per word -> UINT8 [N, G]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=tensor.device)[:, None]
    return ((tensor[:, None, :] >> shifts) & 15).flatten(0, 1)[: part.outputs].to(U8)


def from_signed_pairs(tensor: Tensor, part: LinearSpec) -> Tensor:
    """Two's complement -> offset 8: the sign bit of each nibble flips."""
    return tensor.view(U8) ^ 0x88


def _same_shape(name: str) -> Convert:
    def check(tensor: Tensor, part: LinearSpec) -> Tensor:
        if tensor.tolist() != [part.outputs, part.inputs]:
            raise CheckpointError(
                f"says {tensor.tolist()}; the model's projection is {[part.outputs, part.inputs]}",
                where=f"{name}.weight_shape", remedy="Check the sizes in config.json.",
            )  # fmt: skip
        return tensor

    return check


def _in_order(name: str) -> Convert:
    def check(tensor: Tensor, part: LinearSpec) -> Tensor:
        order = torch.arange(part.inputs, device=tensor.device) // part.scheme.weight.group
        if not bool(((tensor == order) | (tensor == -1)).all()):
            raise CheckpointError(
                "permutes the columns of its groups, which is not supported",
                where=f"{name}.weight_g_idx", remedy="Use a checkpoint made with actorder 'weight' or none.",
            )  # fmt: skip
        return tensor

    return check
