"""Dense products of few rows (few.cu), with weights of 4, 8 and 16 bits, and of dozens (dozens.cu), of 4 and 8.

Letters: T rows, N outputs, P parts of K.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper import variants as experts
from moesaic.kernels._hopper.driver import Module, launch
from moesaic.kernels._hopper.variants import (
    DENSE,
    FORMATS,
    PROCESSORS,
    dense_tile,
    dense_variant,
    int4_tile,
    int4_time,
    variant_of,
)
from moesaic.kernels._triton.gemm import coarse_rows
from moesaic.kernels.exact import exact

I32, I64, PTR = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p
UNIT = 128
"""Elements of K."""
SHARED = 226 << 10
"""Bytes of shared memory that a thread block may have at most."""
FP8 = FORMATS["fp8_block"]
SCALES = ("bfloat16", "float16")
"""Of INT4."""


class DenseC(ctypes.Structure):
    """Dense in dense.cuh."""

    _fields_ = (("x", PTR), ("x_scales", PTR), ("w", PTR), ("w_scales", PTR), ("top", PTR), ("coarse", PTR),
                ("bias", PTR), ("y", PTR), ("x_stride", I64), ("w_stride", I64), ("scale_stride", I64),
                ("scale_row", I32), ("scale_group", I32), ("rows", I32), ("columns", I32), ("units", I32),
                ("per_part", I32), ("parts", I32), ("chunks", I32))  # fmt: skip


@dataclass(frozen=True)
class Height:
    """A kernel for thread blocks of up to so many rows of x.  name: of its source, and in it.  tall: rows of w in a
    thread block.  threads: of it.  shares: what of these share out its part of K.  least: units that each is to have.
    programs: thread blocks that a GPU has room for.  room: bytes for rows of x.  reserved: bytes in front of them.
    constants: of its source."""

    rows: int
    name: str
    tall: int
    threads: int
    shares: int
    least: int
    programs: int
    room: int
    reserved: int
    constants: tuple[tuple[str, int], ...]

    @property
    def grouped(self) -> bool:
        """Whether products are of groups of warps."""
        return self.name == "dozens"


def few(rows: int, stack: int, least: int, room: int) -> Height:
    """Of few.cu. stack: blocks of 16 rows of w."""
    return Height(rows, "few", 16 * stack, 256, 8, least, 264, room << 10, 256, (("STACK", stack), ("PER_SM", 2)))


FEW = few(8, 2, 2, 72), few(16, 2, 1, 72)
DOZENS = Height(64, "dozens", 128, 512, 2, 1, 132, 224 << 10, 1024, (("HALVES", 0),))
PLAIN = {(rows, stack): few(rows, stack, 1, 208) for rows in (8, 16) for stack in (1, 2)}
"""Of weights in BF16, where nobody adds up parts; by rows of x and blocks of 16 rows of w."""
SMALLEST, PLAIN_LARGE = 1024, {4: 64 << 20, 8: 32 << 20, 16: 20 << 20}
"""Of these: rows of w below which thread blocks are too few, and bytes above which the vendor's library is as fast, by
rows of x up to so many."""
HEIGHTS = {FP8: (FEW[0], DOZENS)} | {FORMATS[name]: (*FEW, DOZENS) for name in ("mxfp8", "mxfp4", "nvfp4", "int4")}
"""By format, as measured on an H200 (docs/performance-log.md)."""
MOST = {form: 64 if form == FP8 else 256 if form == FORMATS["int4"] else 128 for form in HEIGHTS}
"""Rows of x. Of more, weights that BF16 holds are decoded once, for the vendor's library (`_triton/linear_decoded`)."""
ALWAYS = {FP8: 8, FORMATS["mxfp8"]: 8, FORMATS["mxfp4"]: 16, FORMATS["nvfp4"]: 16, FORMATS["int4"]: 16}
"""Rows for which the size of a weight does not matter."""
MOST_PARTS = 8
"""Of K, where fewer have room; somebody must add them up."""
BETTER = {FP8: range(9, 33)}
"""Rows for which Triton is faster. FP8 is only as terms: behind kernels of another kind, and with a sum to make, Triton
is."""


@dataclass(frozen=True)
class Variant:
    """form: of FORMATS.  blocks: FP8 scales are of blocks and groups.  half_scales: those of INT4 are IEEE halves, not
    BF16."""

    form: int
    blocks: bool
    height: Height
    half_scales: bool = False

    @property
    def defines(self) -> dict[str, int]:
        made = {"FORMAT": self.form, "BLOCKS": int(self.blocks), "HEIGHT": self.height.rows,
                "HALF_SCALES": int(self.half_scales)}  # fmt: skip
        return made | dict(self.height.constants) | ({"ROWS8": int(self.form == FP8)} if self.height.grouped else {})

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of columns that products of groups of warps come in."""
        return (self.height.rows,) if self.height.grouped else ()

    @property
    def unit_bytes(self) -> int:
        """Of a row of x."""
        return UNIT * (1 if self.form == FP8 else 2)

    def unit_room(self, rows: int) -> int:
        """Bytes of shared memory for a unit of as many rows as a thread block has of so many."""
        rows = self.height.rows if self.height.grouped else rows
        return rows * self.unit_bytes + 4 * self.height.rows * self.blocks


class Loaded:
    """The compiled kernel of a variant."""

    def __init__(self, variant: Variant) -> None:
        height = variant.height
        self.module = Module(code.machine_code(variant.defines, variant.sizes, main=f"{height.name}.cu"))
        self.kernel = self.module.function(height.name, SHARED)


@cache
def loaded(variant: Variant, device: int) -> Loaded:
    """device: the current one, on which the code is loaded."""
    return Loaded(variant)


@dataclass(frozen=True)
class Cut:
    """How a product is shared out: tiles of rows of w, parts of K and the units of each, blocks of rows of x."""

    variant: Variant
    tiles: int
    per_part: int
    parts: int
    blocks: int

    def shared(self, rows: int) -> int:
        """Bytes of shared memory: rows of x and scales of their groups, and later the sums."""
        height = self.variant.height
        sums = 4 * height.shares * height.rows * (height.tall + 4)
        return height.reserved + max(self.per_part * self.variant.unit_room(rows), sums)


def cut_of(x: Rows, w: QuantTensor, bias_N: Tensor | None, terms: bool = True) -> Cut | None:
    """From formats and shapes alone; None for what is not these kernels', or faster elsewhere.

    terms: somebody else adds up the parts.
    """
    if bias_N is not None and bias_N.dtype != torch.bfloat16:
        return None
    rows, columns, form = x.data.shape[:-1].numel(), w.columns, FORMATS[w.form.name]
    if (w.form.name, x.encoding.name) not in DENSE or columns % UNIT or not columns or len(w.shape) != 2:
        return None
    if form == FORMATS["int4"] and (w.form.group != UNIT or w.form.zero_points or w.form.scale_dtype not in SCALES):
        return None
    if not 0 < rows <= MOST[form] or rows in BETTER.get(form, ()) or not w.shape[0] or (form == FP8 and not terms):
        return None
    if w.parts["data"].nbytes > largest(form, rows):
        return None
    heights = HEIGHTS[form]
    height = next((each for each in heights if rows <= each.rows), heights[-1])
    half = form == FORMATS["int4"] and w.form.scale_dtype == "float16"
    how = shared_out(Variant(form, w.form.name == "fp8_block", height, half), rows, w.shape[0], columns // UNIT)
    if form == FORMATS["int4"] and rows > experts.FEW and many_cut(x, w, bias_N) is not None:
        return None if int4_time(rows, w.shape[0], columns)[0] < time_of(how, rows) else how
    return how


def many_cut(x: Rows, w: QuantTensor, bias_N: Tensor | None) -> experts.Variant | None:
    """The kernel of `launch.linear` for a product of many rows, in FP8 or INT4; None as `cut_of`."""
    if len(w.shape) != 2 or (bias_N is not None and (bias_N.dtype != torch.bfloat16 or bias_N.stride(0) != 1)):
        return None
    rows, pair = x.data.shape[:-1].numel(), (w.form.name, x.encoding.name)
    if pair not in DENSE or not even_by_shape(w.parts["data"]):
        return None
    if pair == ("int4", "bf16"):
        known = w.form.scale_dtype in SCALES and w.form.group in (32, 64, 128) and not w.form.zero_points
        known = known and w.parts["scale"].stride(1) == 1
        tile = int4_tile(rows, w.segments, w.columns) if known else None
        return None if tile is None else variant_of(w.form, x.encoding, tile)
    if FORMATS[w.form.name] != FP8:
        return None
    tile = dense_tile(rows, w.segments, w.columns, w.form.name == "fp8_block")
    return None if tile is None else dense_variant(w.form.name, tile)


def largest(form: int, rows: int) -> int:
    """Bytes of a weight above which Triton is as fast, or faster: measured at 5 MB, 8, 10, 15, 29, 66 and 132."""
    if rows <= ALWAYS[form]:
        return sys.maxsize
    return 12 << 20 if 64 < rows <= 128 or (rows <= 32 and form == FORMATS["int4"]) else 16 << 20


def shared_out(variant: Variant, rows: int, columns: int, units: int) -> Cut:
    """rows: of x.  columns: of the result.  units: of K."""
    height = variant.height
    tiles, blocks = -(-columns // height.tall), -(-rows // height.rows)
    fewest = -(-units // (height.room // variant.unit_room(rows)))
    most = units // (height.shares * height.least)
    if height.grouped:
        some = range(fewest, max(fewest, min(MOST_PARTS, most)) + 1)
        parts = min(some, key=lambda parts: cost(tiles * blocks, parts, units, rows * columns))
    else:
        parts = max(fewest, min(height.programs // tiles, most))
    per_part = -(-units // parts)
    return Cut(variant, tiles, per_part, -(-units // per_part), blocks)


def cost(tiles: int, parts: int, units: int, results: int) -> float:
    """About what a product takes, in the time of a unit (0.75 us on an H200): rounds of thread blocks, which take five
    units beside their own; and the reading of what parts leave."""
    rounds, each = -(-tiles * parts // PROCESSORS), -(-units // parts)
    return rounds * (5 + each) + parts * results / 800_000


def time_of(how: Cut, rows: int) -> float:
    """About what dozens of rows take, in microseconds of an H200: a fifth more than `cost` has it, which compares cuts
    of one product, and leaves out what all of them have in common."""
    units, results = how.per_part * how.parts, rows * how.tiles * how.variant.height.tall
    return 0.9 * cost(how.tiles * how.blocks, how.parts, units, results)


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
    arguments = DenseC(
        values.data_ptr(), pointer(scale), data.data_ptr(), of_w.data_ptr(), pointer(w.parts.get("global_scale")),
        pointer(coarse), pointer(bias), y.data_ptr(), values.stride(0) * values.element_size(),
        data.stride(0) * data.element_size(), of_w.stride(0) * of_w.element_size(), *strides, rows, columns,
        w.columns // UNIT, how.per_part, how.parts, 0,
    )  # fmt: skip
    begin(how, arguments, y.device, ahead)
    return y


def begin(how: Cut, arguments: DenseC, device: torch.device, ahead: bool) -> None:
    """Launches the kernel."""
    with torch.cuda.device(device):
        kernel = loaded(how.variant, torch.cuda.current_device()).kernel
        programs, shared = how.tiles * how.parts * how.blocks, how.shared(arguments.rows)
        launch(kernel, programs, how.variant.height.threads, [arguments], shared, ahead=ahead)


def plain_cut(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None) -> Cut | None:
    """As `cut_of`, of a weight in BF16. None, too, for one that does not lie as the kernel reads it."""
    rows, (columns, k) = x_TD.shape[:-1].numel(), w_ND.shape
    if {x_TD.dtype, w_ND.dtype, torch.bfloat16 if bias_N is None else bias_N.dtype} != {torch.bfloat16}:
        return None
    limit = next((most for limit, most in PLAIN_LARGE.items() if 0 < rows <= limit), 0)
    if columns < SMALLEST or not 0 < 2 * columns * k <= limit or k % 32 or x_TD.shape[-1] != k or not even(w_ND):
        return None
    stack = 1 if columns < 32 * PROCESSORS else 2
    variant, units = Variant(FORMATS["bf16"], False, PLAIN[8 if rows <= 8 else 16, stack]), -(-k // UNIT)
    if units * variant.unit_room(rows) > variant.height.room:
        return None
    return Cut(variant, -(-columns // variant.height.tall), units, 1, 1)


def plain(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None, how: Cut) -> Tensor:
    """[.., N] in BF16.  bias_N: BF16.  how: what `plain_cut` returned.

    The kernel reads w and bias before the one in front of it has ended, which must not be what makes them.
    """
    values, (columns, k) = by_16_bytes(x_TD.reshape(-1, x_TD.shape[-1])), w_ND.shape
    bias = None if bias_N is None else bias_N.contiguous()
    y = values.new_empty(*x_TD.shape[:-1], columns)
    arguments = DenseC(
        values.data_ptr(), None, w_ND.data_ptr(), None, None, None, pointer(bias), y.data_ptr(), 2 * values.stride(0),
        2 * w_ND.stride(0), 0, 0, 0, len(values), columns, how.per_part, how.per_part, 1, k // 32,
    )  # fmt: skip
    begin(how, arguments, y.device, bias is bias_N)
    return y


def operands(x: Rows) -> Tensor:
    """[T, K]: E4M3 codes, or BF16 numbers."""
    values = exact(x) if x.encoding.name in ("mxfp8", "nvfp4") else x.data
    return values.reshape(-1, values.shape[-1])


def by_16_bytes(rows: Tensor) -> Tensor:
    """The kernel reads rows so; a copy of those that lie otherwise."""
    return rows if even(rows) else rows.clone(memory_format=torch.contiguous_format)


def even(rows: Tensor) -> bool:
    """Whether each row lies in one piece that begins at a multiple of 16 bytes."""
    return rows.stride(1) == 1 and rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.element_size() % 16 == 0


def even_by_shape(rows: Tensor) -> bool:
    """The same, of a tensor that may have no memory."""
    places = rows.stride(0), rows.storage_offset()
    return rows.stride(1) == 1 and all(place * rows.element_size() % 16 == 0 for place in places)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
