"""The Hopper expert kernels on a CPU (hopper_machine.py), every stage held against the oracles of the GPU's tests."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import Activation, MoESpec
from moesaic.formats.dummy import fill
from moesaic.kernels import hopper, hopper_invariant, reference
from moesaic.kernels._hopper import dense, launch
from moesaic.kernels._hopper.variants import FORMATS, PAIRS, TILES, Tile, dense_variant, variant_of, with_tile
from moesaic.kernels.fakes import FAKES
from moesaic.layers.linear import Stored
from moesaic.models.build import spec_of
from moesaic.moe.experts import Experts
from tests.compare import assert_rows_close
from tests.hopper_machine import encode, machine
from tests.hopper_support import Layer, check_layer, check_sum
from tests.native_support import needs_compiler
from tests.small_models import MODELS
from tests.triton_support import in_double, randn, weight

__all__ = ["machine"]
pytestmark = [needs_compiler, pytest.mark.usefixtures("machine")]
OAI = Activation("swiglu_oai")
KNOWN = [name for name, each in SCHEMES.items() if (each.weight.name, each.activation.name) in PAIRS]
HALVES = {f"{name} with halves": replace(SCHEMES[name], weight=replace(SCHEMES[name].weight, scale_dtype="float16"))
          for name in ("wna16", "wna16_g32", "w4afp8_token")}  # fmt: skip
EVERY = SCHEMES | HALVES
USUAL = [("fp8", 128), ("nvfp4", 16), ("w4afp8_token", 64), ("wna16 with halves", 8)]
BY_ROW = [name for name in KNOWN if SCHEMES[name].activation.by_row and name != "w4afp8_static"]
REST = [(name, tile) for name in (*KNOWN, *HALVES) for tile in TILES if (name, tile) not in USUAL]


def check(name: str, tile: int) -> None:
    """Experts with few rows, many, none; a lone token; stages and tiles that are not full; biases and clamps."""
    scheme = EVERY[name]
    columns = 320 if scheme.weight.name == "bf16" else 384
    check_layer(Layer.of(scheme, 21, (4, 512, 256, 2), TILES[tile], "holes"))
    alone = Layer.of(scheme, 1, (4, columns, 256, 3), TILES[tile])
    check_layer(alone)
    check_sum(alone)
    check_layer(Layer.of(scheme, 70, (3, columns, 128, 2), TILES[tile], "one expert", OAI))


@pytest.mark.parametrize(("name", "tile"), USUAL)
def test_layers(name: str, tile: int) -> None:
    check(name, tile)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "tile"), REST)
def test_all_layers(name: str, tile: int) -> None:
    check(name, tile)


@pytest.mark.parametrize("tile", [TILES[18], *(pytest.param(TILES[each], marks=pytest.mark.long)
                                         for each in (64, 80, 96, 128, 160))], ids=str)  # fmt: skip
def test_recoded_weights(tile: Tile) -> None:
    """As `hopper_invariant` has them."""
    for tokens in (1, 40):
        layer = Layer.of(SCHEMES["w4afp8_static"], tokens, (4, 384, 256, 2), tile)
        layer.invariant = True
        check_layer(layer)
        assert not torch.equal(layer.held.w2.parts["data"], layer.w.w2.parts["data"])


@pytest.mark.parametrize("name", ["nvfp4", pytest.param("nvfp4a16", marks=pytest.mark.long)])
def test_scales_of_minus_zero(name: str) -> None:
    layer = Layer.of(SCHEMES[name], 5, (3, 256, 256, 2), TILES[16], "holes")
    for w in (layer.w.w13, layer.w.w2):
        w.parts["scale"].view(torch.uint8)[:, ::3, 1::2] = 0x80
    check_layer(layer)


@pytest.mark.parametrize("name", ["w4afp8_static", *(pytest.param(name, marks=pytest.mark.long) for name in BY_ROW)])
def test_all_tiles_add_up_in_one_order(name: str) -> None:
    """Of `hopper_invariant`: with products that are added up as they come, bits tell the order."""
    layer = Layer.of(SCHEMES[name], 19, (3, 384, 256, 2), TILES[8], "holes", OAI)
    layer.invariant = True
    rows, seen = hopper.encode_later(layer.x, layer.scheme.activation, layer.scale), {}
    for tile in (TILES[64], TILES[18]) if name == "w4afp8_static" else TILES.values():
        variant = hopper_invariant.in_one_order(with_tile(layer.variant, tile))
        seen[tile] = hopper.summed(*hopper.multiplied(variant, rows, layer.held, layer.ids, layer.weights))
    assert seen[TILES[64]].any()
    for tile, out in seen.items():
        assert torch.equal(out, seen[TILES[64]]), tile


@pytest.mark.parametrize(("name", "tile"), [
    ("fp8", 128), ("fp8_tensor", 64), ("fp8_channel", 128), *(pytest.param("fp8", tile, marks=pytest.mark.long) for
    tile in (64, 96)), pytest.param("fp8_tensor_static", 128, marks=pytest.mark.long),
])  # fmt: skip
def test_dense_products(name: str, tile: int) -> None:
    """Rows and columns of the weight that fill no tile, several tiles in a band; a bias."""
    scheme, variant = SCHEMES[name], dense_variant(SCHEMES[name].weight.name, TILES[tile])
    static = torch.tensor(0.01) if scheme.activation.static else None
    for tokens, segments, columns in ((150, (256, 40), 272), (300, (136,), 128)):
        w, rows = weight(scheme, segments, columns), encode(randn(tokens, columns), scheme.activation, static)
        for bias in (None, randn(sum(segments))):
            y = launch.linear(variant, launch.as_they_are(rows.data, rows.parts["scale"]), w, bias)
            assert_rows_close(y, reference.linear_quant(in_double(rows), w, bias), 2**-7, f"{segments} {columns}")


@pytest.mark.parametrize(("name", "tile"), [
    ("wna16", 160), *(pytest.param(name, tile, marks=pytest.mark.long) for name, tile in
                      (("wna16", 64), ("wna16", 96), ("wna16_g32", 160), ("wna16 with halves", 64))),
])  # fmt: skip
def test_dense_products_of_many_rows_in_int4(name: str, tile: int) -> None:
    """As above; K that ends within a stage, scales that begin off 16 bytes, rows of a wider tensor."""
    scheme = EVERY[name]
    odd = 384 if scheme.weight.group == 128 else 416
    for tokens, segments, columns in ((1, (64,), 128), (170, (256, 40), odd), (330, (136,), 128)):
        w, x = weight(scheme, segments, columns), randn(tokens, columns + 24)[:, :columns]
        for bias in (None, randn(sum(segments))):
            variant = variant_of(scheme.weight, scheme.activation, TILES[tile])
            y = launch.linear(variant, launch.in_order(variant, x), w, bias)
            wanted = reference.linear_quant(in_double(encode(x, scheme.activation)), w, bias)
            assert_rows_close(y, wanted, 2**-7, f"{segments} {columns}")


@pytest.mark.parametrize(("name", "segments"), [("wna16", (96, 40)), ("fp8_channel", (1024, 1024))])
def test_many_rows_as_they_come(name: str, segments: tuple[int, ...]) -> None:
    """Through the op: rows of a batch, of a wider tensor, off 16 bytes; as many terms as a plan was told."""
    scheme = EVERY[name]
    w, apart = weight(scheme, segments, 128), randn(300 * 128 + 1)
    for x in (randn(2, 150, 128), randn(300, 160)[:, :128], apart[1:].view(300, 128)):
        rows = encode(x, scheme.activation)
        assert dense.cut_of(rows, w, None) is None
        assert dense.many_cut(rows, w, None) is not None
        wanted = reference.linear_quant(in_double(encode(x.contiguous(), scheme.activation)), w)
        assert_rows_close(hopper.linear_quant(rows, w), wanted, 2**-7, name)
        terms, fake = hopper.linear_terms(rows, w), FAKES["linear_terms"]("hopper", rows, w)
        assert (terms.shape, terms.dtype) == (fake.shape, fake.dtype)


@pytest.mark.parametrize(
    "rows", [1, 40, 70, *(pytest.param(rows, marks=pytest.mark.long) for rows in (3, 8, 9, 17, 64, 130))]
)
@pytest.mark.parametrize(
    "name",
    ["fp8", "nvfp4", "mxfp8", "wna16"]
    + [
        pytest.param(name, marks=pytest.mark.long)
        for name in (
            "mxfp4",
            "mxfp4a8",
            "fp8_channel",
            "mxfp8a16",
            "nvfp4_dynamic",
            "nvfp4a16",
            "fp8_tensor",
            "fp8_tensor_static",
            "wna16 with halves",
        )
    ],
)
def test_dense_products_of_few_rows_and_of_dozens(name: str, rows: int) -> None:
    """Weight rows that fill no tile; K in one part, and in several; more units than warps, and fewer; a bias."""
    scheme, seen = EVERY[name], set()
    scale = torch.tensor(0.01) if scheme.activation.static else None
    for segments, columns in (((64, 37), 6144), ((24,), 256)):
        w, bias = weight(scheme, segments, columns), randn(sum(segments))
        x = encode(randn(rows, columns), scheme.activation, scale)
        how = dense.cut_of(x, w, bias)
        form = FORMATS[scheme.weight.name]
        if rows > dense.MOST[form] or rows in dense.BETTER.get(form, ()):
            assert how is None
            continue
        assert how is not None
        wanted = reference.linear_quant(in_double(x), w, bias)
        terms = dense.products(x, w, bias, how)
        assert terms.dtype == (torch.bfloat16 if len(terms) == 1 else torch.float32)
        assert_rows_close(terms.double().sum(0), wanted, 2**-7, f"{segments} {columns}")
        assert_rows_close(hopper.linear_terms(x, w).double().sum(0), wanted - bias.double(), 2**-7, "no bias")
        units = columns // 128
        each = min(units, how.variant.height.room // how.variant.unit_room(rows))  # as many as there is room for
        fewest = replace(how, per_part=each, parts=-(-units // each))
        assert_rows_close(dense.products(x, w, bias, fewest).double().sum(0), wanted, 2**-7, "in the fewest parts")
        seen.add(how.parts)
    assert not seen or len(seen) == 2


@pytest.mark.parametrize("rows", [1, 8, *(pytest.param(rows, marks=pytest.mark.long) for rows in (5, 9, 16))])
def test_plain_products_of_few_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in BF16, in both tiles: rows of w that fill none, K that ends within a unit, more units than warps and
    fewer; rows of a wider tensor, of a batch."""
    monkeypatch.setattr(dense, "SMALLEST", 1)
    monkeypatch.setattr(dense, "PROCESSORS", 4)
    seen = set()
    for n, k in ((40, 256), (136, 2880), (24, 160), (130, 1184), (16, 32)):
        wide, w, bias = randn(rows, k + 24), randn(n, k), randn(n)
        wide[:, k:] = float("nan")  # which a product with zeros would not hide
        x = wide[:, :k]
        how = dense.plain_cut(x, w, bias)
        assert how is not None
        seen.add(how.variant.height.tall)
        wanted = x.double() @ w.double().t()
        for given in (None, bias):
            y = hopper.linear(x, w, given)
            assert y.dtype == torch.bfloat16
            assert_rows_close(y, wanted if given is None else wanted + bias.double(), 2**-7, f"{n} {k}")
        assert torch.equal(hopper.linear(x[:, None], w)[:, 0], hopper.linear(x, w))
    assert seen == {16, 32}


def test_other_plain_products_are_the_librarys() -> None:
    x, w = randn(4, 96), randn(1024, 96)
    assert dense.plain_cut(x, w, None) is not None
    others = {
        "weights in another type": (x, w.float(), None), "another bias": (x, w, torch.zeros(1024)),
        "few rows of w": (x, w[:1000], None), "many rows of x": (randn(17, 96), w, None), "none": (x[:0], w, None),
        "K off 32": (randn(4, 72), randn(1024, 72), None), "transposed": (x, randn(96, 1024).t(), None),
        "off 16 bytes": (x, randn(1024, 100)[:, 4:], None), "large": (randn(8, 4096), w.new_empty(8192, 4096), None),
        "rows that have no room": (randn(16, 8192), w.new_empty(1024, 8192), None), "another K": (x[:, :64], w, None),
    }  # fmt: skip
    for what, operands in others.items():
        assert dense.plain_cut(*operands) is None, what
    apart = randn(1024, 100)[:, :96]
    assert_rows_close(hopper.linear(x, apart), x.double() @ apart.double().t(), 2**-7, "by the library")


def test_copies_of_weights_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that lies off 16 bytes is copied by the kernel in front: it is not read before that has ended. Scales of
    rows may lie in any order."""
    scheme, seen = SCHEMES["nvfp4_dynamic"], []
    w, bias = weight(scheme, (40,), 256), randn(40)
    x = encode(randn(2, 3, 256), scheme.activation)
    wanted = reference.linear_quant(in_double(x), w, bias)
    start = dense.launch

    def launched(*arguments: Any, **how: Any) -> None:
        seen.append(how["ahead"])
        start(*arguments, **how)

    monkeypatch.setattr(dense, "launch", launched)
    room = torch.empty(w.parts["data"].numel() + 4, dtype=torch.uint8)
    room[4:].copy_(w.parts["data"].flatten())
    apart = replace(w, parts={**w.parts, "data": room[4:].view(w.parts["data"].shape)})
    scale = x.parts["global_scale"].transpose(0, 1).contiguous().transpose(0, 1)
    turned = replace(x, parts={**x.parts, "global_scale": scale})
    for mine, rows in ((w, x), (apart, x), (w, turned)):
        y = hopper.linear_terms(rows, mine, bias).double().sum(0)
        assert_rows_close(y, wanted.view(6, 40), 2**-7, "")
    assert seen == [True, False, True]
    assert dense.cut_of(x, w, bias.float()) is None, "a wide bias is added in FP32, by Triton"


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor_static", "mxfp8", "nvfp4_dynamic"])
def test_what_is_not_a_number_stays_where_it_was(name: str) -> None:
    """A row with NaN must not look like a number, nor touch the rows beside it."""
    scheme = SCHEMES[name]
    w, x = weight(scheme, (32,), 256), randn(3, 256)
    x[1, 70] = float("nan")
    rows = encode(x, scheme.activation, torch.tensor(0.01) if scheme.activation.static else None)
    if name == "fp8":  # an encoder may leave it to the code alone
        rows = encode(x.nan_to_num(), scheme.activation)
        rows.data.view(torch.uint8)[1, 70] = 0x7F
    y = hopper.linear_terms(rows, w)[0]
    assert y[1].isnan().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("kernels", "name"),
    [(hopper_invariant, "w4afp8_static"), (hopper, "nvfp4"), pytest.param(hopper, "mxfp8", marks=pytest.mark.long)],
)
def test_experts_are_packed_when_they_are_filled(kernels: ModuleType, name: str) -> None:
    """A layer's experts: filled, settled, opened, filled anew. What the kernels compute of them is right each time."""
    spec = spec_of(MODELS["heads with norms"]).layers[1].mlp
    assert isinstance(spec, MoESpec)
    scheme = SCHEMES[name]
    experts = Experts(spec, scheme, torch.empty(0, dtype=torch.bfloat16), kernels)
    x, ids, weights = torch.randn(5, 128).bfloat16(), torch.tensor([[0, 1]] * 5).int(), torch.rand(5, 2)
    seen = []
    for _ in range(2):
        stored = [item for item in experts.sources() if isinstance(item, Stored)]
        for item in stored:
            if item.open:
                item.open()
            fill(item.weight)
            if item.input_scale is not None:
                item.input_scale.fill_(0.01)
        experts.settle()
        assert experts.weights.packing != "plain"
        rows = kernels.encode_later(x, scheme.activation, experts.input_scale)
        seen.append(kernels.experts(rows, experts.weights, ids, weights))
        experts.open()
        wanted = reference.experts(encode(x, scheme.activation, experts.input_scale), experts.plain, ids, weights)
        assert_rows_close(seen[-1], wanted.double(), 2**-6, "two roundings in between")
    assert not torch.equal(*seen)
