"""Codes of weights as the Hopper kernels want them: which, by whom, and back. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moesaic.commands._measure import Case
from moesaic.commands._measure import packed as ready
from moesaic.contracts.contract import Rejection
from moesaic.contracts.plan import ModelPlan, Wishes
from moesaic.contracts.scheme import SCHEMES, Encoding
from moesaic.contracts.spec import SILU, MoESpec
from moesaic.formats.base import QuantTensor
from moesaic.formats.dummy import fill
from moesaic.formats.encodings import encode
from moesaic.hardware import GPUS
from moesaic.kernels import hopper, hopper_invariant, registry
from moesaic.kernels._hopper import pack as packing
from moesaic.kernels._hopper.pack import WAYS, unzigzag, zigzag
from moesaic.kernels.in_place import all_or_none
from moesaic.kernels.ops import ExpertWeights
from moesaic.models.build import spec_of
from moesaic.models.hold import hold
from moesaic.moe.experts import Experts
from moesaic.planning.mixture import able
from moesaic.planning.plan import plan
from scripts import plan_fixtures
from tests.planning_support import CATALOGUE

LIKE = torch.empty(0, dtype=torch.bfloat16)
BITS = {name: "e2m1_halves" if name.startswith("nvfp4") and not name.endswith("a16") else "e2m1_bf16"
        for name in SCHEMES if "fp4" in name}  # fmt: skip
BITS |= dict.fromkeys(("mxfp8", "mxfp8a16", "fp8a16"), "e4m3_bf16")
PACKED = {hopper: BITS, hopper_invariant: BITS | dict.fromkeys(("w4afp8", "w4afp8_static", "w4afp8_token"), "zigzag")}
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def weights_of(name: str) -> ExpertWeights:
    scheme, (experts, hidden, width) = SCHEMES[name], (3, 256, 128)
    w13 = fill(QuantTensor.empty(scheme.weight, (width, width), hidden, LIKE, (experts,)))
    w2 = fill(QuantTensor.empty(scheme.weight, (hidden,), width, LIKE, (experts,)))
    return ExpertWeights(w13, w2, SILU, scheme.activation)


def raw(w: ExpertWeights) -> list[Tensor]:
    return [part.view(torch.uint8).clone() for each in (w.w13, w.w2) for part in each.parts.values()]


def test_every_byte_becomes_two_zigzag_codes_and_comes_back() -> None:
    """Against the definition: 0, -1, 1, -2, 2 .. are 0, 1, 2, 3, 4 .. ."""
    order = sorted(range(-8, 8), key=lambda v: (abs(v + 0.5), -v))  # 0, -1, 1, -2 ..
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = [order.index((byte & 15) - 8) | order.index((byte >> 4) - 8) << 4 for byte in range(256)]
    assert zigzag(codes).tolist() == wanted
    assert torch.equal(unzigzag(zigzag(codes)), codes)


def operands(word: int, name: str) -> list[float]:
    """The eight values that a kernel takes out of a word, each as a part of it that was rotated and masked."""
    values, bits = {}, [word >> i & 1 for i in range(32)]
    if name == "e2m1_bf16":  # rotated to the right by 0, 2, 12 and 6, but for one bit of the first
        for i, by in enumerate((0, 2, 12, 6)):
            for half in (0, 16):
                sign, low, mantissa = (bits[(half + place + by) % 32] for place in (15, 7, 6))
                high = bits[(half + 8 + (by or 8)) % 32]
                values[i + half // 4] = sign, high * 4 + low * 2 + mantissa
    else:
        for byte in range(0, 32, 8):
            for odd, places in enumerate(((7, 3, 2, 1), (0, 6, 5, 4))):
                sign, *rest = (bits[byte + place] for place in places)
                values[byte // 4 + odd] = sign, rest[0] * 4 + rest[1] * 2 + rest[2]
    return [(-1) ** sign * E2M1[code] for sign, code in (values[i] for i in range(8))]


@pytest.mark.parametrize("name", ["e2m1_bf16", "e2m1_halves"])
def test_bits_of_fp4_codes_lie_where_operands_want_them(name: str) -> None:
    """Of random words, and of every code in every place."""
    codes = torch.randint(0, 16, (1000, 8), dtype=torch.uint8)
    codes[:128] = 0
    for i in range(128):
        codes[i, i // 16] = i % 16
    plain = codes[:, ::2] | codes[:, 1::2] << 4
    there, back = WAYS[name]
    packed = there(plain)
    assert torch.equal(back(packed), plain)
    for word, wanted in zip(packed.view(torch.int32)[:, 0].tolist(), codes.tolist(), strict=True):
        assert operands(word, name) == [(-1) ** (code >> 3) * E2M1[code & 7] for code in wanted]


def test_bits_of_e4m3_codes_lie_where_operands_want_them() -> None:
    """Every pair of neighbours: the first as a part of the word as it is, the second after rotations by 4 and 8."""
    every = torch.arange(256).repeat(256).to(torch.uint8)
    other = torch.arange(256).repeat_interleave(256).to(torch.uint8)
    plain = torch.stack((every, other, other, every), 1)
    there, back = WAYS["e4m3_bf16"]
    packed = there(plain)
    assert torch.equal(back(packed), plain)
    word = packed.view(torch.int32)[:, 0].long() & 0xFFFFFFFF
    by4, by8 = ((word >> by | word << 32 - by) & 0xFFFFFFFF for by in (4, 8))
    low, high = word & 0x87F087F0, by4 & 0x80808080 | by8 & 0x07700770
    for wanted, got in ((every, low), (other, low >> 16), (other, high), (every, high >> 16)):
        values = (got & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16).double() * 2.0**120
        numbers = wanted & 127 != 127  # else NaN
        assert torch.equal(values[numbers], wanted.view(torch.float8_e4m3fn).double()[numbers])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "w4afp8"])
def test_codes_are_rewritten_some_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them: in pieces of seven rows, of which the last is not full; of one row, where that is no piece."""
    for rows in (7, 0.5):
        w = weights_of(name)
        monkeypatch.setattr(packing, "AT_ONCE", int(rows * w.w13.parts["data"].shape[-1]))
        there, _ = WAYS[PACKED[hopper_invariant][name]]
        wanted = [there(each.parts["data"].view(torch.uint8)) for each in (w.w13, w.w2)]
        packed = hopper_invariant.pack(w)
        for each, codes in zip((packed.w13, packed.w2), wanted, strict=True):
            assert torch.equal(each.parts["data"].view(torch.uint8), codes)


class Breaks:
    """A way to rewrite codes that fails at its third piece."""

    def __init__(self, way: Callable[[Tensor], Tensor], error: type[BaseException]) -> None:
        self.way, self.error, self.calls = way, error, 0

    def __call__(self, codes: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return self.way(codes)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "w4afp8"])
def test_what_is_interrupted_leaves_all_codes_as_they_were(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way it went; a second attempt then is like a first one."""
    w, packing_ = weights_of(name), PACKED[hopper_invariant][name]
    monkeypatch.setattr(packing, "AT_ONCE", w.w13.parts["data"].nbytes // 2)
    (there, back), plain = WAYS[packing_], raw(w)
    monkeypatch.setitem(WAYS, packing_, (Breaks(there, error), back))
    with pytest.raises(error):
        hopper_invariant.pack(w)
    assert all(torch.equal(a, b) for a, b in zip(plain, raw(w), strict=True))
    made = hopper_invariant.pack(w)
    packed = raw(made)
    monkeypatch.setitem(WAYS, packing_, (there, Breaks(back, error)))
    with pytest.raises(error):
        hopper_invariant.unpack(made)
    assert all(torch.equal(a, b) for a, b in zip(packed, raw(w), strict=True))
    hopper_invariant.unpack(made)
    assert all(torch.equal(a, b) for a, b in zip(plain, raw(w), strict=True))


def test_whoever_cannot_be_put_back_is_told() -> None:
    """The others are, all the same."""
    done: list[str] = []

    def fails() -> None:
        raise torch.OutOfMemoryError

    steps = [(lambda: done.append("a"), lambda: done.append("-a")), (lambda: done.append("b"), fails), (fails, fails)]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        all_or_none(steps)
    assert done == ["a", "b", "-a"]
    assert "load the weights again" in caught.value.__notes__[0]
    assert len(caught.value.__notes__) == 1


def test_storage_that_has_gaps_is_refused_before_anything_is_written() -> None:
    w = weights_of("nvfp4")
    spread = w.w2.parts["data"].transpose(0, 1).contiguous().transpose(0, 1)
    before = raw(w)
    with pytest.raises(RuntimeError, match="view"):
        hopper.pack(replace(w, w2=replace(w.w2, parts={**w.w2.parts, "data": spread})))
    assert all(torch.equal(a, b) for a, b in zip(before, raw(w), strict=True))


def test_weights_that_cannot_be_unpacked_again_are_other_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that is measured next reads them as plain: there must be no NaN among them."""
    w = weights_of("mxfp8")
    there, back = WAYS["e4m3_bf16"]
    monkeypatch.setitem(WAYS, "e4m3_bf16", (there, Breaks(back, torch.OutOfMemoryError)))
    monkeypatch.setattr(packing, "AT_ONCE", w.w13.parts["data"].nbytes // 2)
    with pytest.raises(torch.OutOfMemoryError), ready(w, hopper):
        assert bool(w.w13.dequantize().isnan().any()), "packed, and read as plain"
    assert not bool(w.w13.dequantize().isnan().any())
    assert not bool(w.w2.dequantize().isnan().any())


def test_scales_stay_where_they_are() -> None:
    """Graphs hold the addresses of static scales, too; a reload changes what stands there."""
    mixture = spec_of(plan_fixtures.read("qwen3-30b-a3b").config).layers[1].mlp
    assert isinstance(mixture, MoESpec)
    small = replace(mixture, router=replace(mixture.router, experts=2))
    with torch.inference_mode():  # in which a model may be made, and loaded outside of it
        made = Experts(small, SCHEMES["nvfp4"], LIKE)
    made.settle()
    experts = Experts(small, SCHEMES["w4afp8_static"], LIKE, hopper_invariant)
    for each in (experts.plain.w13, experts.plain.w2):
        fill(each)
    loaded = experts.input_scales_E3
    assert loaded is not None

    def held() -> tuple[Tensor, Tensor]:
        of_rows, between = experts.input_scale, experts.weights.between_scale
        assert of_rows is not None
        assert between is not None
        return of_rows, between

    loaded.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.25, 7.0]]))
    experts.settle()
    first, places = [float(each) for each in held()], [each.data_ptr() for each in held()]
    experts.open()
    loaded.mul_(2)
    experts.settle()
    assert [first, [float(each) for each in held()]] == [[2.0, 7.0], [4.0, 14.0]]
    assert [each.data_ptr() for each in held()] == places
    assert experts.weights.packing == "zigzag"


@pytest.mark.parametrize("kernels", PACKED)
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_rewritten_within_their_storage_and_back(name: str, kernels: ModuleType) -> None:
    """Those that a kernel decodes in fewer steps then; all else stays as it is."""
    w, wanted = weights_of(name), PACKED[kernels].get(name, "plain")
    before, values = raw(w), (w.w13.dequantize(), w.w2.dequantize())
    there = kernels.pack(w)
    assert there.packing == wanted
    assert any(not torch.equal(a, b) for a, b in zip(before, raw(w), strict=True)) == (wanted != "plain")
    once = raw(w)
    assert all(torch.equal(a, b) for a, b in zip(once, raw(kernels.pack(there, there)), strict=True)), "packed twice"
    back = kernels.unpack(there)
    assert back.packing == "plain"
    assert all(torch.equal(a, b) for a, b in zip(before, raw(back), strict=True))
    for value, weight in zip(values, (back.w13, back.w2), strict=True):
        assert torch.equal(value, weight.dequantize())


@pytest.mark.parametrize(
    ("kernels", "name", "packing"),
    [(hopper, "w4afp8", "zigzag"), (hopper_invariant, "w4afp8", "plain"), (hopper, "mxfp4", "plain"),
     (hopper, "nvfp4", "e2m1_bf16")],
)  # fmt: skip
def test_codes_of_another_kind_are_not_multiplied(kernels: ModuleType, name: str, packing: str) -> None:
    w = replace(weights_of(name), packing=packing)
    rows = hopper.encode_later(torch.zeros(2, 256, dtype=torch.bfloat16), SCHEMES[name].activation)
    with pytest.raises(ValueError, match=f"packed as '{packing}'"):
        kernels.experts(rows, w, torch.zeros(2, 1).int(), torch.ones(2, 1))


@pytest.mark.parametrize("backend", ["reference", "cpu", "cpu_invariant", "cpu_quant", "cpu_native", "deep_gemm",
                                     "triton", "triton_invariant"])  # fmt: skip
def test_kernels_that_read_weights_as_formats_say_take_no_others(backend: str) -> None:
    w, rows = replace(weights_of("bf16"), packing="another"), torch.zeros(2, 256, dtype=torch.bfloat16)
    experts = registry.backends()[backend].experts
    with pytest.raises(ValueError, match="packed as 'another', not as 'plain'"):
        experts(encode(rows, Encoding("bf16")), w, torch.zeros(2, 1).int(), torch.ones(2, 1))


def test_rows_in_another_encoding_than_the_layers_are_not_multiplied() -> None:
    w = hopper.pack(weights_of("nvfp4_dynamic"))
    rows = hopper.encode_later(torch.zeros(2, 256, dtype=torch.bfloat16), Encoding("bf16"))
    with pytest.raises(ValueError, match="rows in bf16, and nvfp4 between"):
        hopper.experts(rows, w, torch.zeros(2, 1).int(), torch.ones(2, 1))


@pytest.mark.parametrize(
    ("name", "deterministic"),
    [
        ("w4afp8_static", True),
        ("w4afp8_token", True),
        ("w4afp8", False),
        ("fp8", True),
        ("nvfp4", False),
        ("nvfp4", True),
        ("mxfp4a8", False),
        ("mxfp4", True),
    ],
)
def test_plans_say_how_experts_are_packed(name: str, deterministic: bool) -> None:
    """All cells of a layer in one way."""
    wishes = Wishes(deterministic=deterministic, experts="hopper_invariant" if deterministic else "hopper")
    spec = hold(spec_of(plan_fixtures.read("qwen3-30b-a3b").config), SCHEMES[name])
    made = plan(spec, GPUS["h100"], CATALOGUE, wishes, "bfloat16")
    assert isinstance(made, ModelPlan)
    cells = [cell for layer in made.layers for cell in layer.cells]
    packings = {cell.packed.packing for cell in cells}
    for cell in cells:
        assert cell.path.stage("experts").kernel not in [each.candidate for each in cell.rejected]
    assert packings == {PACKED[hopper_invariant if deterministic else hopper].get(name, "plain")}


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "w4afp8_static"])
def test_contracts_of_other_packings_are_not_told_of(name: str) -> None:
    """Whoever can run a layer is not rejected; whoever cannot says what its contract for the layer's formats lacks."""
    for hidden in (256, 288):
        rejected: list[Rejection] = []
        need = Case(SCHEMES[name], 8, hidden, 128, 2).need(GPUS["h100"], 1)
        found = {each.backend for each in able("experts", need, CATALOGUE, Wishes(), rejected)}
        told = [each.reason for each in rejected if each.candidate == "hopper"]
        assert ("hopper" in found) == (hidden == 256)
        assert told == ([] if hidden == 256 else ["needs a hidden size that is a multiple of 64, not 288"])
