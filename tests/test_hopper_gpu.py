"""The CUDA C++ kernels on a Hopper GPU (`-m gpu`): every scheme, every stage, ragged, at released models' shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moesaic.contracts.scheme import SCHEMES, Encoding, Scheme, WeightFormat
from moesaic.contracts.spec import SILU, Activation, RouterSpec
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels import hopper, hopper_invariant, reference, triton
from moesaic.kernels._hopper import dense, launch
from moesaic.kernels._hopper.pack import INVARIANT_PACKINGS
from moesaic.kernels._hopper.variants import (
    DENSE,
    FORMATS,
    PAIRS,
    TILES,
    Tile,
    dense_tile,
    dense_variant,
    variant_of,
    with_tile,
)
from moesaic.kernels.fakes import FAKES
from tests.compare import assert_rows_close
from tests.hopper_gate import SPECS, check_gate, check_ties_and_nan
from tests.hopper_support import Layer, check_layer, check_sum, on_hopper
from tests.triton_support import in_double, randn, sorted_rows, weight

__all__ = ["on_hopper"]
pytestmark = pytest.mark.gpu
OAI = Activation("swiglu_oai")
OTHERS = {
    "int4_g64 fp8_token": Scheme("", WeightFormat("int4", 64, "bfloat16"), Encoding("fp8_token")),
    "int4_g32 fp8_token": Scheme("", WeightFormat("int4", 32, "bfloat16"), Encoding("fp8_token")),
    "int4_g64": Scheme("", WeightFormat("int4", 64, "bfloat16"), Encoding("bf16")),
    "int4 with halves": Scheme("", WeightFormat("int4", 128, "float16"), Encoding("bf16")),
    "int4 with halves fp8_token": Scheme("", WeightFormat("int4", 64, "float16"), Encoding("fp8_token")),
}
KNOWN = {name: each for name, each in SCHEMES.items() if (each.weight.name, each.activation.name) in PAIRS}
EVERY = KNOWN | OTHERS
PAIR_OF = {name: (each.weight.name, each.activation.name) for name, each in EVERY.items()}


def test_probe() -> None:
    assert hopper.probe() is None


@pytest.mark.parametrize("name", EVERY)
def test_few_rows(name: str) -> None:
    scheme = EVERY[name]
    check_layer(Layer.of(scheme, 1, (16, 512, 256, 4), Tile(8)))
    check_layer(Layer.of(scheme, 61, (32, 2048, 768, 8), Tile(16), "holes"))
    check_layer(Layer.of(scheme, 67, (64, 2048, 1408, 6), Tile(16, 2, 1), "one expert"))
    check_layer(Layer.of(scheme, 300, (128, 2048, 768, 8), Tile(32, 2, 1)))


@pytest.mark.parametrize("name", EVERY)
def test_many_rows(name: str) -> None:
    scheme, width = EVERY[name], 640 if "int4" in EVERY[name].weight.name else 704
    check_layer(Layer.of(scheme, 700, (16, 1024, 512, 4), Tile(64, 2, 1), "holes"))
    check_layer(Layer.of(scheme, 700, (16, 1024, 768, 4), Tile(128, 2, 1), "holes"))
    check_layer(Layer.of(scheme, 333, (16, 768, 768, 4), Tile(96, 2, 1), "one expert"))
    check_layer(Layer.of(scheme, 333, (16, 2048, width, 4), Tile(128, 1, 1)))
    check_layer(Layer.of(scheme, 333, (16, 768, 768, 4), TILES[80], "one expert"))
    check_layer(Layer.of(scheme, 700, (16, 1024, width, 4), TILES[160], "holes"))
    for height in (64, 96):  # INT4's scales come for eight stages of K: then for one, and for one again
        check_layer(Layer.of(scheme, 700, (64, 1152, 128, 4), Tile(height, 2, 1), "holes"))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("height", [80, 96, 128, 160])
def test_every_height(name: str, height: int) -> None:
    """Experts with 8, 16 .. 160 rows: one for each number of columns that products come in, and between."""
    check_layer(Layer.of(EVERY[name], 1680, (20, 768, 512, 1), TILES[height], "every height"))


@pytest.mark.parametrize("name", [name for name in EVERY if INVARIANT_PACKINGS.get(PAIR_OF[name]) == "zigzag"])
@pytest.mark.parametrize("tile", [each for each in TILES.values() if not each.narrow])
def test_recoded_weights(name: str, tile: Tile) -> None:
    """As `hopper_invariant` has them."""
    for tokens, shape in ((1, (16, 1024, 640, 4)), (333, (16, 768, 768, 4)), (700, (64, 1152, 128, 4))):
        layer = Layer.of(EVERY[name], tokens, shape, tile, "holes" if tokens > 1 else "usual")
        layer.invariant = True
        check_layer(layer)
        assert not torch.equal(layer.held.w2.parts["data"], layer.w.w2.parts["data"])


@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp8", "mxfp4", "nvfp4", "wna16", "w4afp8"])
def test_released_shapes(name: str) -> None:
    """DeepSeek-V3, DeepSeek-V2-Lite and gpt-oss, with fewer experts; with biases and the clamped activation."""
    scheme = SCHEMES[name]
    for tokens, tile in ((5, Tile(8)), (200, Tile(32, 2, 1)), (400, Tile(96, 2, 1))):
        check_layer(Layer.of(scheme, tokens, (16, 7168, 2048, 8), tile, "holes"))
        width = 2816 if "int4" in scheme.weight.name else 2880
        check_layer(Layer.of(scheme, tokens, (8, width, width, 4), tile, "holes", OAI))


@pytest.mark.parametrize("name", EVERY)
def test_a_token_alone(name: str) -> None:
    """Usual sizes, sizes that are odd multiples of 64, an odd number of choices, choices of padding; biases. Its thread
    blocks begin before its row is ready, with low tiles and with high ones. Low ones add up its results as `combine`
    does, unless they are too many."""
    scheme = EVERY[name]
    four = scheme.weight.name in ("int4", "mxfp4", "nvfp4")
    odd, size = (1280, 2816) if four else (1408, 2880)
    for tile in (Tile(8), Tile(16, 2, 1), Tile(64, 2, 1)):
        for shape in ((16, 512, 256, 4), (32, 2048, 768, 8), (8, 1024, 512, 1), (8, 768, odd, 6), (16, 7168, 2048, 8)):
            layer = Layer.of(scheme, 1, shape, tile)
            check_layer(layer)
            check_sum(layer)
        layer = Layer.of(scheme, 1, (64, 1024, 768, 7), tile)
        layer.ids[0, ::3] = -1
        check_layer(layer)
        check_sum(layer)
        layer.ids.fill_(-1)
        rows = hopper.encode_later(layer.x, scheme.activation, layer.scale)
        assert not hopper.summed(*hopper.multiplied(layer.variant, rows, layer.held, layer.ids, layer.weights)).any()
        check_sum(layer)
        layer = Layer.of(scheme, 1, (8, size, size, 4), tile, activation=OAI)
        check_layer(layer)
        check_sum(layer)
        check_sum(Layer.of(scheme, 1, (64, 512, 256, 32), tile))
        check_sum(Layer.of(scheme, 1, (64, 512, 256, 33), tile))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("tokens", [1, 19, 515])
def test_layer(name: str, tokens: int) -> None:
    """As a model calls it: rows that are encoded before, and rows that are encoded on the way, give the same bits."""
    layer = Layer.of(EVERY[name], tokens, (32, 1024, 512, 6), Tile(8), "holes" if tokens > 2 else "usual")
    rows = layer.rows()
    later = hopper.encode_later(layer.x, layer.scheme.activation, layer.scale)
    out = hopper.experts(rows, layer.held, layer.ids, layer.weights)
    assert out.any()
    assert torch.equal(out, hopper.experts(later, layer.held, layer.ids, layer.weights))
    assert_rows_close(out, triton.experts(rows, layer.w, layer.ids, layer.weights).double(), 2**-4,
                      "two roundings in between, and codes a step apart")  # fmt: skip


@pytest.mark.parametrize("name", [name for name in KNOWN if SCHEMES[name].activation.by_row])
def test_rows_in_other_batches(name: str) -> None:
    """Of `hopper_invariant`: the same bits alone, in tens, and among 600."""
    layer = Layer.of(SCHEMES[name], 600, (16, 1024, 512, 4), Tile(8), "holes")
    layer.invariant = True
    rows = hopper.encode_later(layer.x, layer.scheme.activation, layer.scale)
    whole = hopper_invariant.experts(rows, layer.held, layer.ids, layer.weights)
    for part in (slice(0, 1), slice(3, 4), slice(5, 15), slice(40, 240), slice(599, 600)):
        rows = hopper.encode_later(layer.x[part], layer.scheme.activation, layer.scale)
        alone = hopper_invariant.experts(rows, layer.held, layer.ids[part], layer.weights[part])
        assert torch.equal(alone, whole[part]), part


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("tokens", [1, 70, 333])
@pytest.mark.parametrize("odd", [False, True])
def test_all_tiles_give_the_same_bits(name: str, tokens: int, odd: bool) -> None:
    """Low tiles are multiplied by warps, high ones by groups of four warps: in `hopper_invariant` nobody can tell.

    odd: stages of K that are not full, biases, the clamped activation.
    """
    four = EVERY[name].weight.name in ("int4", "mxfp4", "nvfp4")
    shape = (8, 1408, 640 if four else 704, 4) if odd else (16, 2048, 768, 4)
    how, activation = "holes" if tokens > 2 else "usual", OAI if odd else SILU
    layer = Layer.of(EVERY[name], tokens, shape, Tile(8), how, activation)
    layer.invariant = True
    rows, seen = hopper.encode_later(layer.x, layer.scheme.activation, layer.scale), {}
    for tile in [*TILES.values(), Tile(128, 1, 1)]:
        variant = hopper_invariant.in_one_order(with_tile(layer.variant, tile))
        terms = hopper.multiplied(variant, rows, layer.held, layer.ids, layer.weights)
        seen[variant.tile] = hopper.summed(*terms)
    assert len(seen) >= 4
    assert seen[TILES[64]].any()
    for tile, out in seen.items():
        assert torch.equal(out, seen[TILES[64]]), tile


@pytest.mark.parametrize("tile", [Tile(8), Tile(32, 2, 1), Tile(128, 2, 1)])
@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "w4afp8"])
def test_sums_in_fp32(name: str, tile: Tile) -> None:
    """7168 terms that cancel: the FP8 tensor core's own adder would be far off."""
    from moesaic.kernels._hopper import launch

    layer = Layer.of(SCHEMES[name], 300 if tile.height == 128 else 128, (2, 7168, 128, 1), tile)  # full tiles, others
    layer.x[:, 3584:] = -layer.x[:, :3584] * (1 + 2**-6)
    for each in (part for part in layer.w.w13.parts.values() if part.dim() == 3 and part.shape[-1] > 1):
        half = each.shape[-1] // 2
        each[..., half:] = each[..., :half].clone()
    rows = layer.rows()
    stored, routed = launch.prepare(layer.variant, rows, layer.ids, layer.held, layer.scale)
    _, _, wide = launch.multiply(layer.variant, stored, layer.held, routed, 1, wide=True)
    assert wide is not None
    at = routed.order_R.long()
    values, experts = reference.row_values(in_double(rows))[at], layer.ids.flatten()[at]
    both, half = (reference.expert_products(values * kept, layer.w.w13, experts, None)
                  for kept in (1, torch.arange(7168, device="cuda") < 3584))  # fmt: skip
    gate, up = both.chunk(2, -1)
    error = (wide[:, :128].double() - torch.nn.functional.silu(gate) * up).norm(dim=-1)
    first, second = half.chunk(2, -1)
    slack = 2**-9 * (first.norm(dim=-1) * up.abs().amax(-1) + second.norm(dim=-1) * gate.abs().amax(-1))
    assert (both.norm(dim=-1) < 0.05 * half.norm(dim=-1)).all(), "the terms cancel"
    assert (error <= slack).all(), (error / slack).max()


def check_dense(rows: Rows, w: QuantTensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the product in FP64, terms of it): both ops are held against it, and the shape that a fake says."""
    wanted, what = reference.linear_quant(in_double(rows), w, bias), f"{w.segments} {w.columns}"
    assert_rows_close(hopper.linear_quant(rows, w, bias), wanted, 2**-7, what)
    terms = hopper.linear_terms(rows, w, bias)
    assert_rows_close(terms.double().sum(0), wanted, 2**-7, f"{what}, terms")
    fake = FAKES["linear_terms"]("hopper", rows, w, bias)
    assert (terms.shape, terms.dtype) == (fake.shape, fake.dtype)
    return wanted, terms


@pytest.mark.parametrize("tokens", [128, 129, 333, 1000, 4200])
@pytest.mark.parametrize(("segments", "columns"), [
    ((4096, 512, 512), 2048), ((2048,), 4096), ((1536,), 7168), ((24, ), 128), ((1024, 520), 2896), ((8200,), 1536),
])  # fmt: skip
@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "fp8_tensor", "fp8_tensor_static"])
def test_dense_products(name: str, segments: tuple[int, ...], columns: int, tokens: int) -> None:
    """Against FP64: many rows, the last tile ragged; columns and rows of the weight that fill no tile; biases."""
    scheme = SCHEMES[name]
    w, x = weight(scheme, segments, columns), randn(tokens, columns)
    rows = triton.encode(x, scheme.activation, torch.tensor(0.01, device="cuda") if scheme.activation.static else None)
    for bias in (None, randn(sum(segments))):
        wanted, terms = check_dense(rows, w, bias)
        data, scale = rows.data, rows.parts["scale"]
        for tile in (TILES[64], TILES[96], TILES[128], Tile(128, 1, 1)):
            y = launch.linear(dense_variant(scheme.weight.name, tile), launch.as_they_are(data, scale), w, bias)
            assert_rows_close(y, wanted, 2**-7, f"{tile}")
            # Triton, too, multiplies sums of 128 by a product of two scales, and adds up in order.
            if name == "fp8" and len(terms) == 1:
                assert torch.equal(y, terms[0]), tile


@pytest.mark.parametrize("tokens", [129, 300, 1000, 4200])
@pytest.mark.parametrize("name", ["wna16", "wna16_g32", "int4 with halves", "int4_g64"])
def test_dense_products_of_many_rows_in_int4(name: str, tokens: int) -> None:
    """As above; scales whose rows are 6 bytes, rows of a wider tensor."""
    scheme = SCHEMES.get(name) or OTHERS[name]
    for segments, columns in (((4096, 512, 512), 2048), ((2048,), 4096), ((1024, 520), 384), ((8200,), 1536)):
        w, x = weight(scheme, segments, columns), randn(tokens, columns + 24)[:, :columns]
        for bias in (None, randn(sum(segments))):
            wanted, _ = check_dense(triton.encode(x, scheme.activation), w, bias)
            for tile in (TILES[64], TILES[160]):
                variant = variant_of(scheme.weight, scheme.activation, tile)
                y = launch.linear(variant, launch.in_order(variant, x), w, bias)
                assert_rows_close(y, wanted, 2**-7, f"{tile}")


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 33, 64, 65, 128, 250])
@pytest.mark.parametrize("name", [name for name, each in EVERY.items()
                                  if (each.weight.name, each.activation.name) in DENSE])  # fmt: skip
def test_dense_products_of_few_rows_and_of_dozens(name: str, tokens: int) -> None:
    """Against FP64: K in one part and in several, weight rows that fill no tile; biases; rows of a wider tensor."""
    scheme = EVERY[name]
    scale = torch.tensor(0.01, device="cuda") if scheme.activation.static else None
    for segments, columns in (((4096, 512, 512), 2048), ((2048,), 4096), ((200, 136), 128), ((24,), 16384)):
        w = weight(scheme, segments, columns)
        x = randn(tokens, columns + 24)[:, :columns]
        rows = triton.encode(x, scheme.activation, scale)
        form, mine = FORMATS[scheme.weight.name], dense.cut_of(rows, w, None) is not None
        few = tokens <= min(128, dense.MOST[form]) and tokens not in dense.BETTER.get(form, ())
        if tokens <= 128 or form != FORMATS["int4"]:  # of more, whichever is faster
            assert mine == (few and scheme.weight.group in (0, 128))
        for bias in (None, randn(sum(segments))):
            check_dense(rows, w, bias)
    if scheme.activation.name == "bf16":
        apart = Rows(scheme.activation, {"data": x}, x.dtype)
        assert torch.equal(hopper.linear_quant(apart, w), hopper.linear_quant(rows, w))
    if scheme.activation.name.startswith("fp8"):
        rows.data.view(torch.uint8)[0, 70] = 0x7F  # NaN, of which a group's scale may say nothing
        assert hopper.linear_terms(rows, w)[:, 0].isnan().any()


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16])
def test_plain_products_of_few_rows(tokens: int) -> None:
    """Weights in BF16 against FP64: in both tiles, K that ends within a unit; biases; rows of a wider tensor; in a CUDA
    graph, replayed for other rows."""
    for n, k in ((5120, 2048), (2048, 4096), (5120, 2880), (2880, 4096), (2112, 7168), (1024, 96)):
        wide, w, bias = randn(tokens, k + 8), randn(n, k), randn(n)
        wide[:, k:] = float("nan")
        x = wide[:, :k]
        assert (dense.plain_cut(x, w, bias) is not None) == (2 * n * k <= 20 << 20 or tokens <= 8)
        wanted = x.double() @ w.double().t()
        for given in (None, bias):
            plus = 0 if given is None else bias.double()
            assert_rows_close(hopper.linear(x, w, given), wanted + plus, 2**-7, f"{n} {k}")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = hopper.linear(x + x, w)
        x.copy_(randn(tokens, k))
        graph.replay()
        assert_rows_close(y, 2 * x.double() @ w.double().t(), 2**-7, f"{n} {k}, replayed")


@pytest.mark.parametrize("tokens", [8, 64, 200])
@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "mxfp4"])
def test_dense_sums_in_fp32(name: str, tokens: int) -> None:
    """7168 terms that cancel, as for experts above."""
    scheme = SCHEMES[name]
    w, x = weight(scheme, (256 if tokens < 100 else 20480,), 7168), randn(tokens, 7168)
    x[:, 3584:] = -x[:, :3584] * (1 + 2**-6)
    for each in (part for part in w.parts.values() if part.dim() == 2 and part.shape[-1] > 1):
        half = each.shape[-1] // 2
        each[..., half:] = each[..., :half].clone()
    rows = triton.encode(x, scheme.activation)
    mine = dense.cut_of(rows, w, None) or dense.many_cut(rows, w, None)
    assert mine is not None or (tokens > 128 and name == "mxfp4"), "whose weights are decoded for the library"
    both = reference.linear_quant(in_double(rows), w)
    values = reference.row_values(in_double(rows)) * (torch.arange(7168, device="cuda") < 3584)
    half_only = values @ w.dequantize().double().t()
    error = (hopper.linear_terms(rows, w).double().sum(0) - both).norm(dim=-1)
    assert (both.norm(dim=-1) < 0.05 * half_only.norm(dim=-1)).all(), "the terms cancel"
    assert (error <= 2**-11 * half_only.norm(dim=-1)).all(), (error / half_only.norm(dim=-1)).max()


def test_dense_products_of_rows_as_they_lie() -> None:
    """Of a batch, of part of a wider tensor, with scales group by group; in a CUDA graph, replayed for other rows."""
    scheme = SCHEMES["fp8"]
    w, x = weight(scheme, (4096, 512, 512), 2048), randn(640, 2048)
    assert dense_tile(640, w.segments, w.columns)
    rows = triton.encode(x, scheme.activation)
    wanted = hopper.linear_quant(rows, w)
    data, scale = rows.data, rows.parts["scale"]
    batch = Rows(scheme.activation, {"data": data.view(2, 320, -1), "scale": scale.view(2, 320, -1)}, x.dtype)
    assert torch.equal(hopper.linear_quant(batch, w), wanted.view(2, 320, -1))
    wide = torch.zeros(640, 4096, dtype=torch.uint8, device="cuda").view(data.dtype)
    wide[:, :2048].copy_(data)
    by_group = scale.t().contiguous().t()
    apart = Rows(scheme.activation, {"data": wide[:, :2048], "scale": by_group}, x.dtype)
    assert torch.equal(hopper.linear_quant(apart, w), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hopper.linear_quant(rows, w)
    other = triton.encode(randn(640, 2048), scheme.activation)
    data.copy_(other.data)
    scale.copy_(other.parts["scale"])
    graph.replay()
    assert torch.equal(y, hopper.linear_quant(other, w))
    assert not torch.equal(y, wanted)


@pytest.mark.parametrize("tokens", [40, 511, 512, 1000, 5003])
@pytest.mark.parametrize(("experts", "how"), [(128, "usual"), (512, "holes"), (128, "one expert")])
@pytest.mark.parametrize(("name", "height"), [("bf16", 64), ("fp8", 128)])
def test_rows_are_sorted(name: str, height: int, tokens: int, experts: int, how: str) -> None:
    """By one thread block or by several: stable; every row is in one tile of its expert, of which none is too high."""
    layer = Layer.of(SCHEMES[name], tokens, (experts, 64, 64, 8), Tile(height, 2, 1), how)
    _, routed = launch.prepare(layer.variant, layer.x, layer.ids, layer.held)
    order = sorted_rows(layer.ids)
    assert torch.equal(routed.order_R[: len(order)].long(), order)
    assert (routed.order_R[len(order) :] == -1).all()
    tiles = routed.tiles_B4[: int(routed.counters[0])].long()
    assert (tiles[:, 2] <= height).all()
    assert (tiles[:, 2] <= tiles[:, 3]).all()
    spans = [torch.arange(first, first + rows) for _, first, rows, _ in tiles.tolist()]
    assert torch.equal(torch.cat(spans), torch.arange(len(order)))
    assert torch.equal(tiles[:, 0].repeat_interleave(tiles[:, 2]), layer.ids.flatten()[order].long())
    assert not routed.counters[1:].any()


def test_many_calls_give_the_same_bits() -> None:
    """Nothing depends on which thread block is the first: 40 calls of each of two sizes."""
    for name in ("fp8", "nvfp4", "wna16"):
        for tokens in (61, 700):
            layer = Layer.of(SCHEMES[name], tokens, (32, 2048, 768, 8), Tile(8), "holes")
            first = hopper.experts(layer.rows(), layer.held, layer.ids, layer.weights)
            for _ in range(40):
                assert torch.equal(hopper.experts(layer.rows(), layer.held, layer.ids, layer.weights), first)


def test_in_a_graph() -> None:
    layer = Layer.of(SCHEMES["mxfp8"], 24, (32, 2048, 768, 8), Tile(8))

    def call() -> torch.Tensor:
        rows = hopper.encode_later(layer.x, layer.scheme.activation)
        return hopper.experts(rows, layer.held, layer.ids, layer.weights)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    layer.x.normal_(), layer.ids.copy_(layer.ids.flip(0))
    graph.replay()
    assert torch.equal(out, call())


def test_rows_that_ask_for_nothing() -> None:
    layer = Layer.of(SCHEMES["fp8"], 6, (8, 512, 256, 2), Tile(8))
    layer.ids.fill_(-1)
    assert not hopper.experts(layer.rows(), layer.held, layer.ids, layer.weights).any()
    rows = triton.encode(layer.x[:0], layer.scheme.activation)
    empty = hopper.experts(rows, layer.held, layer.ids[:0], layer.weights[:0])
    assert empty.shape == (0, 512)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gate(spec: RouterSpec) -> None:
    """Gate product and expert choice in one launch; in a CUDA graph, replayed for other rows."""
    for tokens, hidden in ((1, 2048), (3, 2112), (8, 3072), (33, 2880), (40, 2048)):
        check_gate(spec, tokens, hidden)
    if spec.experts <= 128:
        check_gate(spec, 5, 6144)
        check_gate(spec, 64, 4096)
    check_ties_and_nan(spec)
    x, w = randn(20, 2048), randn(spec.experts, 2048, dtype=torch.float32)
    graph, counts = torch.cuda.CUDAGraph(), torch.zeros(spec.experts, dtype=torch.int64, device="cuda")
    hopper.gate(x, w, None, None, spec)
    with torch.cuda.graph(graph):
        made = hopper.gate(x, w, None, None, spec, None, counts)
    for turn in range(1, 4):
        x.copy_(randn(20, 2048))
        graph.replay()
        for mine, theirs in zip(made, hopper.gate(x, w, None, None, spec), strict=True):
            assert torch.equal(mine, theirs)
        assert counts.sum() == turn * 20 * spec.top_k


def test_gate_waits_for_the_kernel_in_front() -> None:
    """Which lets it begin early: a norm that makes its rows, many times over."""
    spec, weight_D = SPECS[0], torch.ones(2048, device="cuda").bfloat16()
    each, w = [randn(20, 2048) for _ in range(8)], randn(spec.experts, 2048, dtype=torch.float32)
    graph, sums = torch.cuda.CUDAGraph(), randn(20, 2048)

    def chain() -> list[Tensor]:
        return [hopper.gate(triton.add_rms_norm(x, sums, weight_D, 1e-6)[0], w, None, None, spec)[0] for x in each]

    wanted = [ids.clone() for ids in chain()]
    with torch.cuda.graph(graph):
        made = chain()
    for _ in range(50):
        for ids in made:
            ids.zero_()
        graph.replay()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(made, wanted, strict=True))
