"""Activations in each encoding: error bounds, edges, independence of rows; and the requantiser of slots."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.contracts.scheme import ENCODINGS, SCHEMES, Encoding, WeightFormat
from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.formats import nibbles
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows, coder_of, encode
from moesaic.formats.encodings.requantize import requantize_slots
from tests.number_grids import E2M1, E4M3, nearest_code

ALL = [Encoding(name) for name in ENCODINGS] + [Encoding("fp8_tensor", True), Encoding("nvfp4", True)]
QUANTIZED = [encoding for encoding in ALL if encoding.name != "bf16"]
ROW_WISE = [encoding for encoding in ALL if encoding != Encoding("fp8_tensor")]
PEAK = {"fp8_tensor": 448, "nvfp4": 2688}


def coded(x: Tensor, encoding: Encoding, amax: float = 4.0) -> Rows:
    return encode(x, encoding, torch.tensor(amax / PEAK[encoding.name]) if encoding.static else None)


def fp8_codes(quotient: Tensor) -> Tensor:
    """The oracle's cast of an FP64 quotient, as bytes."""
    return (nearest_code(quotient, E4M3[:127]) | (quotient.signbit().long() << 7)).to(torch.uint8)


@pytest.mark.parametrize("encoding", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 256), (1, 256), (7, 256), (3, 0, 128), (2, 5, 384), (2, 3, 1, 128)])
def test_shapes_and_dtypes(encoding: Encoding, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    rows = coded(x, encoding)
    assert rows.dtype == dtype
    assert rows.encoding == encoding
    values = rows.decode()
    assert values.dtype == torch.float32
    assert values.shape == x.shape
    expected = {"bf16": dtype, "nvfp4": torch.uint8}.get(encoding.name, torch.float8_e4m3fn)
    assert rows.data.dtype == expected
    assert rows.data.is_contiguous()
    if x.numel():
        error = (values - x.float()).norm() / x.float().norm()
        assert error <= {"bf16": 0.0, "nvfp4": 0.13}.get(encoding.name, 0.035)  # Gaussian rows; E2M1 and E4M3


@pytest.mark.parametrize("encoding", QUANTIZED, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-30, 1.0, 1e4, 1e38])
def test_finite_rows_of_any_size_stay_finite_and_zeros_stay_zero(encoding: Encoding, size: float) -> None:
    x = torch.randn(4, 256).clamp_(-1, 1) * size
    x[1], x[2, 1:] = 0, -0.0
    values = coded(x, encoding).decode()
    assert values.isfinite().all()
    assert (values[x == 0] == 0).all()
    if not encoding.static:
        assert (values.abs() <= x.abs().max() * 1.25).all()


@pytest.mark.parametrize("encoding", QUANTIZED, ids=str)
def test_the_rows_are_left_alone(encoding: Encoding) -> None:
    x = torch.randn(5, 256)
    before = x.clone()
    coded(x, encoding).decode()
    assert torch.equal(x, before)


@pytest.mark.parametrize("encoding", ROW_WISE, ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(encoding: Encoding) -> None:
    x = (torch.randn(11, 256) * torch.logspace(-2, 1, 11)[:, None]).bfloat16()
    whole = coded(x, encoding)
    for row in range(11):
        alone = coded(x[row : row + 1], encoding)
        for name, part in alone.parts.items():
            mine = whole.parts[name][row : row + 1] if part.ndim else whole.parts[name]
            assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (part, mine)))


def test_dynamic_fp8_tensor_depends_on_the_batch_as_documented() -> None:
    """The reason why it is not batch-invariant; should this ever fail, say otherwise in its docstring."""
    x = torch.tensor([[1.0] * 128, [448.0] * 128])
    assert encode(x, Encoding("fp8_tensor")).parts["scale"].item() == 1.0
    assert encode(x[:1], Encoding("fp8_tensor")).parts["scale"].item() == torch.tensor(1 / 448).item()


@pytest.mark.parametrize("width", [128, 384, 1, 100, 257])
@pytest.mark.parametrize("name", ["fp8_token", "fp8_group128", "fp8_tensor"])
def test_fp8_codes_are_the_nearest_of_the_stored_scale(name: str, width: int) -> None:
    """The scale is amax / 448 in FP32, the code the nearest E4M3 to x / scale, ragged last group included."""
    x = (torch.randn(2, 3, width) * torch.logspace(-3, 3, 3)[:, None]).bfloat16()
    rows = encode(x, Encoding(name))
    assert rows.data.is_contiguous()
    groups = x.float().split(128 if name == "fp8_group128" else width, -1)
    amax = torch.stack([group.abs().amax(-1) for group in groups], -1)
    amax = x.float().abs().max() if name == "fp8_tensor" else amax
    assert torch.equal(rows.parts["scale"], amax / 448)
    scale = rows.parts["scale"].expand(2, 3, -1) if amax.ndim else rows.parts["scale"].expand(2, 3, 1)
    spread = scale.repeat_interleave(128 if name == "fp8_group128" else width, -1)[..., :width]
    assert torch.equal(rows.data.view(torch.uint8), fp8_codes((x.float() / spread).double()))
    assert torch.equal(rows.decode(), (rows.data.float().double() * spread).float())


def test_static_fp8_tensor_saturates_by_hand() -> None:
    """scale 0.5: 224 is 448, the largest code; beyond it saturates."""
    x = torch.tensor([[224.0, -224.0, 230.0, 1e30, -1e30, 1.0, -0.0, 0.0004]])
    rows = encode(x, Encoding("fp8_tensor", static=True), torch.tensor(0.5))
    assert rows.data.float().tolist() == [[448.0, -448.0, 448.0, 448.0, -448.0, 2.0, -0.0, 0.0]]
    assert rows.data.view(torch.uint8)[0, 6] == 0x80
    assert rows.decode()[0, :6].tolist() == [224.0, -224.0, 224.0, 224.0, -224.0, 1.0]


def test_mxfp8_rows_are_mxfp8_weights() -> None:
    """One definition for both operands; leading axes are slots."""
    x = torch.randn(3, 5, 96).bfloat16()
    rows, weight = encode(x, Encoding("mxfp8")), QuantTensor.of(x, WeightFormat("mxfp8"))
    for name in ("data", "scale"):
        assert torch.equal(rows.parts[name].view(torch.uint8), weight.parts[name].view(torch.uint8))
    assert torch.equal(rows.decode(), weight.dequantize())


def test_nvfp4_codes_are_the_nearest_of_the_stored_scales() -> None:
    x = torch.randn(9, 64).bfloat16()
    for encoding in (Encoding("nvfp4"), Encoding("nvfp4", True)):
        rows = coded(x, encoding)
        top = rows.parts["global_scale"]
        assert top.shape == ((9, 1) if not encoding.static else ())
        scale = rows.parts["scale"].float()
        expected = fp8_codes((x.float().view(9, 4, 16).abs().amax(-1) / 6 / top).double())
        assert torch.equal(rows.parts["scale"].view(torch.uint8), expected)
        total = (scale * top).repeat_interleave(16, -1)
        codes = nearest_code((x.float() / total).double(), E2M1[:8]) | (x.signbit().long() << 3)
        assert torch.equal(nibbles.unpack(rows.data).long(), codes)
        exact = torch.tensor(E2M1)[codes].double() * scale.repeat_interleave(16, -1) * top.double()
        assert torch.equal(rows.decode(), exact.float())


def test_a_dynamic_nvfp4_row_uses_the_whole_range_of_scales() -> None:
    x = torch.randn(6, 256) * torch.logspace(-10, 10, 6)[:, None]
    assert (encode(x, Encoding("nvfp4")).parts["scale"].float().amax(-1) == 448).all()


@pytest.mark.parametrize("encoding", [Encoding(name) for name in ENCODINGS if name != "bf16"], ids=str)
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_row_that_is_not_finite_does_not_become_finite(encoding: Encoding, odd: float) -> None:
    x = torch.randn(3, 256)
    x[1, 70] = odd
    values = encode(x, encoding).decode()
    assert not values[1].isfinite().all()
    if encoding.name != "fp8_tensor":
        assert values[[0, 2]].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="multiple of 32"):
        encode(torch.randn(2, 48), Encoding("mxfp8"))
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        encode(torch.randn(2, 24), Encoding("nvfp4"))
    with pytest.raises(UnsupportedError, match="no tensor-wide scale"):
        encode(torch.randn(2, 128), Encoding("fp8_token", static=True), torch.tensor(1.0))
    with pytest.raises(ValueError, match="do not go together"):
        encode(torch.randn(2, 128), Encoding("fp8_tensor"), torch.tensor(1.0))
    with pytest.raises(ValueError, match="do not go together"):
        encode(torch.randn(2, 128), Encoding("fp8_tensor", static=True))
    with pytest.raises(UnsupportedError, match="fp7"):
        coder_of(Encoding("fp7"))


def test_every_scheme_has_a_coder() -> None:
    for scheme in SCHEMES.values():
        coded(torch.randn(2, 256), scheme.activation).decode()


# --- fp8_group128 -> fp8_tensor on slots: E experts, C slots, H columns


def slots(counts: tuple[int, ...], capacity: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_ECH, data_ECH, scale_ECG, counts_E; the rows beyond an expert's count hold NaN everywhere."""
    x = torch.randn(len(counts), capacity, width) * torch.logspace(-1, 1, capacity)[:, None]
    rows = encode(x, Encoding("fp8_group128"))
    data, scale = rows.data, rows.parts["scale"].clone()
    for expert, count in enumerate(counts):
        data[expert, count:].view(torch.uint8).fill_(0x7F)
        scale[expert, count:] = math.nan
    return x, data, scale, torch.tensor(counts, dtype=torch.int32)


def requantised_by_loops(data: Tensor, scale: Tensor, counts: Tensor, top: Tensor) -> Tensor:
    """Row by row and group by group, with the oracle's cast; every step in FP32 as the definition says."""
    out = data.clone().view(torch.uint8)
    for expert, count in enumerate(counts.tolist()):
        for slot in range(count):
            for group in range(scale.shape[2]):
                columns = slice(128 * group, 128 * group + 128)
                value = data[expert, slot, columns].float() * scale[expert, slot, group]
                out[expert, slot, columns] = fp8_codes((value / top).double())
    return out


@pytest.mark.parametrize("counts", [(0, 5, 3, 1), (0, 0), (5,), (2,)])
@pytest.mark.parametrize("columns", [128, 384])
def test_requantiser(counts: tuple[int, ...], columns: int) -> None:
    """One expert with no rows, one full; rows out of use (NaN) are neither read nor written."""
    _, data, scale, counts_E = slots(counts, 5, columns)
    before, top = data.clone(), torch.tensor(3.0 / 448)
    expected = requantised_by_loops(data, scale, counts_E, top)
    assert torch.equal(requantize_slots(data, scale, counts_E, top).view(torch.uint8), expected)
    assert torch.equal(data.view(torch.uint8), before.view(torch.uint8))
    column_major = scale.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.full((len(counts), 9, 7), math.nan)[:, :5, : scale.shape[2]].copy_(scale)
    for strided in (column_major, padded):
        assert torch.equal(requantize_slots(data, strided, counts_E, top).view(torch.uint8), expected)
    target = torch.full_like(data.view(torch.uint8), 0x55).view(data.dtype)
    filled = requantize_slots(data, scale, counts_E.long(), top.view(1), target).view(torch.uint8)
    for expert, count in enumerate(counts):
        assert torch.equal(filled[expert, :count], expected[expert, :count])
        assert (filled[expert, count:] == 0x55).all()
    assert requantize_slots(data, scale, counts_E, top, data) is data
    assert torch.equal(data.view(torch.uint8), expected)


def test_requantiser_divides() -> None:
    """17 x 63 / 63 is a tie between the codes 16 and 18; a product with 1 / 63, as rounded, is not one."""
    tops = torch.arange(3.0, 400.0, 2.0)
    off = tops[(17 * tops) * (1 / tops) != 17]
    assert len(off)
    for top in off:
        out = requantize_slots(
            torch.ones(1, 1, 128).to(torch.float8_e4m3fn), (17 * top).view(1, 1, 1), torch.tensor([1]), top
        )
        assert (out.float() == 16).all()


def test_requantiser_saturates_and_differs_from_the_direct_path_by_two_roundings_at_most() -> None:
    x, data, scale, counts = slots((7, 7), 7, 256)
    top = x.abs().amax() / 448
    values = requantize_slots(data, scale, counts, top).float() * top
    steps = torch.maximum(x.abs() * 2**-4 * 2.07, top * 2**-9 * 2)  # two roundings of half a step each
    assert ((values - x).abs() <= steps).all()
    small = requantize_slots(data, scale, counts, top / 100)
    assert small.float().abs().max() == 448
    assert small.float().isfinite().all()


def test_requantiser_of_no_experts_and_no_slots() -> None:
    for experts, capacity in ((0, 4), (3, 0)):
        data = torch.empty(experts, capacity, 128).to(torch.float8_e4m3fn)
        out = requantize_slots(
            data, torch.empty(experts, capacity, 1), torch.zeros(experts, dtype=torch.int32), torch.tensor(1.0)
        )
        assert out.shape == data.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_ECH": torch.zeros(2, 4, 256)}, "E4M3"),
        ({"data_ECH": torch.zeros(2, 4, 192).to(torch.float8_e4m3fn)}, "whole groups of 128"),
        ({"scale_ECG": torch.ones(2, 4, 1)}, "group scales are FP32"),
        ({"scale_ECG": torch.ones(2, 4, 2).bfloat16()}, "group scales are FP32"),
        ({"counts_E": torch.tensor([4])}, "2 integers"),
        ({"counts_E": torch.tensor([4.0, 1.0])}, "2 integers"),
        ({"counts_E": torch.tensor([4, 5])}, "from 4 to 5, for 4 slots"),
        ({"counts_E": torch.tensor([-1, 1])}, "from -1 to 1"),
        ({"out_ECH": torch.zeros(2, 4, 256)}, "unlike the slots"),
        ({"scale": torch.tensor(0.0)}, "not a positive number"),
        ({"scale": torch.tensor(math.nan)}, "not a positive number"),
        ({"scale": torch.ones(2)}, "not a positive number"),
    ],
)
def test_requantiser_refuses(change: dict[str, Tensor], message: str) -> None:
    good = {
        "data_ECH": torch.zeros(2, 4, 256).to(torch.float8_e4m3fn),
        "scale_ECG": torch.ones(2, 4, 2),
        "counts_E": torch.tensor([4, 0]),
        "scale": torch.tensor(1.0),
    }
    requantize_slots(**good)
    kind = CheckpointError if "scale" in change else UnsupportedError
    with pytest.raises(kind, match=message):
        requantize_slots(**{**good, **change})
