"""Dense products of few rows with weights of 4 and 8 bits (few.cu).

Letters: T rows, N outputs, P parts of K.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper.driver import Module, launch
from moesaic.kernels._hopper.variants import DENSE, FORMATS
from moesaic.kernels._triton.gemm import coarse_rows
from moesaic.kernels.exact import exact

I32, I64, PTR = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p
WARPS, UNIT, RESERVED = 8, 128, 256
SHARED = 200 << 10
"""Bytes of shared memory that a thread block may have at most."""
LARGE = 16 << 20
"""Bytes of a weight above which Triton is as fast at a format's greatest height: measured at 10 MB or 15, and at 29 or
132."""
FP8 = FORMATS["fp8_block"]
MOST = {FP8: 8, FORMATS["mxfp8"]: 16, FORMATS["mxfp4"]: 32, FORMATS["nvfp4"]: 32}
"""Rows, by format: what needs less decoding is as fast by Triton's products of groups of warps from fewer rows on. FP8
is only as terms: behind kernels of another kind, and with a sum to make, Triton is."""


class FewC(ctypes.Structure):
    """Few in few.cu."""

    _fields_ = (("x", PTR), ("x_scales", PTR), ("w", PTR), ("w_scales", PTR), ("top", PTR), ("coarse", PTR),
                ("bias", PTR), ("y", PTR), ("x_stride", I64), ("w_stride", I64), ("scale_stride", I64),
                ("scale_row", I32), ("scale_group", I32), ("rows", I32), ("columns", I32), ("units", I32),
                ("per_part", I32), ("parts", I32))  # fmt: skip


@dataclass(frozen=True)
class Height:
    """Rows that a kernel takes.  stack: blocks of 16 rows of w in a thread block.  per_sm: thread blocks that a
    multiprocessor has room for.  programs: thread blocks that K is shared out to, as long as each of their warps has
    `units` of it.  room: bytes for rows of x."""

    rows: int
    stack: int
    per_sm: int
    programs: int
    units: int
    room: int


HEIGHTS = {each.rows: each for each in (
    Height(8, 2, 2, 264, 2, 72 << 10), Height(16, 2, 2, 264, 1, 72 << 10), Height(32, 4, 1, 132, 1, 136 << 10),
)}  # fmt: skip
"""Measured on an H200 (docs/performance-log.md)."""


@dataclass(frozen=True)
class Variant:
    """form: of FORMATS.  blocks: FP8 scales are of blocks and groups.  height: a key of HEIGHTS."""

    form: int
    blocks: bool
    height: int

    @property
    def defines(self) -> dict[str, int]:
        height = HEIGHTS[self.height]
        return {"FORMAT": self.form, "BLOCKS": int(self.blocks), "HEIGHT": height.rows, "STACK": height.stack,
                "PER_SM": height.per_sm}  # fmt: skip

    @property
    def unit_bytes(self) -> int:
        """Of a row of x."""
        return UNIT * (1 if self.form == FP8 else 2)


class Loaded:
    """The compiled kernel of a variant."""

    def __init__(self, variant: Variant) -> None:
        self.module = Module(code.machine_code(variant.defines, main="few.cu"))
        self.kernel = self.module.function("few", SHARED)


@cache
def loaded(variant: Variant, device: int) -> Loaded:
    """device: the current one, on which the code is loaded."""
    return Loaded(variant)


@dataclass(frozen=True)
class Cut:
    """How a product is shared out: tiles of rows of w, parts of K and the units of each."""

    variant: Variant
    tiles: int
    per_part: int
    parts: int

    def shared(self, rows: int) -> int:
        """Bytes of shared memory: rows of x and scales of their groups, and later the warps' sums."""
        variant = self.variant
        x = rows * self.per_part * variant.unit_bytes + 4 * self.per_part * variant.height * variant.blocks
        return RESERVED + max(x, 4 * WARPS * variant.height * (16 * HEIGHTS[variant.height].stack + 4))


def cut_of(x: Rows, w: QuantTensor, bias_N: Tensor | None, terms: bool = True) -> Cut | None:
    """From formats and shapes alone; None for what is not this kernel's, or faster elsewhere. terms: somebody else adds
    up the parts."""
    if bias_N is not None and bias_N.dtype != torch.bfloat16:
        return None
    rows, columns, form = x.data.shape[:-1].numel(), w.columns, FORMATS[w.form.name]
    if (w.form.name, x.encoding.name) not in DENSE or columns % UNIT or len(w.shape) != 2:
        return None
    if not 0 < rows <= MOST[form] or not w.shape[0] or (form == FP8 and not terms):
        return None
    height = next(each for each in HEIGHTS.values() if rows <= each.rows)
    if height.rows == MOST[form] and w.parts["data"].nbytes > LARGE:
        return None
    variant = Variant(form, w.form.name == "fp8_block", height.rows)
    units, tiles = columns // UNIT, -(-w.shape[0] // (16 * height.stack))
    shared_out = min(height.programs // tiles, units // (WARPS * height.units))
    parts = max(1, shared_out, -(-rows * units * variant.unit_bytes // height.room))
    per_part = -(-units // parts)
    return Cut(variant, tiles, per_part, -(-units // per_part))


def products(x: Rows, w: QuantTensor, bias_N: Tensor | None, how: Cut) -> Tensor:
    """[P, T, N]: FP32 parts whose sum is the product, or, where there is one, the product in BF16.

    bias_N: BF16.  how: what `cut_of` returned.  The kernel reads weights before the one in front of it has ended,
    unless that had to make copies of them.
    """
    form = w.form.name
    scale = x.parts.get("scale" if FORMATS[form] == FP8 else "global_scale")
    scale = scale.reshape(-1, scale.shape[-1]) if scale is not None and scale.dim() else scale
    strides = (0, 0) if scale is None or not scale.dim() else scale.stride()
    stored = w.parts["data"], w.parts["scale"], bias_N
    values, data, of_w = by_16_bytes(operands(x)), by_16_bytes(w.parts["data"]), w.parts["scale"].contiguous()
    bias, coarse = None if bias_N is None else bias_N.contiguous(), coarse_rows(form, w.segments, data.device)
    ahead = all(mine is given for mine, given in zip((data, of_w, bias), stored, strict=True))
    rows, columns = len(values), w.shape[0]
    y = values.new_empty(how.parts, rows, columns, dtype=torch.bfloat16 if how.parts == 1 else torch.float32)
    arguments = FewC(
        values.data_ptr(), pointer(scale), data.data_ptr(), of_w.data_ptr(), pointer(w.parts.get("global_scale")),
        pointer(coarse), pointer(bias), y.data_ptr(), values.stride(0) * values.element_size(),
        data.stride(0) * data.element_size(), of_w.stride(0) * of_w.element_size(), *strides, rows, columns,
        w.columns // UNIT, how.per_part, how.parts,
    )  # fmt: skip
    with torch.cuda.device(y.device):
        kernel = loaded(how.variant, torch.cuda.current_device()).kernel
        launch(kernel, how.tiles * how.parts, 32 * WARPS, [arguments], how.shared(rows), ahead=ahead)
    return y


def operands(x: Rows) -> Tensor:
    """[T, K]: E4M3 codes, or BF16 numbers."""
    values = exact(x) if x.encoding.name in ("mxfp8", "nvfp4") else x.data
    return values.reshape(-1, values.shape[-1])


def by_16_bytes(rows: Tensor) -> Tensor:
    """The kernel reads rows so; a copy of those that lie otherwise."""
    even = rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.element_size() % 16 == 0
    return rows if even and rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
