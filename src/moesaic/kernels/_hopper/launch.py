"""From tensors to launches: rows are sorted and encoded, both products run in one kernel, a token's results are summed.

Letters: T tokens, A experts per token, R = T A routed rows, E experts, D hidden size, I expert width, B tiles of rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import gcd

import torch
from torch import Tensor

from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper.driver import Module, TensorMap, described, launch, tensor_map
from moesaic.kernels._hopper.variants import Variant
from moesaic.kernels.ops import ExpertWeights

PREPARERS, COMBINERS = 512, 128
SORTERS, MANY = 8, 2048
"""Thread blocks that share the sorting of so many rows or more."""
I32, I64, PTR, F32 = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p, ctypes.c_float


class WeightC(ctypes.Structure):
    """Weight in values.cuh."""

    _fields_ = (("scales", PTR), ("scales_expert", I64), ("scales_row", I64), ("top", PTR), ("bias", PTR),
                ("stages", I32), ("scale_bytes", I32), ("rows", I32), ("tiles", I32))  # fmt: skip


class RowsC(ctypes.Structure):
    """Rows in values.cuh."""

    _fields_ = (("data", PTR), ("scales", PTR), ("stride", I64), ("scale_row", I32), ("scale_group", I32))


class Arguments(ctypes.Structure):
    _fields_ = (("first", WeightC), ("second", WeightC), ("x", RowsC), ("h", RowsC), ("wide", PTR), ("y", PTR),
                ("order", PTR), ("tiles", PTR), ("ids", PTR), ("counters", PTR), ("weights", PTR), ("sum", PTR),
                ("experts", I32), ("tile_limit", I32), ("top_k", I32), ("columns", I32), ("width", I32),
                ("hidden", I32), ("phases", I32), ("once", I32), ("likely", I32), ("lead", I32), ("parts", I32),
                ("groups", I32), ("rows", I32), ("band", I32), ("limit", F32), ("alpha", F32))  # fmt: skip


class Maps(ctypes.Structure):
    _fields_ = tuple((name, TensorMap) for name in ("first", "second", "h"))


class Preparation(ctypes.Structure):
    _fields_ = (("source", PTR), ("ids", PTR), ("given", PTR), ("rows", RowsC), ("order", PTR), ("tiles", PTR),
                ("counters", PTR), ("source_stride", I64), ("tokens", I32), ("columns", I32), ("width", I32),
                ("routed", I32), ("experts", I32), ("counter_count", I32), ("given_row", I32),
                ("given_group", I32))  # fmt: skip


class Loaded:
    """The compiled kernels of a variant."""

    def __init__(self, variant: Variant) -> None:
        module = Module(code.machine_code(variant.defines, variant.sizes))
        self.shared, self.threads = module.integer("room_bytes"), module.integer("threads")
        self.experts = module.function("experts", self.shared)
        self.prepare, self.prepare_encoded = module.function("prepare"), module.function("prepare_encoded")
        self.combine, self.module = module.function("combine"), module


@cache
def loaded(variant: Variant, device: int) -> Loaded:
    """device: the current one, on which the code is loaded."""
    return Loaded(variant)


@cache
def processors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def fitted(variant: Variant, *weights: QuantTensor) -> Variant:
    """The variant for these very weights: how many bytes of their scales can be copied together."""
    found = ((each.parts["data"], each.parts.get("scale")) for each in weights)
    rows = (scale for data, scale in found if scale is not None and scale.dim() == data.dim())
    sizes = [(part.data_ptr(), *(stride * part.element_size() for stride in part.stride()[:-1])) for part in rows]
    step = gcd(16, *(size for each in sizes for size in each))
    if step >= max(4, variant.scale_bytes):
        return variant
    return replace(variant, aligned=step if step >= 4 else 0)


def up(size: int, step: int) -> int:
    return -(-size // step) * step


@dataclass(frozen=True)
class Stored:
    """Encoded rows as the kernels read them: width elements each (K, with zeros behind it), scales or None.

    Scales of groups of sorted rows lie group by group: [G, R].
    """

    data: Tensor
    scales: Tensor | None
    scale_row: int = 0
    scale_group: int = 0

    @property
    def width(self) -> int:
        return self.data.shape[1]

    @property
    def row_bytes(self) -> int:
        return self.data.stride(0) * self.data.element_size()

    def packed(self) -> RowsC:
        scales = None if self.scales is None else self.scales.data_ptr()
        return RowsC(self.data.data_ptr(), scales, self.row_bytes, self.scale_row, self.scale_group)


@dataclass(frozen=True)
class Routed:
    """Sorted rows. order INT32 [R]: sorted row -> t A + a.  tiles INT32 [B, 4]: expert, first, rows, rows rounded up.

    parts, groups: see Arguments in values.cuh.  ids: of a token alone.
    """

    order_R: Tensor
    tiles_B4: Tensor
    counters: Tensor
    top_k: int
    parts: int
    groups: int
    ids: Tensor | None = None


def room_for_rows(variant: Variant, count: int, columns: int, like: Tensor, static: Tensor | None,
                  sorted_: bool) -> Stored:  # fmt: skip
    """Uninitialised storage. static: the scale of a static encoding."""
    width = up(columns, max(128, variant.elements))
    kind = torch.float8_e4m3fn if variant.eight_bit else torch.float16 if variant.halves else torch.bfloat16
    data = like.new_empty(count, width, dtype=kind)
    if static is not None or variant.encoding in (0, 5):
        return Stored(data, static)
    if variant.encoding != 4:
        return Stored(data, like.new_empty(count, dtype=torch.float32), 1, 0)
    groups = width // 128
    if sorted_:
        return Stored(data, like.new_empty(groups, count, dtype=torch.float32), 1, count)
    return Stored(data, like.new_empty(count, groups, dtype=torch.float32), groups, 1)


def prepare(variant: Variant, x: Rows | Tensor, ids_TA: Tensor, w: ExpertWeights,
            static: Tensor | None = None) -> tuple[Stored, Routed]:  # fmt: skip
    """Sorts ids, and encodes plain BF16 rows (static: a static encoding's scale) or puts encoded ones in order of K."""
    given = isinstance(x, Rows)
    source = x.parts.get("exact", x.data) if isinstance(x, Rows) else x
    source = source if is_aligned(source) else source.contiguous()
    tokens, columns = source.shape
    scales = scales_of(variant, x) if isinstance(x, Rows) else None
    routed = room_for_routing(variant, ids_TA, w)
    stored = room_for_rows(variant, tokens, columns, source, static, False)
    as_is = (given or variant.encoding == 0) and variant.in_order
    as_is = as_is and (columns, source.dtype) == (stored.width, stored.data.dtype)
    if given and (as_is or (scales is not None and not scales.dim())):
        stored = shared_scales(stored, scales)
    stored = replace(stored, data=source) if as_is else stored
    warps = 0 if as_is else tokens * (1 if variant.encoding in (3, 7) and not given else stored.width // 128)
    strides = (scales.stride(0), scales.stride(1)) if scales is not None and scales.dim() == 2 else (0, 0)
    arguments = Preparation(
        source.data_ptr(), ids_TA.data_ptr(), None if scales is None else scales.data_ptr(), stored.packed(),
        routed.order_R.data_ptr(), routed.tiles_B4.data_ptr(), routed.counters.data_ptr(),
        source.stride(0) * source.element_size(), tokens, columns, stored.width, ids_TA.numel(), w.w13.shape[0],
        routed.counters.numel(), strides[0], strides[1] if variant.encoding == 4 else 0,
    )  # fmt: skip
    kernels = loaded(variant, torch.cuda.current_device())
    sorters = SORTERS if ids_TA.numel() >= MANY else 1
    blocks = up(sorters + -(-warps // (PREPARERS // 32)), sorters)
    launch(kernels.prepare_encoded if given else kernels.prepare, blocks, PREPARERS, [arguments], cluster=sorters)
    return stored, routed


def is_aligned(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def scales_of(variant: Variant, x: Rows) -> Tensor | None:
    """Of rows that came encoded, as far as a kernel has to apply them."""
    name = "global_scale" if variant.encoding in (6, 7) else "scale"
    return None if variant.encoding in (0, 5) else x.parts.get(name)


def shared_scales(stored: Stored, scales: Tensor | None) -> Stored:
    """Scales that need no copy: of rows that stay where they are, or one of all."""
    if scales is None:
        return stored
    if not scales.dim():
        return replace(stored, scales=scales, scale_row=0, scale_group=0)
    return replace(stored, scales=scales, scale_row=scales.stride(0), scale_group=scales.stride(1))


def room_for_routing(variant: Variant, ids_TA: Tensor, w: ExpertWeights) -> Routed:
    rows, (experts, _, _), width, stack = ids_TA.numel(), w.w13.shape, w.w2.columns, variant.tile.stack
    limit = max(1, rows if len(ids_TA) == 1 else min(experts, rows) + rows // variant.tile.height)
    groups = up(width, max(128, variant.elements)) // 128 if variant.encoding == 4 else 1
    parts = (groups if variant.encoding == 4 else 1) if variant.needs_wide else -(-width // (64 * stack))
    lone = ids_TA if len(ids_TA) == 1 else None
    sums = 0 if lone is None else tiles_of(w.w2.shape[1], variant)
    counters = ids_TA.new_empty(4 + limit * (1 + groups) + sums)
    return Routed(ids_TA.new_empty(rows), ids_TA.new_empty(limit, 4), counters, ids_TA.shape[1], parts, groups, lone)


@lru_cache(maxsize=4096)
def weight_maps(first: int, second: int, shape: tuple[int, int, int], row_bytes: tuple[int, int],
                box: tuple[int, int]) -> tuple[TensorMap, TensorMap]:  # fmt: skip
    """Of both weights. first, second: addresses.  shape: E, I, D.  row_bytes: of K.  box: bytes and rows of a tile.

    The first one's axes: bytes of a row, 8 rows, gate or up, groups of 8 rows, experts: 8 gate rows lie before the 8 up
    rows of the same elements in shared memory.
    """
    (experts, width, hidden), (k1, k2), (wide, rows) = shape, row_bytes, box
    strides = (k1, width * k1, 8 * k1, 2 * width * k1)
    return (
        tensor_map(first, (k1, 8, 2, width // 8, experts), strides, (wide, 8, 2, rows // 16, 1)),
        tensor_map(second, (k2, hidden, experts), (k2, hidden * k2), (wide, rows, 1)),
    )  # fmt: skip


def row_map(variant: Variant, x: Stored) -> TensorMap:
    """Of sorted rows."""
    return described(x.data.data_ptr(), (x.row_bytes, len(x.data)), (x.row_bytes,), (128, variant.step))


def all_maps(variant: Variant, w: ExpertWeights, h: Stored) -> Maps:
    (experts, _, hidden), width = w.w13.shape, w.w2.columns
    parts = w.w13.parts["data"], w.w2.parts["data"]
    k1, k2 = (part.stride(1) * part.element_size() for part in parts)
    places = parts[0].data_ptr(), parts[1].data_ptr()
    box = variant.row_bytes, 128 * variant.tile.stack
    first, second = weight_maps(*places, (experts, width, hidden), (k1, k2), box)
    if variant.tile.narrow:
        return Maps(first, second, first)
    return Maps(first, second, row_map(variant, h))


def weight_values(variant: Variant, w: QuantTensor, bias: Tensor | None, tiles: int) -> WeightC:
    scale, top = w.parts.get("scale"), w.parts.get("global_scale")
    expert = row = count = 0
    if scale is not None:
        size = scale.element_size()
        expert, row = scale.stride(0) * size, (scale.stride(1) if scale.dim() > 1 else 1) * size
        count = scale.shape[-1] * size if scale.dim() == 3 else size
    return WeightC(
        None if scale is None else scale.data_ptr(), expert, row, None if top is None else top.data_ptr(),
        None if bias is None else bias.data_ptr(), -(-w.columns // variant.elements), count, w.segments[0], tiles,
    )  # fmt: skip


def tiles_of(columns: int, variant: Variant) -> int:
    """Of the second product."""
    return -(-columns // (128 * variant.tile.stack))


MOST_SUMMED = 32
"""Choices of a token alone that `multiply` may add up: a lane of a warp has one."""


def sums(variant: Variant, ids_TA: Tensor) -> bool:
    """Whether `multiply` can add up a token's results: of one alone, by tiles of few rows."""
    tokens, top_k = ids_TA.shape
    return tokens == 1 and variant.tile.narrow and 0 < top_k <= MOST_SUMMED


def multiply(variant: Variant, x: Stored, w: ExpertWeights, routed: Routed, phases: int = 3, h: Stored | None = None,
             wide: bool = False, weights: Tensor | None = None) -> tuple[Stored, Tensor, Tensor | None]:  # fmt: skip
    """(activated rows in sorted order, results BF16 [R, D] in the rows' places before sorting; of -1 ids undefined,
    the activated rows before they were encoded).

    phases: 1 only the first product, 2 only the second (of h), 3 both.  wide: keep those rows where that is not needed.
    weights: FP32 [1, A] of a token alone, where `sums` allows; the results are then their weighted sum [1, D].
    """
    (_, _, hidden), width, tile = w.w13.shape, w.w2.columns, variant.tile
    rows = len(routed.order_R)
    h = h or room_for_rows(variant, rows, width, x.data, w.between_scale, not tile.narrow)
    y = x.data.new_empty(rows, hidden, dtype=torch.bfloat16)
    total = None if weights is None else y.new_empty(1, hidden)
    before = x.data.new_empty(rows, h.width, dtype=torch.float32) if wide or variant.needs_wide else None
    first = weight_values(variant, w.w13, w.biases[0] if w.biases else None, -(-width // (64 * tile.stack)))
    second = weight_values(variant, w.w2, w.biases[1] if w.biases else None, tiles_of(hidden, variant))
    oai, once = w.activation.kind == "swiglu_oai", rows <= w.w13.shape[0] * tile.height
    arguments = Arguments(
        first, second, x.packed(), h.packed(), None if before is None else before.data_ptr(), y.data_ptr(),
        routed.order_R.data_ptr(), routed.tiles_B4.data_ptr(), None if routed.ids is None else routed.ids.data_ptr(),
        routed.counters.data_ptr(), None if weights is None else weights.data_ptr(),
        None if total is None else total.data_ptr(), w.w13.shape[0], len(routed.tiles_B4), routed.top_k, width, h.width,
        hidden, phases, once, once and rows >= w.w13.shape[0] * 2, lead_of(w, rows) if routed.ids is not None else 0,
        routed.parts, routed.groups, 0, 0, w.activation.limit, w.activation.alpha if oai else 0.0,
    )  # fmt: skip
    device = torch.cuda.current_device()
    kernels = loaded(variant, device)
    items = len(routed.tiles_B4) * (first.tiles * (phases & 1) + second.tiles * (phases >> 1) + 1)
    blocks, given = min(processors(device) * tile.blocks, items), [all_maps(variant, w, h), arguments]
    launch(kernels.experts, blocks, kernels.threads, given, kernels.shared)
    return h, y if total is None else total, before


BAND = 16
"""Tiles of rows of a dense product that run side by side; see fetch.cuh."""


def linear(variant: Variant, x: Stored, w: QuantTensor, bias_N: Tensor | None) -> Tensor:
    """BF16 [T, N] = x w^T + bias: the second product of a layer whose only expert takes all rows.

    x: as `as_they_are` or `in_order` makes them.  w: [N, K] dense: in FP8, blocks do not begin anew within it (scales
    dense along K); or INT4 without zero points.  bias_N: BF16, dense.  K is a multiple of 16 (INT4: 32), N of 8.
    """
    rows, n, tile = len(x.data), w.shape[0], variant.tile
    y = x.data.new_empty(rows, n, dtype=torch.bfloat16)
    data, scale = w.parts["data"], scales_by_row(w)
    size, tiles = scale.element_size(), -(-n // (128 * tile.stack))
    variant = fitted(variant, w) if w.form.name == "int4" else variant
    weight = WeightC(scale.data_ptr(), 0, scale.stride(0) * size, None, None if bias_N is None else bias_N.data_ptr(),
                     -(-w.columns // variant.elements), scale.shape[-1] * size, n, tiles)  # fmt: skip
    box = variant.row_bytes, 128 * tile.stack, 1
    columns = described(data.data_ptr(), (data.shape[1], n, 1), (data.stride(0), n * data.stride(0)), box)
    arguments = Arguments(second=weight, h=x.packed(), y=y.data_ptr(), experts=1, top_k=1, columns=w.columns,
                          width=x.width, hidden=n, phases=2, rows=rows, band=BAND)  # fmt: skip
    kernels = loaded(variant, device := torch.cuda.current_device())
    blocks = min(processors(device) * tile.blocks, -(-rows // tile.height) * tiles)
    launch(kernels.experts, blocks, kernels.threads, [Maps(columns, columns, row_map(variant, x)), arguments],
           kernels.shared)  # fmt: skip
    return y


def as_they_are(x_TK: Tensor, scale: Tensor) -> Stored:
    """Rows that are multiplied in their own order: E4M3, dense, from a multiple of 16 bytes on.  scale: FP32, [T, G] of
    128 elements each where the weight's are of blocks; else [T, 1], or one of all."""
    return Stored(x_TK, scale, *(scale.stride() if scale.dim() else (0, 0)))


def in_order(variant: Variant, x_TK: Tensor) -> Stored:
    """BF16 rows, which begin at multiples of 16 bytes, in the order of K in which codes are decoded: what `prepare`
    does of rows that nobody chose."""
    tokens, columns = x_TK.shape
    stored = room_for_rows(variant, tokens, columns, x_TK, None, False)
    counters = x_TK.new_empty(1, dtype=torch.int32)
    arguments = Preparation(
        source=x_TK.data_ptr(), rows=stored.packed(), counters=counters.data_ptr(), tokens=tokens, columns=columns,
        source_stride=x_TK.stride(0) * x_TK.element_size(), width=stored.width,
    )  # fmt: skip
    blocks = 1 + -(-tokens * (stored.width // 128) // (PREPARERS // 32))
    launch(loaded(variant, torch.cuda.current_device()).prepare, blocks, PREPARERS, [arguments])
    return stored


def scales_by_row(w: QuantTensor) -> Tensor:
    """Of a weight, as a dense product reads them: of blocks and groups as they are, else one for each row."""
    scale = w.parts["scale"]
    if w.form.name != "fp8_tensor":
        return scale
    if len(w.segments) == 1:
        return scale.reshape(1).expand(w.segments[0])
    from moesaic.kernels._triton.gemm import coarse_rows

    return scale.reshape(-1)[coarse_rows(w.form.name, w.segments, scale.device)]


def lead_of(w: ExpertWeights, experts: int) -> int:
    """Nanoseconds that an H100 takes to read so many experts' first weights, about; no more than 12 us."""
    return min(12000, experts * w.w13.nbytes // w.w13.shape[0] // 2700)


def combine(variant: Variant, y_RD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """sum over a of weights[t, a] y[t A + a] where ids[t, a] >= 0, in FP32."""
    (tokens, top_k), hidden = ids_TA.shape, y_RD.shape[1]
    out = y_RD.new_empty(tokens, hidden)
    pointers = [PTR(each.data_ptr()) for each in (y_RD, ids_TA, weights_TA, out)]
    grid = -(-tokens * (hidden // 8) // COMBINERS)
    sizes = [I32(tokens), I32(hidden), I32(top_k)]
    launch(loaded(variant, torch.cuda.current_device()).combine, grid, COMBINERS, [*pointers, *sizes])
    return out
