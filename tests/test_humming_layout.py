"""The order of bytes that Humming reads: against its own code, there and back, and within the same storage."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.contracts.plan import ModelPlan, Wishes
from moesaic.contracts.scheme import SCHEMES, Encoding, WeightFormat
from moesaic.contracts.spec import SILU, MoESpec
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.dummy import fill
from moesaic.hardware import local_cpu
from moesaic.kernels import registry
from moesaic.kernels._humming.layout import Order, packed, packed_scales, unpacked, unpacked_scales
from moesaic.kernels._humming.pack import Storage, codes_of, pack, unpack
from moesaic.kernels._humming.recipe import PAIRS, recipe_of
from moesaic.kernels.humming import CONTRACTS, kernel_of, ladder, layer_of
from moesaic.kernels.ops import ExpertWeights
from moesaic.kernels.registry import Kernels
from moesaic.layers.linear import Stored
from moesaic.models.build import plan_here, spec_of
from moesaic.models.weights import settle, slots_of
from moesaic.moe.balance import LoadMeter
from moesaic.moe.dispatch.local import LocalDispatcher
from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoELayer
from tests.humming_support import hopper, repacking

LIKE = torch.empty(0, dtype=torch.bfloat16)
ORDERS: dict[str, tuple[Order, int]] = {  # with the interleaving that the package asks for
    "8 bits, BF16 rows": (Order(8, 16), 3),
    "4 bits, BF16 rows": (Order(4, 16), 3),
    "int4, FP8 rows": (Order(4, 8, folded=True), 3),
    "int4 in groups of 128, FP8 rows": (Order(4, 8, long=True, transposed=True, folded=True), 3),
    "mxfp4, FP8 rows": (Order(4, 8, signs=True), 2),
    "mxfp4, FP8 rows in groups": (Order(4, 8, long=True, signs=True), 2),
}


def forms(name: str) -> list[WeightFormat]:
    int4 = [WeightFormat("int4", group, "bfloat16") for group in (32, 64, 128)]
    return int4 if name == "int4" else [WeightFormat(name)]


CELLS = [(form, encoding) for name, encoding in sorted(PAIRS) for form in forms(name)]


def as_bytes(codes: Tensor, bits: int) -> Tensor:
    return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


@pytest.mark.parametrize("name", ORDERS)
def test_packing_is_what_their_kernel_does(name: str, tmp_path: Path) -> None:
    order, mode = ORDERS[name]
    flags = (1, order.folded, 0, order.transposed, 0, order.long, 0)
    theirs = repacking(tmp_path, ", ".join(str(int(each)) for each in (order.bits, order.rows_bits, *flags)))
    for rows, columns in ((64, 64), (192, 256)):
        codes = torch.randint(0, 1 << order.bits, (rows, columns), dtype=torch.uint8)
        mine = as_bytes(packed(codes, order), order.bits)
        assert torch.equal(mine.flatten(), theirs(as_bytes(codes, order.bits), rows, columns, mode))


@pytest.mark.parametrize("order", [*(order for order, _ in ORDERS.values()), Order(8, 8, flat=True)], ids=str)
def test_packing_is_undone(order: Order) -> None:
    codes = torch.randint(0, 1 << order.bits, (128, 192), dtype=torch.uint8)
    there = packed(codes, order)
    assert there.numel() == codes.numel()
    assert not torch.equal(there.flatten(), codes.flatten())
    assert torch.equal(unpacked(there, order, 128), codes)


def test_scales_and_flat_weights_are_what_their_functions_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scale = torch.randn(3, 192, 8).bfloat16()
    with hopper(monkeypatch, tmp_path):
        import humming.dtypes as kinds
        from humming.transform import transform_humming_weight, transform_humming_weight_scale

        assert torch.equal(transform_humming_weight_scale(scale), torch.stack([packed_scales(each) for each in scale]))
        assert torch.equal(transform_humming_weight_scale(scale, is_blockwise=True), scale.transpose(1, 2))
        codes = torch.randint(0, 256, (2, 128, 64), dtype=torch.uint8)
        e4m3 = kinds.float8e4m3
        theirs = transform_humming_weight(codes.view(torch.int32), e4m3, e4m3, packed=True, use_flat_weight=True)
        mine = torch.stack([packed(each, Order(8, 8, flat=True)) for each in codes])
        assert torch.equal(theirs.view(torch.uint8).flatten(), mine.flatten())
    assert torch.equal(unpacked_scales(packed_scales(scale[0])), scale[0])


def weights_of(form: WeightFormat, encoding: str, count: int = 3) -> ExpertWeights:
    width, hidden = 128, 256
    w13 = fill(QuantTensor.empty(form, (width, width), hidden, LIKE, (count,)))
    w2 = fill(QuantTensor.empty(form, (hidden,), width, LIKE, (count,)))
    return ExpertWeights(w13, w2, SILU, Encoding(encoding))


def raw(w: ExpertWeights) -> list[Tensor]:
    """The bytes of the storage."""
    return [part.view(torch.uint8).clone() for each in (w.w13, w.w2) for part in each.parts.values()]


@pytest.mark.parametrize(("form", "encoding"), CELLS, ids=str)
def test_experts_are_packed_within_their_storage_and_back(form: WeightFormat, encoding: str) -> None:
    w = weights_of(form, encoding)
    folds = recipe_of(form, Encoding(encoding)).folds
    before, values = raw(w), (w.w13.dequantize(), w.w2.dequantize())
    there = pack(w)
    assert there.packing == "humming"
    for plain, moved in ((w.w13, there.w13), (w.w2, there.w2)):
        assert moved.shape == plain.shape
        assert set(moved.parts) == set(plain.parts) | ({"fold"} if folds else set())
        for name, part in plain.parts.items():
            assert moved.parts[name].data_ptr() == part.data_ptr(), "one storage, one address"
            assert moved.parts[name].is_contiguous()
    assert any(not torch.equal(a, b) for a, b in zip(before, raw(w), strict=True))
    back = unpack(there)
    assert back.packing == "plain"
    for plain, again in ((w.w13, back.w13), (w.w2, back.w2)):
        assert set(again.parts) == set(plain.parts)
        for name, part in plain.parts.items():
            assert again.parts[name].dtype == part.dtype
            assert again.parts[name].shape == part.shape
            assert again.parts[name].data_ptr() == part.data_ptr()
    for value, found in zip(values, (back.w13.dequantize(), back.w2.dequantize()), strict=True):
        assert torch.equal(value, found)
    if not folds:  # only there is a zero's sign lost
        assert all(torch.equal(a, b) for a, b in zip(before, raw(w), strict=True))
    again = pack(w, there)
    assert all(torch.equal(again.w13.parts[name].view(torch.uint8), part.view(torch.uint8))
               for name, part in there.w13.parts.items())  # fmt: skip
    if folds:
        assert again.w13.parts["fold"].data_ptr() == there.w13.parts["fold"].data_ptr(), "graphs hold its address"


@pytest.mark.parametrize(("form", "encoding"), CELLS, ids=str)
def test_an_expert_is_laid_out_as_if_it_were_alone(form: WeightFormat, encoding: str) -> None:
    w, order = weights_of(form, encoding), recipe_of(form, Encoding(encoding)).order
    codes = codes_of(w.w13.parts["data"][1].clone(), order.bits)
    if order.signs:
        codes[codes == 8] = 0
    want = as_bytes(packed(codes, order), order.bits)
    assert torch.equal(pack(w).w13.parts["data"][1].view(torch.uint8).flatten(), want.flatten())


def test_folded_scales_are_offsets_from_the_smallest() -> None:
    w = weights_of(WeightFormat("mxfp4"), "fp8_group128")
    scale = w.w13.parts["scale"].clone()
    there = pack(w).w13
    low = scale.flatten(1).amin(1)
    offsets = torch.stack([packed_scales(each) for each in scale - low[:, None, None] + 1])
    assert torch.equal(there.parts["scale"].view(torch.uint8), offsets)
    assert torch.equal(there.parts["fold"], 2.0 ** (low.float() - 128))


@pytest.mark.parametrize(("form", "encoding"), CELLS, ids=str)
def test_what_is_interrupted_leaves_the_weights_as_they_were(
    form: WeightFormat, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second expert of w2, there and back."""
    w, write, calls = weights_of(form, encoding), Storage.write, 0
    w = unpack(pack(w))  # folded codes have lost the signs of zeros now

    def breaks(self: Storage, e: int, codes: Tensor, scale: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError
        write(self, e, codes, scale)

    for change in (pack, unpack):
        before = raw(w)
        monkeypatch.setattr(Storage, "write", breaks)
        calls = 0
        with pytest.raises(torch.OutOfMemoryError):
            change(w)
        assert calls == 5 + 4, "four are undone"
        assert all(torch.equal(a, b) for a, b in zip(before, raw(w), strict=True))
        monkeypatch.setattr(Storage, "write", write)
        w = change(w)


def test_scales_that_span_too_much_are_refused_before_anything_is_moved() -> None:
    w = weights_of(WeightFormat("mxfp4"), "fp8_group128")
    w.w2.parts["scale"][1, 0, 0], w.w2.parts["scale"][1, 5, 0] = 120, 132
    before = raw(w)
    with pytest.raises(UnsupportedError, match=r"2\^11.*--experts triton"):
        pack(w)
    assert all(torch.equal(a, b) for a, b in zip(before, raw(w), strict=True))
    w.w2.parts["scale"][1, 5, 0] = 131
    pack(w)


@pytest.mark.parametrize(("form", "encoding"), CELLS, ids=str)
def test_the_library_reads_the_order_that_is_packed(form: WeightFormat, encoding: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Its options, made by our arguments, for the shapes of three models; a kernel is chosen for any number of rows."""
    recipe = recipe_of(form, Encoding(encoding))
    with hopper(monkeypatch, tmp_path):
        layer_of.cache_clear()
        for count, hidden, width in ((128, 2048, 768), (256, 7168, 2048), (64, 2048, 1408)):
            for n, k in ((2 * width, hidden), (hidden, width)):
                layer = layer_of(recipe, (count, n, k))
                assert (layer.a_dtype.num_bits, layer.b_dtype.num_bits) == (recipe.order.rows_bits, recipe.order.bits)
                assert layer.is_tensor_weight_scale_2 == recipe.folds
        from humming.tune import get_heuristics_config

        for rows in (1, 8, 96, 512, 8192, 49152):
            chosen = get_heuristics_config(layer, shape_m=rows, gemm_type="indexed", device=0)
            assert chosen["block_shape"][0] % 8 == 0
            assert not chosen.get("use_tma_a")
        layer_of.cache_clear()


def test_our_calls_fit_their_signatures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import inspect

    with hopper(monkeypatch, tmp_path):
        from moesaic.kernels.humming import library

        library.cache_clear()
        lib: Any = library()
        names = ("configs", "inputs", "weight", "weight_scale", "weight_scale_2", "input_scale", "outputs",
                 "sorted_ids", "expert_ids", "num_tokens_padded", "locks", "top_k")  # fmt: skip
        inspect.signature(lib.launch).bind(**dict.fromkeys(names))
        inspect.signature(lib.prepare).bind("", "", {}, 0)
        inspect.signature(lib.choose).bind(None, shape_m=1, gemm_type="indexed", device=0)
        library.cache_clear()


def test_rows_are_rounded_to_few_numbers() -> None:
    found = {ladder(rows) for rows in range(1, 10_000)}
    assert all(rows <= ladder(rows) <= max(2, 1.5 * rows) for rows in range(1, 10_000))
    assert len(found) == 27
    assert {1, 2, 3, 4, 6, 8, 12, 16, 8192, 12288} <= found
    assert kernel_of.cache_info().maxsize, "bounded"


# --- packed by the layer that holds the weights ---

QWEN = {
    "model_type": "qwen3_moe", "hidden_size": 256, "vocab_size": 64, "num_hidden_layers": 1, "head_dim": 128,
    "max_position_embeddings": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128,
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 128,
}  # fmt: skip


class Packing(ModuleType):
    """A backend that runs on this machine and wants the bytes of its weights in another order."""

    CONTRACTS = ()
    calls: list[str]

    def __init__(self) -> None:
        super().__init__("packing")
        self.calls = []

    def pack(self, w: ExpertWeights, before: ExpertWeights | None) -> ExpertWeights:
        self.calls.append("again" if before else "pack")
        return pack(w, before)

    def unpack(self, w: ExpertWeights) -> ExpertWeights:
        self.calls.append("unpack")
        return unpack(w)

    def experts(self, x: Any, w: ExpertWeights, ids: Tensor, weights: Tensor) -> Tensor:
        assert w.packing == "humming"
        self.calls.append("run")
        plain = unpack(w)
        y = registry.import_module("moesaic.kernels.reference").experts(x, plain, ids, weights)
        pack(plain, w)
        return y  # type: ignore[no-any-return]


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> tuple[MoELayer, Packing]:
    from dataclasses import replace

    from moesaic.models.hold import hold

    spec = hold(spec_of(QWEN), SCHEMES["mxfp8a16"])
    backend, known = Packing(), dict(registry.backends())
    mine = replace(CONTRACTS[0], backend="packing", devices=frozenset({"cpu"}), dtypes=frozenset({"bfloat16"}),
                   arch=None, rank=1)  # fmt: skip
    monkeypatch.setattr(registry, "backends", lambda: known | {"packing": backend})
    plan = plan_here(spec, local_cpu(), "bfloat16", Wishes(experts="packing"), (*registry.catalogue(), mine))
    assert isinstance(plan, ModelPlan)
    mixture = spec.layers[0].mlp
    assert isinstance(mixture, MoESpec)
    return MoELayer(mixture, 0, 0, Kernels(plan), {"local": LocalDispatcher()}, LoadMeter([8]), LIKE), backend


def load(layer: MoELayer, seed: int) -> Tensor:
    """As a loader does: slots, filled, settled. Returns what the first gate was filled with."""
    torch.manual_seed(seed)
    slots_of((item for item in layer.sources() if isinstance(item, tuple)), None)
    stored = [item for item in layer.sources() if isinstance(item, Stored)]
    for call in dict.fromkeys(item.open for item in stored if item.open):
        call()
    for item in stored:
        fill(item.weight)
    first = stored[0].weight.parts["data"].clone()
    settle(layer.sources())
    return first


def test_a_layer_packs_when_loaded_and_again_when_reloaded(layer: tuple[MoELayer, Packing]) -> None:
    made, backend = layer
    experts: Experts = made.experts
    for name in ("weight_ED",):
        getattr(made.route, name).normal_()
    x = torch.randn(5, 256).bfloat16()
    address = experts.plain.w13.parts["data"].data_ptr()
    load(made, 1)
    assert backend.calls == ["pack"]
    one = made(x, "prefill")
    settle(made.sources())
    assert backend.calls == ["pack", "run"], "what is packed is not packed twice"
    load(made, 2)
    assert backend.calls[2:] == ["unpack", "again"]
    two = made(x, "decode")
    load(made, 1)
    three = made(x, "prefill")
    assert torch.equal(one, three)
    assert not torch.equal(one, two)
    assert experts.weights.w13.parts["data"].data_ptr() == address


def test_opened_storage_reads_as_the_formats_say_and_is_packed_before_it_runs(layer: tuple[MoELayer, Packing]) -> None:
    made, backend = layer
    made.route.weight_ED.normal_()
    first = load(made, 3)
    stored = next(item for item in made.sources() if isinstance(item, Stored))
    assert not torch.equal(stored.weight.parts["data"], first)
    assert stored.open
    stored.open()
    assert torch.equal(stored.weight.parts["data"], first)
    backend.calls.clear()
    made(torch.randn(2, 256).bfloat16(), "decode")
    assert backend.calls == ["again", "run"]
