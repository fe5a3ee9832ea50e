"""Quantised products of the CPU against the reference in FP64 on the same codes: the kernel error of DESIGN section 5.

Every format with every encoding; stage by stage through the experts; ragged shapes; tiles; batch invariance; and what
is in memory. The reference is itself held against plain loops in FP64. Letters as in kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.contracts.scheme import ENCODINGS, FORMATS, SCHEMES, Encoding, Scheme, WeightFormat
from moesaic.contracts.spec import SILU, Activation
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels import cpu_decode, cpu_invariant, cpu_quant, reference
from moesaic.kernels.ops import ExpertWeights
from tests.compare import assert_rows_close
from tests.quant_checks import LIMIT, bits, checked_encode, checked_experts, checked_linear, close, in_fp64, same_bits

CLAMPED = Activation("swiglu_oai")
FORMS = {
    str(form) + form.scale_dtype[0] * bool(form.group) + "z" * form.zero_points: form
    for form in (
        *(WeightFormat(name) for name in FORMATS if name not in ("bf16", "int4")),
        WeightFormat("int4", 32, "bfloat16"), WeightFormat("int4", 128, "float32"), WeightFormat("int4", 64, "float16"),
        WeightFormat("int4", 32, "bfloat16", zero_points=True),
    )
}  # fmt: skip
HOW = [Encoding(name) for name in ENCODINGS] + [Encoding("fp8_tensor", static=True), Encoding("nvfp4", static=True)]
RAGGED = ((0, "random"), (1, "random"), (7, "nobody"), (7, "holes"), (37, "one expert"), (37, "padding rows"))
QUANTIZED = [scheme for scheme in SCHEMES.values() if scheme.quantized]


def scale_of(encoding: Encoding) -> Tensor | None:
    return torch.tensor(0.0137) if encoding.static else None


def rows_of(x: Tensor, encoding: Encoding) -> Rows:
    return checked_encode(x, encoding, scale_of(encoding))


def weight(form: WeightFormat, segments: tuple[int, ...], columns: int, lead: tuple[int, ...] = ()) -> QuantTensor:
    """Random, each segment of a magnitude of its own."""
    parts = [torch.randn(*lead, rows, columns) * 4.0**i / columns**0.5 for i, rows in enumerate(segments)]
    return QuantTensor.of(torch.cat(parts, -2), form, segments)


def experts_of(scheme: Scheme, width: int = 64, hidden: int = 128, activation: Activation = SILU) -> ExpertWeights:
    """Seven experts, the last of which no routing below touches; with biases where the activation is gpt-oss's."""
    count, how = 7, scheme.activation
    w13, w2 = weight(scheme.weight, (width, width), hidden, (count,)), weight(scheme.weight, (hidden,), width, (count,))
    biases = (torch.randn(count, 2 * width), torch.randn(count, hidden)) if activation == CLAMPED else None
    return ExpertWeights(w13, w2, activation, how, scale_of(how), biases)


def routing(tokens: int, kind: str = "random", top_k: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(6)[:top_k] for _ in range(tokens)]) if tokens else torch.empty(0, top_k)
    ids = ids.to(torch.int32)
    if kind == "one expert":
        ids[:] = 2
    elif kind == "padding rows":
        ids[tokens // 2 :] = -1
    elif kind == "holes":
        ids[::3, 0] = -1
    elif kind == "nobody":
        ids[:] = -1
    return ids, torch.rand(tokens, top_k)


# --- dense products --------------------------------------------------------------------------------------------------


def test_the_contracts_promise_what_is_tested_here() -> None:
    assert {c.op for c in cpu_quant.CONTRACTS} == {"encode", "linear_quant", "experts"}
    for contract in cpu_quant.CONTRACTS:
        assert contract.formats == {form.name for form in FORMS.values()} == set(FORMATS) - {"bf16"}
        assert contract.encodings == {encoding.name for encoding in HOW} == set(ENCODINGS)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("encoding", HOW, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_linear(form: WeightFormat, encoding: Encoding, dtype: torch.dtype) -> None:
    """Three segments, none a multiple of 128, magnitudes apart; 0, 1, 7 and 33 rows; with and without bias."""
    w, bias = weight(form, (100, 60, 12), 256), torch.randn(172).to(dtype)
    for tokens in (0, 1, 7, 33):
        x = rows_of((torch.randn(tokens, 256) * 3).to(dtype), encoding)
        checked_linear(x, w, bias if tokens % 2 else None)
    checked_linear(x, w)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rows_of_the_identity_give_back_the_weight(form: WeightFormat, dtype: torch.dtype) -> None:
    """Every stored value, rounded once."""
    w = weight(form, (100, 60), 256)
    y_TN = cpu_quant.linear_quant(rows_of(torch.eye(256).to(dtype), Encoding("bf16")), w)
    assert torch.equal(y_TN, w.dequantize().T.to(dtype))


@pytest.mark.parametrize("encoding", ["bf16", "fp8_group128", "fp8_token"])
@pytest.mark.parametrize("columns", [1, 127, 129, 200, 384])
def test_ragged_edges_of_blocks(columns: int, encoding: str) -> None:
    """128 x 128 blocks whose last column and last row of each segment are cut short."""
    for form in (WeightFormat("fp8_block"), WeightFormat("fp8_channel"), WeightFormat("fp8_tensor")):
        for segments in ((1, 127, 129), (130, 257, 3)):
            checked_linear(rows_of(torch.randn(5, columns), Encoding(encoding)), weight(form, segments, columns))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("segments", [(1536, 576), (384, 96, 96)], ids=["q_a kv_a", "q k v"])
def test_stacked_projections_of_real_heights(form: WeightFormat, segments: tuple[int, ...]) -> None:
    w, x = weight(form, segments, 128), rows_of(torch.randn(3, 128), Encoding("bf16"))
    whole, at = checked_linear(x, w), 0
    for i, rows in enumerate(segments):
        close(whole[:, at : at + rows], checked_linear(x, w.segment(i)), torch.float32, "the seam")
        at += rows


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_many_tiles(scheme: Scheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 19 rows that know no segments; experts larger than a tile; no tile larger than it may be."""
    monkeypatch.setattr(cpu_decode, "TILE", 19 * 128 + 1)
    tiles = watched_tiles(monkeypatch)
    w, bias = weight(scheme.weight, (100, 60), 128), torch.randn(160).to(dtype)
    checked_linear(rows_of(torch.randn(5, 128).to(dtype), scheme.activation), w, bias)
    x = rows_of(torch.randn(29, 128).to(dtype), scheme.activation)
    checked_experts(x, experts_of(scheme, width=128, activation=CLAMPED), *routing(29))
    assert len(tiles) == 9 + 6 * (14 + 7)
    assert max(tile.numel() for tile in tiles) == 19 * 128


def watched_tiles(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every decoded tile from here on."""
    seen: list[Tensor] = []

    def watch(tile: Callable[[QuantTensor, slice], Tensor]) -> Callable[[QuantTensor, slice], Tensor]:
        return lambda w, rows: seen.append(tile(w, rows)) or seen[-1]

    for name, decoder in list(cpu_decode.WEIGHTS.items()):
        monkeypatch.setitem(cpu_decode.WEIGHTS, name, replace(decoder, tile=watch(decoder.tile)))
    return seen


def watched_operands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, torch.dtype]]:
    """The dtypes of both operands of every product from here on."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    linear, mm = cpu_invariant.linear, torch.mm
    monkeypatch.setattr(cpu_invariant, "linear", lambda x, w, *a: seen.append((x.dtype, w.dtype)) or linear(x, w, *a))
    monkeypatch.setattr(torch, "mm", lambda x, w, out: seen.append((x.dtype, w.dtype)) or mm(x, w, out=out))
    return seen


def test_bf16_products_accumulate_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that a BF16 accumulator cannot hold: 256 + 1 is 256 there."""
    operands = watched_operands(monkeypatch)
    for form, encoding in (("mxfp8", "mxfp8"), ("mxfp8", "bf16"), ("mxfp4", "mxfp8"), ("mxfp4", "bf16")):
        w = QuantTensor.of(torch.ones(3, 4096), WeightFormat(form))
        for tokens in (1, 40):
            rows = rows_of(torch.ones(tokens, 4096).bfloat16(), Encoding(encoding))
            assert torch.equal(cpu_quant.linear_quant(rows, w), torch.full((tokens, 3), 4096.0).bfloat16())
    assert set(operands) == {(torch.bfloat16, torch.bfloat16)}
    row = torch.full((4096,), 0.125)  # beside 1,024, each of these vanishes in BF16; their sum does not
    row[0] = 1024.0
    w = QuantTensor.of(row[None], WeightFormat("mxfp8"))
    w.parts["scale"][0, 0] = 127 + 4  # 1,024 is E4M3's 64 x 2^4; the 31 beside it become 2^-3 again
    w.parts["data"][0, :32] = torch.tensor([64.0] + [2.0**-7] * 31)
    assert torch.equal(w.dequantize()[0], row)
    rows = rows_of(torch.ones(1, 4096).bfloat16(), Encoding("bf16"))
    assert cpu_quant.linear_quant(rows, w).item() == 1536.0  # 1,024 + 4,095 / 8, rounded to BF16's steps of 8


@pytest.mark.parametrize("u", [0, 1, 127, 240, 246])
def test_extreme_powers_of_two(u: int) -> None:
    """UE8M0 from its smallest code up to where single products stay finite; 0 is 2^-127, an FP32 subnormal."""
    for form in (WeightFormat("mxfp8"), WeightFormat("mxfp4")):
        w = weight(form, (24,), 64)
        w.parts["scale"].fill_(u)
        checked_linear(rows_of(torch.randn(5, 64) * 2.0 ** min(100, 126 - u), Encoding("bf16")), w)


@pytest.mark.parametrize("encoding", HOW, ids=str)
def test_what_is_not_a_number_stays_where_it_was(encoding: Encoding) -> None:
    """A row with NaN or infinity must not look like a number afterwards, nor touch the rows beside it."""
    if encoding.name == "fp8_tensor" and not encoding.static:
        pytest.skip("its scale is common to all rows")
    w, x = weight(WeightFormat("mxfp8"), (40,), 128), torch.randn(6, 128)
    x[1, 5], x[3, 7] = float("nan"), float("inf")
    rows = rows_of(x, encoding)
    got, wanted = cpu_quant.linear_quant(rows, w), reference.linear_quant(in_fp64(rows), w)
    assert torch.equal(got.isfinite(), wanted.isfinite())
    assert not got[1].isfinite().any()
    close(got[[0, 2, 4, 5]], wanted[[0, 2, 4, 5]], torch.float32, "the others")


# --- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.name)
def test_experts(scheme: Scheme, dtype: torch.dtype) -> None:
    for activation in (SILU, CLAMPED):
        w = experts_of(scheme, width=128, hidden=256, activation=activation)
        if w.biases:
            w = replace(w, biases=(w.biases[0].to(dtype), w.biases[1].to(dtype)))
        for tokens, kind in RAGGED:
            x = rows_of(torch.randn(tokens, 256).to(dtype), scheme.activation)
            checked_experts(x, w, *routing(tokens, kind))


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.name)
def test_only_touched_experts_are_decoded(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = experts_of(scheme, 128), rows_of(torch.randn(5, 128).bfloat16(), scheme.activation)
    tiles, weights = watched_tiles(monkeypatch), torch.rand(5, 2)
    ids = torch.tensor([[0, 2], [5, 2], [0, -1], [2, 0], [-1, -1]], dtype=torch.int32)
    y = cpu_quant.experts(x, w, ids, weights)
    assert sum(len(tile) for tile in tiles) == 2 * 3
    for part in (*w.w13.parts.values(), *w.w2.parts.values()):
        for e in (1, 3, 4, 6):  # whatever they hold now must not matter
            part[e] = bits(part[e]).fill_(0xFF).view(part.dtype).view(part[e].shape)
    assert torch.equal(cpu_quant.experts(x, w, ids, weights), y)


def naive_experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """One token and one choice at a time in FP64, on operands that were decoded beforehand, element by element."""
    x_TD, w13, w2 = x.decode().double(), w.w13.dequantize().double(), w.w2.dequantize().double()
    at = [(t, a, e) for t, row in enumerate(ids_TA.tolist()) for a, e in enumerate(row) if e >= 0]
    hidden = []
    for t, _, e in at:
        joined = torch.stack([(row * x_TD[t]).sum() for row in w13[e]])
        gate, up = (joined if w.biases is None else joined + w.biases[0][e].double()).chunk(2)
        if w.activation.kind == "swiglu_oai":
            gate, up = torch.where(gate > 7, 7.0, gate), torch.where(up.abs() > 7, 7 * up.sign(), up)
            hidden.append((up + 1) * gate / (1 + torch.exp(-1.702 * gate)))
        else:
            hidden.append(gate / (1 + torch.exp(-gate)) * up)
    coded = reference.encode(torch.stack(hidden), w.between, w.between_scale)
    between = coded.data if w.between.name == "bf16" else coded.decode().double()
    y = torch.zeros(len(x_TD), w2.shape[1], dtype=torch.float64)
    for (t, a, e), h in zip(at, between, strict=True):
        one = torch.stack([(row * h).sum() for row in w2[e]])
        y[t] += weights_TA[t, a].double() * (one if w.biases is None else one + w.biases[1][e].double())
    return y


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.name)
def test_the_reference_against_plain_loops(scheme: Scheme) -> None:
    """Where both round between the products, they round the same FP64 numbers: one wrong step would show."""
    group = max(32, scheme.weight.group)
    for activation in (SILU, CLAMPED):
        w, (ids, weights) = experts_of(scheme, group, group, activation), routing(7, "holes")
        x = in_fp64(rows_of(torch.randn(7, group), scheme.activation))
        assert_rows_close(reference.experts(x, w, ids, weights), naive_experts(x, w, ids, weights), 1e-12, "reference")


# --- what is in memory, and in which dtype ---------------------------------------------------------------------------

CODES = {
    "fp8_tensor": {"data": torch.float8_e4m3fn, "scale": torch.float32},
    "fp8_channel": {"data": torch.float8_e4m3fn, "scale": torch.float32},
    "fp8_block": {"data": torch.float8_e4m3fn, "scale": torch.float32},
    "mxfp8": {"data": torch.float8_e4m3fn, "scale": torch.uint8},
    "mxfp4": {"data": torch.uint8, "scale": torch.uint8},
    "nvfp4": {"data": torch.uint8, "scale": torch.float8_e4m3fn, "global_scale": torch.float32},
    "int4": {"data": torch.uint8, "scale": torch.bfloat16},
}
WIRE = {
    "fp8_tensor": {"data": torch.float8_e4m3fn, "scale": torch.float32},
    "fp8_token": {"data": torch.float8_e4m3fn, "scale": torch.float32},
    "fp8_group128": {"data": torch.float8_e4m3fn, "scale": torch.float32},
    "mxfp8": {"data": torch.float8_e4m3fn, "scale": torch.uint8},
    "nvfp4": {"data": torch.uint8, "scale": torch.float8_e4m3fn, "global_scale": torch.float32},
}
IN_BF16 = {"mxfp8", "mxfp4a8"}
"""Schemes whose second product may run in BF16: both of its operands are BF16 numbers, and no factor is left over."""
DENSE_IN_BF16 = IN_BF16 | {"mxfp8a16", "mxfp4"}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.name)
def test_the_dtype_on_each_arrow(scheme: Scheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    w = experts_of(scheme, 128)
    for tensor in (w.w13, w.w2):
        assert {name: part.dtype for name, part in tensor.parts.items()} == CODES[scheme.weight.name]
    wire = {"data": dtype} if scheme.activation.name == "bf16" else WIRE[scheme.activation.name]
    rows = rows_of(torch.randn(5, 128).to(dtype), scheme.activation)
    assert {name: part.dtype for name, part in rows.parts.items()} == wire
    before = [part.clone() for part in (*w.w13.parts.values(), *w.w2.parts.values(), *rows.parts.values())]
    operands, (ids, weights) = watched_operands(monkeypatch), routing(5)
    assert cpu_quant.experts(rows, w, ids, weights).dtype == dtype
    second = torch.bfloat16 if dtype == torch.bfloat16 and scheme.name in IN_BF16 else torch.float32
    touched = len(ids.unique())
    assert operands == [(torch.float32, torch.float32)] * touched + [(second, second)] * touched
    assert cpu_quant.linear_quant(rows, w.w2[0]).dtype == dtype
    dense = torch.bfloat16 if dtype == torch.bfloat16 and scheme.name in DENSE_IN_BF16 else torch.float32
    assert operands[2 * touched :] == [(dense, dense)]
    after = (*w.w13.parts.values(), *w.w2.parts.values(), *rows.parts.values())
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))


# --- batch invariance ------------------------------------------------------------------------------------------------


def pieces(tokens: int) -> Iterator[slice]:
    for count in (1, 3, 8, 15, 16, 17, 33, 64):
        for start in (0, tokens - count):
            yield slice(start, start + count)


INVARIANT = [scheme for scheme in QUANTIZED if scheme.activation.by_row]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("scheme", INVARIANT, ids=lambda s: s.name)
def test_a_row_does_not_see_the_rows_beside_it(scheme: Scheme, dtype: torch.dtype) -> None:
    """Bit for bit, encoding included, for dense products (of several tiles too) and experts."""
    x, how = torch.randn(70, 256).to(dtype), scheme.activation
    narrow, tall = weight(scheme.weight, (100, 60), 256), weight(scheme.weight, (2100,), 256)
    held, (ids, weights) = experts_of(scheme, width=128, hidden=256), routing(70, "holes")

    def compute(rows: slice) -> tuple[Tensor, ...]:
        coded = rows_of(x[rows], how)
        dense = (cpu_quant.linear_quant(coded, w) for w in (narrow, tall))
        return (*dense, cpu_quant.experts(coded, held, ids[rows], weights[rows]))

    whole = compute(slice(None))
    for rows in pieces(70):
        for mine, all_rows in zip(compute(rows), whole, strict=True):
            assert torch.equal(mine, all_rows[rows]), rows


def test_a_scale_of_all_rows_does_depend_on_them() -> None:
    """The gauge above can tell, and `by_row` tells the truth, of the one encoding that it excludes."""
    x = torch.randn(70, 256) * torch.logspace(-2, 1, 70)[:, None]
    whole = cpu_quant.encode(x, Encoding("fp8_tensor")).decode()
    assert not torch.equal(cpu_quant.encode(x[:5], Encoding("fp8_tensor")).decode(), whole[:5])
    for encoding in HOW:
        coded = cpu_quant.encode(x, encoding, scale_of(encoding)).decode()
        alone = cpu_quant.encode(x[:5], encoding, scale_of(encoding)).decode()
        assert torch.equal(alone, coded[:5]) == encoding.by_row, encoding
