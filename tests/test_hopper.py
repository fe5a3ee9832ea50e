"""The CUDA C++ kernels without a GPU: they compile for sm_90a, use the instructions that they should, and fit.

What they compute is tested on a GPU (test_hopper_gpu.py).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.commands._measure import Case
from moesaic.contracts.contract import Rejection
from moesaic.contracts.plan import Wishes
from moesaic.contracts.scheme import SCHEMES, Encoding
from moesaic.contracts.spec import SILU
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.hardware import GPUS
from moesaic.kernels import hopper, hopper_invariant
from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper import dense, launch
from moesaic.kernels._hopper.variants import (
    FORMATS,
    PAIRS,
    PROCESSORS,
    TILES,
    Tile,
    Variant,
    dense_tile,
    heights_of,
    tile_for,
    variant_of,
    with_tile,
)
from moesaic.kernels.fakes import FAKES
from moesaic.kernels.ops import ExpertWeights
from moesaic.planning.mixture import able
from tests.hopper_layout import check_layouts, declared_fields
from tests.planning_support import CATALOGUE

KNOWN = {name: each for name, each in SCHEMES.items() if (each.weight.name, each.activation.name) in PAIRS}
SOME = [("fp8", 128), ("nvfp4", 16), ("nvfp4", 80), ("w4afp8", 160), ("bf16", 128)]
REST = [(name, tile) for name in KNOWN for tile in TILES if (name, tile) not in SOME]
WIDE = {"fp8": "QGMMA", "fp8_tensor": "QGMMA", "fp8_tensor_static": "QGMMA", "fp8_channel": "QGMMA", "w4afp8": "QGMMA",
        "w4afp8_static": "QGMMA", "w4afp8_token": "QGMMA"}  # fmt: skip
"""Schemes whose rows meet the FP8 tensor cores; the others are multiplied in 16 bits (HGMMA)."""
SPILLING = (("fp8a16", 128), ("w4afp8", 128), ("w4afp8_token", 128))
"""More than others do; calls take these tiles only where they are told to."""


def variant(name: str, tile: int) -> Variant:
    return variant_of(SCHEMES[name].weight, SCHEMES[name].activation, TILES[tile])


def machine_code(name: str, tile: int) -> bytes:
    made = variant(name, tile)
    return code.machine_code(made.defines, made.sizes)


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        code.nvrtc()
    except UnsupportedError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def dump(what: str, image: bytes, folder: Path) -> str:
    from triton import knobs

    path = folder / "code.cubin"
    path.write_bytes(image)
    return subprocess.run([knobs.nvidia.cuobjdump.path, what, path], check=True, capture_output=True, text=True).stdout


def check_code(name: str, tile: int, folder: Path) -> None:
    """A variant that needs more shared memory than there is does not compile (hopper.cu)."""
    pytest.importorskip("triton")
    image = machine_code(name, tile)
    used = re.search(r"Function experts:\s*REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage", image, folder))
    assert used is not None
    registers, stack = map(int, used.groups())
    threads = (96 if TILES[tile].narrow else 128) + 256
    assert registers * threads * TILES[tile].blocks <= 65536
    assert stack <= (288 if (name, tile) in SPILLING else 256), "registers spill"
    text = dump("-sass", image, folder)
    body = text[text.index("Function : experts") :]
    wanted = "HMMA" if TILES[tile].narrow else WIDE.get(name, "HGMMA")
    assert re.search(rf"\b{wanted}\.", body), wanted
    assert "UTMALDG" in body, "weights come by the copy engine"


@pytest.mark.parametrize(("name", "tile"), SOME)
def test_compiles(name: str, tile: int, tmp_path: Path) -> None:
    check_code(name, tile, tmp_path)


DENSE_KERNELS = [
    *(dense.Variant(form, blocks, height) for form, heights in dense.HEIGHTS.items() for height in heights
      for blocks in ((False, True) if form == dense.FP8 else (False,))),
    *(dense.Variant(FORMATS["bf16"], False, height) for height in dense.PLAIN.values()),
]  # fmt: skip


@pytest.mark.parametrize("made", [
    pytest.param(made, marks=() if made.form in (dense.FP8, FORMATS["nvfp4"]) else pytest.mark.long)
    for made in DENSE_KERNELS
], ids=lambda made: f"{made.form}-{made.blocks}-{made.height.rows}-{made.height.tall}")  # fmt: skip
def test_dense_products_compile(made: dense.Variant, tmp_path: Path) -> None:
    """As many thread blocks as are promised have room on a multiprocessor."""
    height = made.height
    image = code.machine_code(made.defines, made.sizes, main=f"{height.name}.cu")
    text = dump("--dump-resource-usage", image, tmp_path)
    used = re.search(rf"Function {height.name}:\s*REG:(\d+) STACK:(\d+)", text)
    assert used is not None
    registers, stack = map(int, used.groups())
    per_sm = height.programs // PROCESSORS
    assert registers * height.threads * per_sm <= 65536
    few_rows = made.form == FORMATS["bf16"]  # whose room is for long ones, of which one has a multiprocessor
    assert (height.room + height.reserved + 1024) * (1 if few_rows else per_sm) <= 228 << 10, "1 KiB is the system's"
    assert stack <= 32, "registers spill"
    wanted = "HMMA" if height.name == "few" else "QGMMA" if made.form == dense.FP8 else "HGMMA"
    assert re.search(rf"\b{wanted}\.", dump("-sass", image, tmp_path))


def test_dense_products_are_shared_out() -> None:
    """Thread blocks that fill the machine where there are too few rows of w; never less than a unit for each share, nor
    more rows of x than there is room for."""
    for name, rows, shape, parts in (
        ("nvfp4", 1, (5120, 2048), 1), ("nvfp4", 8, (2048, 4096), 2), ("nvfp4", 16, (2048, 4096), 4),
        ("nvfp4", 1, (1024, 1024), 1), ("nvfp4", 8, (7168, 16384), 4), ("fp8", 8, (2048, 4096), 2),
        ("fp8", 9, (2048, 4096), None), ("fp8", 32, (2048, 4096), None), ("fp8", 33, (2048, 4096), 8),
        ("fp8", 65, (2048, 4096), None), ("fp8", 8, (36864, 7168), 1), ("fp8", 40, (36864, 7168), None),
        ("mxfp8", 17, (2048, 4096), 8), ("mxfp8", 129, (2048, 4096), None), ("mxfp4", 129, (2048, 4096), None),
        ("mxfp8", 1, (2048, 4160), None), ("nvfp4", 0, (2048, 4096), None),
        ("wna16", 1, (2048, 4096), 2), ("wna16_g32", 1, (2048, 4096), None),
        ("nvfp4", 1, (0, 4096), None), ("mxfp4", 1, (4096, 7168), 2),
        ("nvfp4", 32, (5120, 2048), 3), ("nvfp4", 128, (5120, 2048), 3), ("wna16", 256, (5120, 2048), None),
        ("wna16", 256, (2048, 4096), 4),
        ("nvfp4", 32, (2048, 4096), 8), ("nvfp4", 128, (2048, 4096), 4), ("nvfp4", 64, (2112, 7168), 7),
        ("nvfp4", 64, (4096, 7168), 4), ("nvfp4", 65, (4096, 7168), None), ("wna16", 129, (4096, 7168), 4),
        ("nvfp4", 129, (4096, 7168), None), ("wna16", 257, (4096, 7168), None),
        ("nvfp4", 40, (24, 256), 1), ("nvfp4", 40, (24, 16384), 10), ("nvfp4", 32, (36864, 7168), None),
        ("mxfp8", 8, (36864, 7168), 2), ("mxfp8", 9, (36864, 7168), None), ("nvfp4", 9, (36864, 7168), 2),
    ):  # fmt: skip
        scheme, like = SCHEMES[name], torch.empty(0, dtype=torch.bfloat16, device="meta")
        w = QuantTensor.empty(scheme.weight, (shape[0],), shape[1], like)
        x = Rows(scheme.activation, {"data": torch.empty(rows, shape[1], device="meta")}, torch.bfloat16)
        how = dense.cut_of(x, w, None)
        assert dense.cut_of(x, w, None, terms=False) == (None if name == "fp8" else how), "FP8 by Triton"
        assert (None if how is None else how.parts) == parts, (name, rows, shape)
        if how is not None:
            assert how.shared(rows) <= dense.SHARED
            assert how.per_part * how.parts >= shape[1] // 128 > how.per_part * (how.parts - 1)
            height = how.variant.height
            assert how.tiles * height.tall >= shape[0]
            assert how.blocks * height.rows >= rows


@pytest.mark.parametrize(("name", "tile"), [("bf16", 8), ("wna16", 16)])
def test_compiles_in_one_order(name: str, tile: int, tmp_path: Path) -> None:
    """What `hopper_invariant` has of its own: sixteen neighbours of K at a time, words of chunks."""
    made = hopper_invariant.in_one_order(variant(name, tile))
    image = code.machine_code(made.defines, made.sizes)
    assert image != machine_code(name, tile)
    assert "HMMA" in dump("-sass", image, tmp_path)


def arithmetic(image: bytes, folder: Path) -> int:
    """Instructions of `experts` that decode, and whatever else shifts, adds integers, or takes bits apart."""
    text = dump("-sass", image, folder)
    body = text[text.index("Function : experts") :]
    return len(re.findall(r"\b(?:LOP3|SHF|IADD3|IMAD\.IADD|IMAD)\b", body))


def test_recoded_weights_are_decoded_by_fewer_instructions(tmp_path: Path) -> None:
    """Of INT4 that becomes E4M3: 7 for eight codes instead of 11, in each of four heights of products."""
    plain = variant("w4afp8_static", 64)
    made = hopper_invariant.in_one_order(plain)
    assert made.zigzag
    few, many = (arithmetic(code.machine_code(each.defines, each.sizes), tmp_path) for each in (made, plain))
    assert few <= many - 4 * 4 * 16


def test_a_token_alone_in_one_order() -> None:
    """INT4 that meets E4M3 rows: more thread blocks where experts are small; whatever else has no tile of its own."""
    small, large = 3 * 2048 * 768, 3 * 7168 * 2048
    for name in ("w4afp8_token", "w4afp8_static"):
        made = hopper_invariant.in_one_order(variant(name, 8), small)
        assert made.tile is TILES[18]
        assert hopper_invariant.in_one_order(variant(name, 8), large).tile is TILES[64]
        assert hopper_invariant.in_one_order(variant(name, 8)).tile is TILES[64]
    assert hopper_invariant.in_one_order(variant("fp8", 16), small).tile is TILES[64]
    assert hopper_invariant.in_one_order(variant("wna16", 8), small).tile is TILES[8]


@pytest.mark.long
@pytest.mark.parametrize(("name", "tile"), REST)
def test_compiles_the_rest(name: str, tile: int, tmp_path: Path) -> None:
    check_code(name, tile, tmp_path)


def test_arguments_lie_as_the_sources_have_them() -> None:
    kinds = {"Weight": launch.WeightC, "Rows": launch.RowsC, "Arguments": launch.Arguments, "Maps": launch.Maps,
             "Preparation": launch.Preparation}  # fmt: skip
    check_layouts(kinds, "values.cuh")
    assert [field for field, *_ in dense.DenseC._fields_] == declared_fields("Dense", "dense.cuh")
    assert ctypes.sizeof(dense.DenseC) == 8 * 11 + 4 * 8, "as CUDA packs eleven fields of eight bytes and eight of four"


def test_machine_code_is_kept_and_never_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    first, made = machine_code("fp8", 8), variant("fp8", 8)
    with monkeypatch.context() as patched:
        patched.setattr(code, "compiled", lambda *_: pytest.fail("compiled again"))
        assert machine_code("fp8", 8) == first
    altered = {**code.sources(), "hopper.cu": code.sources()["hopper.cu"] + "\n// another\n"}
    monkeypatch.setattr(code, "sources", lambda: altered)
    monkeypatch.setattr(code, "compiled", lambda *_: b"new")
    assert code.machine_code(made.defines, made.sizes) == b"new"


@pytest.mark.parametrize("name", KNOWN)
def test_a_tile_for_every_number_of_rows(name: str) -> None:
    scheme = SCHEMES[name]
    for rows in (1, 8, 100, 1000, 3000, 10_000, 1_000_000):
        tile = tile_for(variant_of(scheme.weight, scheme.activation, Tile(8)), rows, 128)
        assert tile in TILES.values()
        assert tile.height >= min(rows / 128, 64)
        assert with_tile(variant(name, 8), tile).stages >= 2


@pytest.mark.parametrize(("name", "width", "unit"), [
    ("nvfp4", 768, 16), ("nvfp4", 1408, 8), ("nvfp4", 2880, 4), ("mxfp4", 1408, 4), ("wna16", 768, 4),
    ("wna16", 896, 0),
])  # fmt: skip
def test_scales_are_copied_as_they_lie(name: str, width: int, unit: int) -> None:
    """Rows of 88 bytes of scales begin at multiples of eight, and so on."""
    scheme, like = SCHEMES[name], torch.empty(0, dtype=torch.bfloat16, device="meta")
    w13 = QuantTensor.empty(scheme.weight, (width, width), 2048, like, (4,))
    w = ExpertWeights(w13, QuantTensor.empty(scheme.weight, (2048,), width, like, (4,)), SILU, scheme.activation)
    assert launch.fitted(variant(name, 8), w.w13, w.w2).scale_unit == unit


def test_low_tiles_of_fp8_for_a_token_alone_that_reads_little() -> None:
    made = variant("fp8", 8)
    assert tile_for(made, 8, 128, 3 * 2048 * 768) is TILES[16]
    assert tile_for(made, 10, 512, 3 * 2048 * 512) is TILES[16]
    assert tile_for(made, 8, 128) is TILES[64], "two tokens of four choices"
    assert tile_for(made, 8, 256, 3 * 7168 * 2048) is TILES[64]


@pytest.mark.parametrize(("name", "rows", "height"), [
    ("w4afp8_static", 32, 64), ("w4afp8_static", 48, 64), ("w4afp8_static", 64, 80), ("w4afp8_static", 96, 128),
    ("w4afp8_static", 128, 160), ("w4afp8_static", 256, 160), ("w4afp8", 128, 160), ("w4afp8", 256, 160),
    ("wna16", 64, 80), ("wna16", 96, 96), ("wna16", 128, 160), ("wna16", 256, 160),
    ("nvfp4", 48, 64), ("nvfp4", 64, 80), ("nvfp4", 256, 128), ("mxfp4", 48, 64), ("mxfp4", 64, 80),
    ("nvfp4a16", 64, 80), ("fp8", 64, 96), ("fp8", 128, 128), ("mxfp8", 64, 96), ("bf16", 64, 96),
    ("mxfp8", 128, 160), ("mxfp4a8", 128, 160), ("mxfp8", 256, 128), ("mxfp4a8", 256, 128), ("mxfp8", 96, 128),
])  # fmt: skip
def test_the_height_that_was_the_fastest(name: str, rows: int, height: int) -> None:
    """Or within 3% of it, in turns (docs/performance-log.md) or in an H200's tables. rows: of an expert, on average."""
    assert tile_for(variant(name, 8), 128 * rows, 128).height == height


@pytest.mark.parametrize(("rows", "n", "columns", "height"), [
    (256, 5120, 2048, 0), (512, 5120, 2048, 128), (8192, 5120, 2048, 128), (512, 2048, 4096, 0), (1024, 2048, 4096, 64),
    (2048, 2048, 4096, 128), (64, 24576, 1536, 0), (128, 24576, 1536, 128), (128, 7168, 16384, 0),
    (256, 7168, 16384, 64), (512, 7168, 16384, 128), (1024, 1536, 7168, 64), (512, 4096, 7168, 64),
    (1024, 4096, 7168, 128), (64, 36864, 7168, 0), (256, 36864, 7168, 128), (256, 7168, 18432, 64),
])  # fmt: skip
def test_dense_products_that_were_the_fastest_here(rows: int, n: int, columns: int, height: int) -> None:
    """In turns with Triton on an H200 (docs/performance-log.md). height: 0 is Triton."""
    tile = dense_tile(rows, (n,), columns)
    assert (tile.height if tile else 0) == height


@pytest.mark.parametrize(("rows", "n", "columns", "height"), [
    (128, 5120, 2048, 0), (384, 5120, 2048, 64), (512, 5120, 2048, 128), (1024, 5120, 2048, 64),
    (4096, 5120, 2048, 128), (128, 2048, 4096, 0), (512, 2048, 4096, 64), (2048, 2048, 4096, 128), (192, 1536, 7168, 0),
    (512, 1536, 7168, 64), (4096, 1536, 7168, 64), (192, 4096, 7168, 64), (768, 4096, 7168, 128), (128, 7168, 18432, 0),
    (192, 7168, 18432, 64), (384, 7168, 18432, 128), (768, 7168, 18432, 64), (192, 36864, 7168, 64),
])  # fmt: skip
def test_dense_products_with_scales_of_rows_that_were_the_fastest_here(rows: int, n: int, columns: int,
                                                                       height: int) -> None:  # fmt: skip
    """The same, of FP8 weights whose scales are not of blocks."""
    tile = dense_tile(rows, (n,), columns, blocks=False)
    assert (tile.height if tile else 0) == height


@pytest.mark.parametrize(("rows", "n", "columns", "by"), [
    (128, 5120, 2048, "dozens"), (192, 5120, 2048, 64), (256, 5120, 2048, 64), (512, 5120, 2048, 96),
    (1024, 5120, 2048, 80), (4096, 5120, 2048, 160), (256, 2048, 4096, "dozens"), (384, 2048, 4096, 64),
    (4096, 2048, 4096, 96), (128, 4096, 7168, None), (256, 4096, 7168, 64), (768, 4096, 7168, 96),
    (256, 1536, 7168, "dozens"), (1024, 1536, 7168, 64), (4096, 1536, 7168, 96), (128, 7168, 16384, None),
    (384, 7168, 16384, 96), (1024, 7168, 16384, 160), (128, 36864, 7168, 64), (512, 36864, 7168, 64),
])  # fmt: skip
def test_int4_products_that_were_the_fastest_here(rows: int, n: int, columns: int, by: str | int | None) -> None:
    """Or within 2% of it, in turns on an H200 (docs/performance-log.md): by a tile, by dozens.cu, or by Triton."""
    scheme, like = SCHEMES["wna16"], torch.empty(0, dtype=torch.bfloat16, device="meta")
    w = QuantTensor.empty(scheme.weight, (n,), columns, like)
    x = Rows(scheme.activation, {"data": torch.empty(rows, columns, device="meta")}, torch.bfloat16)
    many = dense.many_cut(x, w, None)
    found = "dozens" if dense.cut_of(x, w, None) else many.tile.height if many else None
    assert found == by


@pytest.mark.parametrize(("name", "rows", "shape", "how"), [
    ("fp8", 127, (5120, 2048), None), ("fp8", 4096, (5120, 2048), True), ("fp8_tensor", 4096, (5120, 2048), True),
    ("fp8_tensor_static", 4096, (5120, 2048), True), ("fp8a16", 4096, (5120, 2048), None),
    ("mxfp8", 4096, (5120, 2048), None), ("w4afp8_token", 4096, (5120, 2048), None),
    ("fp8_channel", 130, (7168, 16384), True), ("wna16", 4096, (5120, 2048), True),
    ("wna16_g32", 4096, (5120, 2048), True), ("wna16", 127, (5120, 2048), None),
    ("wna16", 4096, (5124, 2048), None), ("wna16_g32", 4096, (5120, 2080), True),
])  # fmt: skip
def test_which_products_of_many_rows_are_their_own(name: str, rows: int, shape: tuple[int, int],
                                                   how: bool | None) -> None:  # fmt: skip
    """FP8 with E4M3 rows, INT4 with BF16 ones, as far as weights and biases lie as the kernels read them."""
    scheme, like = SCHEMES[name], torch.empty(0, dtype=torch.bfloat16, device="meta")
    w = QuantTensor.empty(scheme.weight, (shape[0],), shape[1], like)
    x = Rows(scheme.activation, {"data": torch.empty(rows, shape[1], device="meta")}, torch.bfloat16)
    found = dense.many_cut(x, w, None)
    assert (found is not None) == bool(how)
    if found is None:
        return
    terms = FAKES["linear_terms"]("hopper", x, w)
    assert (terms.shape, terms.dtype) == ((1, rows, shape[0]), torch.bfloat16), "a plan is told so, too"
    assert dense.many_cut(x, w, like.new_empty(shape[0])) == found
    data, stored = w.parts["data"], {**w.parts}
    for what, bias, changed in (
        ("a bias in FP32", like.new_empty(shape[0], dtype=torch.float32), stored),
        ("a bias with gaps", like.new_empty(2 * shape[0])[::2], stored),
        ("rows of odd strides", None, {**stored, "data": data.new_empty(shape[0], data.shape[1] + 8)[:, :-8]}),
        ("an odd beginning", None, {**stored, "data": data.new_empty(data.numel() + 8)[8:].view(data.shape)}),
    ):
        assert dense.many_cut(x, replace(w, parts=changed), bias) is None, what
    if name == "wna16":
        for other in ({"zero_points": True}, {"scale_dtype": "float32"}, {"group": 16}):
            assert dense.many_cut(x, replace(w, form=replace(w.form, **other)), None) is None
    elif name == "fp8":
        assert dense.many_cut(replace(x, encoding=Encoding("fp8_token")), w, None) is None, "scales of another kind"


def test_dense_products_that_are_left_to_triton() -> None:
    assert dense_tile(8192, (4096, 512, 512), 2048) is TILES[128]
    assert dense_tile(8192, (4096, 500, 512), 2048) is None, "blocks begin anew within the weight"
    assert dense_tile(8192, (4096, 500, 516), 2048, blocks=False) is TILES[128], "which rows do not"
    assert dense_tile(8192, (4096, 512, 500), 2048) is None, "rows of results that do not lie on 16 bytes"
    assert dense_tile(8192, (4096,), 2040) is None, "nor those of the operands"


@pytest.mark.parametrize(("name", "tile"), SPILLING)
def test_tiles_that_spill_are_not_chosen(name: str, tile: int) -> None:
    assert TILES[tile].height not in heights_of(variant(name, 8))
    assert all(tile_for(variant(name, 8), rows, 1) is not TILES[tile] for rows in range(1, 1000))


@pytest.mark.parametrize(("rows", "height"), [(140, 160), (150, 160), (180, 128), (300, 160)])
def test_tiles_of_an_expert_are_of_equal_height(rows: int, height: int) -> None:
    """As few tiles as hold the mean, since each decodes its weights anew: this was concluded, not measured."""
    assert tile_for(variant("w4afp8_static", 8), 128 * rows, 128).height == height


def test_what_tuning_tries() -> None:
    for rows in (0.01, 1, 4, 16, 64, 500):
        tried = [tile for tile in TILES if hopper.worth(rows, tile)]
        assert tried
        assert all(TILES[tile].height >= min(64, 0.7 * rows) for tile in tried)


def test_more_experts_than_it_sorts_are_refused() -> None:
    scheme, like = SCHEMES["bf16"], torch.empty(0, dtype=torch.bfloat16, device="meta")
    w13 = QuantTensor.empty(scheme.weight, (64, 64), 64, like, (hopper.MOST_EXPERTS + 1,))
    w2 = QuantTensor.empty(scheme.weight, (64,), 64, like, (hopper.MOST_EXPERTS + 1,))
    x = Rows(Encoding("bf16"), {"data": torch.empty(4, 64, dtype=torch.bfloat16)}, torch.bfloat16)
    with pytest.raises(UnsupportedError, match="513 experts"):
        hopper.experts(x, ExpertWeights(w13, w2, SILU, Encoding("bf16")), torch.zeros(4, 1).int(), torch.ones(4, 1))


@pytest.mark.parametrize("experts", [512, 513])
def test_a_plan_says_so_before_anything_runs(experts: int) -> None:
    rejected: list[Rejection] = []
    need = Case(SCHEMES["mxfp4"], experts, 256, 128, 2).need(GPUS["h100"], 1)
    found = {each.backend for each in able("experts", need, CATALOGUE, Wishes(), rejected)}
    told = [each.reason for each in rejected if each.candidate == "hopper"]
    assert ("hopper" in found, told) == ((True, []) if experts == 512 else
                                         (False, ["takes at most 512 experts per rank, not 513"]))  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_variants_in_one_order(name: str) -> None:
    """Whatever the rows: E4M3 codes meet the tensor core as such, low tiles of all else keep the high ones' order."""
    scheme = SCHEMES[name]
    usual = variant_of(scheme.weight, scheme.activation, TILES[8])
    for rows in (1, 8, 40, 300, 2000, 20000, 200000):
        made = hopper_invariant.in_one_order(with_tile(usual, tile_for(usual, rows, 128)))
        assert made.eight_bit == usual.codes
        assert made.one_order == made.tile.narrow
        assert not (made.codes and made.tile.narrow)
