"""The Triton kernels in the interpreter, on small ragged shapes: the first of their rings. See triton_support.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moesaic.contracts.scheme import SCHEMES, Encoding, Scheme, WeightFormat
from moesaic.contracts.spec import SILU, Activation, RouterSpec
from moesaic.formats.encodings.requantize import requantize_slots
from moesaic.kernels import reference, triton
from moesaic.kernels._triton import linear_decoded
from moesaic.kernels.ops import KVView
from tests import triton_support as support
from tests.test_kernels import ROUTERS

# NumPy, which the interpreter computes with, warns of what masked lanes hold; a device does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
OAI = Activation("swiglu_oai")
ENCODINGS = [Encoding(n) for n in ("fp8_group128", "fp8_token", "fp8_tensor", "mxfp8", "nvfp4")]
ENCODINGS += [Encoding("fp8_tensor", True), Encoding("nvfp4", True)]
OTHERS = (
    Scheme("zeros", WeightFormat("int4", 32, "float16", True), Encoding("fp8_token")),
    Scheme("group 64", WeightFormat("int4", 64, "bfloat16"), Encoding("fp8_group128")),
    Scheme("mixed", WeightFormat("fp8_channel"), Encoding("mxfp8")),
    Scheme("wide rows", WeightFormat("mxfp4"), Encoding("fp8_group128")),
)


@pytest.fixture(autouse=True)
def interpreted() -> None:
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("runs on the device in the GPU ring")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_row_wise(tokens: int, dtype: torch.dtype) -> None:
    support.check_row_wise(tokens, 72, dtype)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_encodings_are_the_references_bit_for_bit(encoding: Encoding) -> None:
    for tokens, size in ((0, 32), (1, 32), (7, 160)):
        for dtype in (torch.float32, torch.bfloat16):
            support.check_encode(encoding, tokens, size, dtype)


@pytest.mark.parametrize("spec", [*ROUTERS.values(), RouterSpec(12, 4, "softmax_topk", "w", None, False)], ids=str)
@pytest.mark.parametrize("regime", ["usual", "all negative", "huge bias", "ties", "NaN", "bfloat16"])
def test_route(spec: RouterSpec, regime: str) -> None:
    logits_TE, bias_E = torch.randn(5, spec.experts) * 2, torch.randn(spec.experts) * 0.1
    if regime == "all negative":
        logits_TE = -logits_TE.abs() * 10 - 20
    if regime == "huge bias":
        logits_TE, bias_E = logits_TE.sign() * 3, torch.arange(spec.experts) * 4.0 - 1000
    if regime == "ties":
        logits_TE, bias_E = logits_TE.round(), bias_E * 0
    if regime == "NaN":
        logits_TE[1] = float("nan")
    if regime == "bfloat16":
        logits_TE = logits_TE.bfloat16()  # as a gate in BF16 leaves them; many are equal
    bias = bias_E if spec.bias else None
    ids, weights = triton.route(logits_TE, bias, spec)
    assert ids.dtype == torch.int32
    if regime == "NaN":
        assert weights[1].isnan().all()
        assert ((ids >= 0) & (ids < spec.experts)).all()
        ids, weights, logits_TE = ids[2:], weights[2:], logits_TE[2:]
    theirs, expected = reference.route(logits_TE, bias, spec)
    assert torch.equal(ids, theirs)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.quantized] + list(OTHERS), ids=lambda s: s.name)
def test_linear(scheme: Scheme) -> None:
    support.check_linear(scheme, 5, (40, 136, 20), 384)


MIXED = {f"{form} {rows}": Scheme(f"{form} {rows}", WeightFormat(form), rows)
         for form in ("mxfp8", "mxfp4") for rows in (Encoding("nvfp4"), Encoding("nvfp4", True))}  # fmt: skip
"""Rows have a scale beside those of blocks, weights have none."""


@pytest.mark.parametrize(("room", "tiles"), [(linear_decoded.ROOM, 0), (1, 0), (linear_decoded.ROOM, 264)])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "mxfp4a8", "nvfp4", "nvfp4_dynamic", "nvfp4a16", *MIXED])
def test_linear_by_weights_that_are_decoded_once(name: str, room: int, tiles: int,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As a whole, by 64 outputs at a time, and with sums in FP32; K of a group of 32 too few for a tile."""
    monkeypatch.setattr(linear_decoded, "TILES", tiles)
    monkeypatch.setattr(linear_decoded, "MANY", 5)
    monkeypatch.setattr(linear_decoded, "ROOM", room)
    monkeypatch.setattr(linear_decoded, "COLUMNS", 64)
    decoded, calls = linear_decoded.decoded, []
    monkeypatch.setattr(linear_decoded, "decoded", lambda *given: calls.append(given[2]) or decoded(*given))
    scheme = SCHEMES.get(name) or MIXED[name]
    support.check_linear(scheme, 5, (40, 136, 20), 352)
    assert calls == ([64, 64, 64, 4] if room == 1 else [196]) * 2, "with a bias, and without"
    support.check_linear(scheme, 4, (40,), 352)
    assert len(calls) == (8 if room == 1 else 2), "few rows are multiplied as before"


@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp8", "w4afp8"])
def test_experts(name: str) -> None:
    support.check_experts(SCHEMES[name], 7, (5, 256, 128, 3), "holes")


def test_experts_of_gpt_oss() -> None:
    support.check_experts(SCHEMES["mxfp4"], 3, (4, 96, 64, 2), activation=OAI)


@pytest.mark.parametrize("how", ["usual", "one expert"])
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_ragged_experts(tokens: int, how: str) -> None:
    support.check_experts(SCHEMES["bf16"], tokens, (4, 32, 16, 2), how)


@pytest.mark.long
@pytest.mark.parametrize("activation", [SILU, OAI], ids=lambda a: a.kind)
@pytest.mark.parametrize("scheme", [*SCHEMES.values(), *OTHERS], ids=lambda s: s.name)
def test_experts_in_every_scheme(scheme: Scheme, activation: Activation) -> None:
    for tokens, how in ((1, "usual"), (7, "holes"), (19, "one expert")):
        support.check_experts(scheme, tokens, (5, 256, 128, 3), how, activation)


@pytest.mark.parametrize("name", ["bf16", "w4afp8_static"])
def test_slotted(name: str) -> None:
    support.check_slotted(SCHEMES[name], (3, 6, 128, 128), [0, 6, 3])


def test_slotted_chain_of_w4afp8() -> None:
    support.check_slotted_chain((3, 6, 256, 128), [0, 6, 3])


@pytest.mark.parametrize(("window", "sinks"), [(None, False), (5, True)])
@pytest.mark.parametrize("view", [KVView(1, 24, 0, 16), KVView(2, 12, 24, 12), KVView(4, 12, 48, 8)], ids=str)
def test_attend_paged(view: KVView, window: int | None, sinks: bool) -> None:
    support.check_paged(view, 4, (13, 1, 300), (1, 1, 1), window, sinks)
    support.check_paged(view, 4, (7, 40, 20), (1, 11, 20), window, sinks)


@pytest.mark.parametrize(("queries", "length", "window"), [(1, 1, None), (17, 17, 6), (5, 100, None)])
def test_attend_dense(queries: int, length: int, window: int | None) -> None:
    q, k, v = (support.randn(n, 4, size) for n, size in ((queries, 24), (length, 24), (length, 16)))
    mine = triton.attend_dense(q, k, v, 0.25, window)
    support.close(mine.flatten(1), reference.attend_dense(q.double(), k.double(), v.double(), 0.25, window).flatten(1),
                  "attend_dense")  # fmt: skip


def test_requantised_slots_are_the_references_bit_for_bit() -> None:
    data = support.randn(3, 6, 256).to(torch.float8_e4m3fn)
    scales = (torch.rand(3, 2, 6) + 0.1).transpose(1, 2)  # a dispatcher's strides
    counts, scale = torch.tensor([0, 6, 3]), torch.tensor(0.3)
    mine = triton_requantize(data, scales, counts, scale)
    theirs = requantize_slots(data, scales, counts, scale)
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def triton_requantize(*args: torch.Tensor) -> torch.Tensor:
    from moesaic.kernels._triton.requantize import requantize_slots as kernel

    return kernel(*args)
