"""Which kernel: the compile-time constants for a weight format, an encoding of rows, and a tile size. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moesaic.contracts.scheme import Encoding, WeightFormat

FORMATS = {"bf16": 0, "fp8_tensor": 1, "fp8_channel": 1, "fp8_block": 1, "mxfp8": 2, "mxfp4": 3, "nvfp4": 4, "int4": 5}
"""As formats.cuh numbers them."""
ENCODINGS = {("bf16", False): 0, ("fp8_tensor", True): 1, ("fp8_tensor", False): 2, ("fp8_token", False): 3,
             ("fp8_group128", False): 4, ("mxfp8", False): 5, ("nvfp4", True): 6, ("nvfp4", False): 7}  # fmt: skip
"""As encode.cuh numbers them."""
EIGHT_BIT = ("fp8_tensor", "fp8_token", "fp8_group128")
PAIRS = frozenset(
    {("bf16", "bf16"), ("fp8_block", "fp8_group128"), ("fp8_tensor", "fp8_tensor"), ("fp8_channel", "fp8_token"),
     ("int4", "fp8_tensor"), ("int4", "fp8_token")}
    | {(form, "bf16") for form in ("fp8_tensor", "fp8_channel", "fp8_block", "mxfp8", "mxfp4", "nvfp4", "int4")}
    | {("mxfp8", "mxfp8"), ("mxfp4", "mxfp8"), ("nvfp4", "nvfp4")}
)  # fmt: skip
"""Weight formats and encodings that meet in a tensor core as they are."""
HEIGHTS = (8, 16, 32, 64, 80, 96, 128, 160)
NARROW = 32
"""Tiles of up to so many rows of x are multiplied by warps, if nothing else is said."""
SMALL = 1 << 23
"""Elements of an expert's weights; see tile_for."""
FEW, PROCESSORS = 128, 132
"""Rows of a dense product below which Triton's kernels, which share K out, are faster; multiprocessors of an H100."""
SHARED = {1: 232448, 2: 115712, 3: 76800}
"""Bytes of shared memory that one of so many thread blocks of a multiprocessor can have."""


@dataclass(frozen=True)
class Tile:
    """height: rows of x.  stack: blocks of 128 weight rows.  blocks: thread blocks per multiprocessor.
    grouped: multiplied by groups of four warps, as high tiles are anyway."""

    height: int
    stack: int = 1
    blocks: int = 2
    grouped: bool = False

    @property
    def narrow(self) -> bool:
        return self.height <= NARROW and not self.grouped


@dataclass(frozen=True)
class Variant:
    """form, encoding: numbers as the sources have them.  codes: rows that come encoded hold E4M3 codes.  group: of INT4
    scales.  aligned: bytes of which all rows of scales along K begin at multiples (0: of 2).  half_scales: INT4's are
    IEEE halves, not BF16.  one_order: a tile of up to NARROW rows adds up in the order of the higher ones.
    zigzag: INT4 codes are so (pack.py).  See `defines`."""

    form: int
    encoding: int
    codes: bool
    tile: Tile
    block_scales: bool = False
    by_segment: bool = False
    group: int = 128
    aligned: int = 16
    half_scales: bool = False
    one_order: bool = False
    zigzag: bool = False

    @property
    def eight_bit(self) -> bool:
        """Whether rows are multiplied as E4M3; a few rows are cheaper in 16 bits, which hold their codes too."""
        return self.codes and not self.tile.narrow

    @property
    def halves(self) -> bool:
        """Whether operands are IEEE halves, not BF16."""
        return (self.form == 4 and self.encoding in (6, 7)) or (self.tile.narrow and self.form == 1 and self.codes)

    @property
    def needs_wide(self) -> bool:
        """Whether activated rows are kept in FP32 before they are encoded; as `!DIRECT` in room.cuh."""
        return self.encoding in (2, 3, 7) or (self.encoding == 4 and self.tile.stack == 1)

    @property
    def elements(self) -> int:
        """Of K per stage."""
        return 64 if self.form == 0 else 2 * self.row_bytes if self.form >= 3 else 128

    @property
    def row_bytes(self) -> int:
        """Of a weight row per stage; as W_ROW in decode.cuh."""
        return 64 if self.form >= 3 and not self.tile.narrow else 128

    @property
    def in_order(self) -> bool:
        """Whether rows are multiplied in their own order."""
        return self.form == 0 or (self.form == 1 and self.codes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of columns that products come in. Low tiles of many wait for memory anyway: coarse steps do there."""
        height = self.tile.height
        apart = self.form == 5 or (self.block_scales and not self.codes)  # sums of groups or blocks are kept apart
        spills = self.form in (3, 4) or (apart and not self.eight_bit)
        high = (32, 64, 96) if spills else (64, 72, 80, 96) if self.turns_full else (72, 80, 96, 112)
        some = {80: (32, 56, 64, 72), 96: (32, 64, 72, 80), 128: high, 160: (64, 96, 128, 144)}
        return (*some.get(height, range(self.step, height, self.step)), height)

    @property
    def turns_full(self) -> bool:
        """Whether full tiles are multiplied the other way round, which is cheaper; as TURNS_FULL in room.cuh."""
        return self.block_scales and self.encoding == 4 and (self.tile.height, self.tile.stack) == (128, 2)

    @property
    def step(self) -> int:
        """As STEP in room.cuh."""
        return 8 if self.tile.narrow else 16

    @property
    def scale_bytes(self) -> int:
        """Of a weight row, per stage; as SCALE_BYTES in room.cuh."""
        if self.form == 5:
            return self.elements // self.group * 2
        return self.elements // {2: 32, 3: 32, 4: 16}[self.form] if self.form in (2, 3, 4) else 0

    @property
    def scale_unit(self) -> int:
        """Bytes that are copied together, 4, 8 or 16; 0: copies are not possible."""
        return min(self.aligned, max(4, self.scale_bytes))

    def scale_room(self, stages: int) -> int:
        """Bytes of shared memory; as SCALE_SLOTS and SCALE_ROOM in room.cuh."""
        if not self.scale_bytes:
            return 16 * stages
        size = 16 if self.form == 5 and not self.tile.narrow else self.scale_bytes
        span = size // self.scale_bytes
        slots = stages if span == 1 else (stages + span - 2) // span + 1
        return 128 * self.tile.stack * size * slots

    @property
    def stages(self) -> int:
        """As many as fit into shared memory beside everything else, and are of use."""
        tile, slots = self.tile, 4 if self.tile.narrow else 3
        scaled = self.encoding not in (0, 4, 5)  # ROW_SCALES, ROW_TERMS in room.cuh
        terms = 8 if self.form == 4 or (self.form == 1 and not self.block_scales) else 4
        rows = tile.height if tile.narrow else min(tile.height, 64 // tile.stack)  # CHUNK in room.cuh
        fixed = 1024 + rows * (64 * tile.stack + 4) * 4
        if tile.narrow or (self.encoding == 4 and tile.stack == 1):
            fixed += 256 * (2 if tile.height < 32 else 4) * (8 if tile.narrow and self.encoding in (2, 3, 7) else 1)
        fixed += slots * 4 * (tile.height + (-(-tile.height // rows) * rows if scaled else 1))
        fixed += slots * 128 * tile.stack * terms
        stage = 128 * self.row_bytes * tile.stack + tile.height * self.elements * (1 if self.eight_bit else 2)
        stage += -(-tile.height // 32) * 128 if self.encoding == 4 else 0
        left = SHARED[tile.blocks] - fixed
        few = 10 if tile.height < 64 else 10 // tile.stack if tile.height == 64 else 4  # more are not faster
        most = 8 if tile.narrow else few
        return next((each for each in range(most, 2, -1) if each * stage + self.scale_room(each) <= left), 2)

    @property
    def defines(self) -> dict[str, int]:
        heights = (*self.sizes[:-1], *4 * (self.tile.height,))[:4]
        return {
            "FORMAT": self.form, "ROWS8": int(self.eight_bit), "HALVES": int(self.halves),
            "ENCODING": self.encoding, "MOST": self.tile.height, "NARROW": int(self.tile.narrow),
            "STACK": self.tile.stack, "BLOCKS_PER_SM": self.tile.blocks, "STAGES": self.stages,
            "ROOM_LIMIT": SHARED[self.tile.blocks],
            "BLOCKS": int(self.block_scales), "BY_SEGMENT": int(self.by_segment), "GROUP": self.group,
            "SCALE_UNIT": self.scale_unit,
            "ONE_ORDER": int(self.one_order), "ZIGZAG": int(self.zigzag), "HALF_SCALES": int(self.half_scales),
            **{f"HEIGHT_{i}": each for i, each in enumerate(heights)},
        }  # fmt: skip


DENSE = frozenset({
    ("fp8_block", "fp8_group128"), *((form, rows) for form in ("fp8_tensor", "fp8_channel") for rows in
                                     ("fp8_tensor", "fp8_token")),
    ("mxfp8", "mxfp8"), ("mxfp8", "bf16"), ("mxfp4", "mxfp8"), ("mxfp4", "bf16"), ("nvfp4", "nvfp4"), ("nvfp4", "bf16"),
    ("int4", "bf16"),
})  # fmt: skip
"""Formats of weights and encodings of rows that the kernels for dense products multiply (dense.py)."""
TILES = {
    8: Tile(8), 16: Tile(16, 2, 1), 17: Tile(16), 18: Tile(16, grouped=True), 32: Tile(32, 2, 1), 33: Tile(32),
    64: Tile(64, 2, 1), 80: Tile(80, 2, 1), 96: Tile(96, 2, 1), 128: Tile(128, 2, 1), 160: Tile(160, 1, 1),
}  # fmt: skip
"""Those that are the fastest somewhere. 18: of a token alone and small experts, where INT4 meets E4M3 rows as it does
in prompts: twice as many tiles as those of 64 make, and a multiprocessor ends one while another one goes on."""


INT4_ROUNDS = {64: 1.05, 80: 1.25, 96: 1.4, 160: 1.2}
"""Microseconds that a round of INT4 tiles of a height takes for 128 of K, as six shapes took on an H200."""
ROUNDS = (128, 71, 0.85), (64, 88, 0.62)
ROUNDS_OF_ROWS = ((128, 71, 1.0), (64, 88, 0.6)), ((128, 71, 1.0), (64, 36, 0.6))
"""Of dense products in FP8: height of a tile, tiles of a round from which on it is faster than Triton's, about what a
round takes. Where scales are of rows, by whether there are more rows than one tile of Triton's has."""


def variant_of(form: WeightFormat, encoding: Encoding, tile: Tile) -> Variant:
    """The kernel for experts whose rows travel in an encoding."""
    return Variant(
        FORMATS[form.name], ENCODINGS[encoding.name, encoding.static], encoding.name in EIGHT_BIT, tile,
        form.name == "fp8_block", form.name == "fp8_tensor", form.group or 128,
        half_scales=form.name == "int4" and form.scale_dtype == "float16",
    )  # fmt: skip


def tile_for(variant: Variant, rows: int, experts: int, lone: int = 0) -> Tile:
    """A tile that holds an expert's rows, if routing is even: the mean and some standard deviations of chance.
    lone: of a token alone, the elements of an expert's weights.

    Where weights of 4 bits wait for their decoding, two low tiles may be cheaper than a high one; weights of 8 bits and
    more need none to speak of, nor does INT4 that becomes E4M3, and groups of warps pay earlier there. Where sums of
    groups, or of blocks of a 16-bit product, are kept apart, registers bound the height, or the weight rows: tiles of
    160 have half of those, and decode them once where others would come in pairs (those of 96 are kept up to so many
    rows on average, where there are none of 128). Floats with scales of groups take them, too, where one holds most
    experts' rows and one of 128 does not. FP8 codes that tensor cores of groups of warps take as they are have no low
    tiles, but for a token alone that reads little.
    """
    mean, four, int4 = rows / max(1, experts), variant.form >= FORMATS["mxfp4"], variant.form == FORMATS["int4"]
    least = 0 if variant.form != FORMATS["fp8_block"] or not variant.codes else 16 if 0 < lone < SMALL else 64
    heights = heights_of(variant)

    def holds(height: int) -> bool:
        deviations = 4 if not four else 2.5 if height <= NARROW else 2
        if height == 96 and 128 not in heights:
            deviations = 0
        room = mean + deviations * math.sqrt(mean)
        if int4:  # an expert's tiles are of equal height
            room /= max(1, math.ceil(mean / heights[-1]))
        return height >= max(room, least)

    height = next(filter(holds, heights), heights[-1])
    if height == 128 and variant.form >= FORMATS["mxfp8"] and height < mean + 2 * math.sqrt(mean) <= 160:
        height = 160
    if height == NARROW and mean > (0 if not four else 10 if int4 else 14):
        height = 64
    if int4 and variant.codes and mean > 6:
        height = max(height, 64)
    return TILES[height]


def dense_tile(rows: int, segments: tuple[int, ...], columns: int, blocks: bool = True) -> Tile | None:
    """Of a dense product of FP8 weights with E4M3 rows; None where that is not what these kernels are for.

    segments, columns: of the weight. blocks: its scales are of blocks, which must follow one another, and rows' of
    groups. Rows lie on 16 bytes. Multiprocessors take tiles in rounds, which must be full enough for these tiles to be
    faster than Triton's smaller ones, which share out K. The numbers, tiles of a round from which on they are and what
    a round takes, follow from what eight shapes took on an H200 (docs/performance-log.md).
    """
    if rows < FEW or columns % 16 or sum(segments) % 8 or (blocks and any(each % 128 for each in segments[:-1])):
        return None
    best, least = None, math.inf
    for height, enough, time in ROUNDS if blocks else ROUNDS_OF_ROWS[rows > FEW]:
        tiles = -(-rows // height) * -(-sum(segments) // 256)
        rounds = -(-tiles // PROCESSORS)
        if tiles >= enough * rounds and rounds * time < least:
            best, least = TILES[height], rounds * time
    return best


def int4_tile(rows: int, segments: tuple[int, ...], columns: int) -> Tile | None:
    """As `dense_tile`, of INT4 with rows in BF16."""
    if rows < FEW or columns % 32 or sum(segments) % 8:
        return None
    few = -(-rows // 64) * -(-sum(segments) // 256) < 88  # tiles, where Triton has one for all rows
    return None if rows == FEW and few else int4_time(rows, sum(segments), columns)[1]


def int4_time(rows: int, outputs: int, columns: int) -> tuple[float, Tile]:
    """About what such a product takes, in microseconds of an H200, by the tile for which that is the least."""

    def time(height: int) -> float:
        tiles = -(-rows // height) * -(-outputs // (128 * TILES[height].stack))
        return 3 + -(-tiles // PROCESSORS) * INT4_ROUNDS[height] * columns / 128

    height = min(INT4_ROUNDS, key=time)
    return time(height), TILES[height]


def dense_variant(form: str, tile: Tile) -> Variant:
    """Of such a product. Other scales than those of blocks are taken for scales of rows of w and of x."""
    blocks = form == "fp8_block"
    weights, rows = (WeightFormat(form), "fp8_group128") if blocks else (WeightFormat("fp8_channel"), "fp8_token")
    return variant_of(weights, Encoding(rows), tile)


def heights_of(variant: Variant) -> tuple[int, ...]:
    """Of the tiles that can be the fastest for a variant's formats; see `tile_for` for when those of 160 are, too."""
    if variant.form == FORMATS["fp8_block"] and not variant.codes:
        return tuple(each for each in HEIGHTS if each <= 64)
    if variant.form == FORMATS["int4"]:
        static = variant.encoding == ENCODINGS["fp8_tensor", True]
        return tuple(each for each in HEIGHTS if static or each != 128)
    return tuple(each for each in HEIGHTS if each <= 128 and (each != 80 or variant.form >= FORMATS["mxfp4"]))


def with_tile(variant: Variant, tile: Tile) -> Variant:
    return replace(variant, tile=tile)
