"""The Triton kernels on a GPU at production shapes (`-m gpu`): the third ring. See triton_support.py.

Shapes: E256 K7168 N2048 (DeepSeek-V3), E128 K2048 N768 (Qwen3-30B-A3B), E64 K2048 N1408 (DeepSeek-V2-Lite), and
E128 K2880 N2880 (gpt-oss-120b), at the row counts of decoding and of prompts, ragged.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from moesaic.contracts.scheme import SCHEMES, Encoding, Scheme
from moesaic.contracts.spec import SILU, Activation, RouterSpec
from moesaic.formats.encodings.requantize import requantize_slots
from moesaic.kernels import reference, triton
from moesaic.kernels._triton import linear_decoded
from moesaic.kernels.ops import KVView
from tests import triton_support as support
from tests.test_kernels import ROUTERS
from tests.test_triton_interpreter import ENCODINGS, MIXED, OTHERS

pytestmark = pytest.mark.gpu
OAI = Activation("swiglu_oai")
SMALL, LARGE, LITE = (128, 2048, 768, 8), (256, 7168, 2048, 8), (64, 2048, 1408, 6)
GPT_OSS = (128, 2880, 2880, 4)
DEEPSEEK_V3 = RouterSpec(256, 8, "sigmoid", "w", "b", True, 2.5, 8, 4, "top2_sum")
QWEN3 = RouterSpec(128, 8, "softmax", "w")
COUNTS = [0, 128, 1, 17, 64, 33, *range(2, 28)]
"""Slots in use of 32 experts, of 128 each."""


@pytest.fixture(autouse=True)
def shared_memory() -> Iterator[None]:
    """Test processes share the device."""
    yield
    torch.cuda.empty_cache()


def test_the_backend_is_chosen_here() -> None:
    assert triton.probe() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [72, 2048, 7168])
def test_row_wise(size: int, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 257):
        support.check_row_wise(tokens, size, dtype)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_encodings_are_the_references_bit_for_bit(encoding: Encoding) -> None:
    for tokens, size in ((0, 32), (1, 2048), (7, 160), (1023, 7168), (65, 768)):
        for dtype in (torch.float32, torch.bfloat16):
            support.check_encode(encoding, tokens, size, dtype)


@pytest.mark.parametrize("spec", [*ROUTERS.values(), DEEPSEEK_V3, QWEN3, RouterSpec(128, 4, "softmax_topk", "w")],
                         ids=str)  # fmt: skip
def test_route(spec: RouterSpec) -> None:
    for tokens in (0, 1, 1021):
        for shift, spread, huge in ((0.0, 2.0, 0), (-30.0, 5.0, 0), (0.0, 2.0, 1000), (-30.0, 5.0, -1000)):
            logits = (torch.randn(tokens, spec.experts, device="cuda") * spread + shift).bfloat16().float()
            bias = torch.randn(spec.experts, device="cuda") * (100 if huge else 0.1) + (huge or -3)
            bias = bias.bfloat16().float() if spec.bias else None
            ids, weights = triton.route(logits, bias, spec)
            narrow = triton.route(logits.bfloat16(), bias, spec)  # the same numbers, as a gate in BF16 leaves them
            assert torch.equal(narrow[0], ids)
            assert torch.equal(narrow[1], weights)
            theirs, expected = reference.route(logits.cpu(), None if bias is None else bias.cpu(), spec)
            same = (ids.cpu() == theirs).all(1)
            # The last bit of a score is the device's own, and where two scores differ by it, either order is right.
            assert same.sum() >= 0.99 * tokens
            torch.testing.assert_close(weights.cpu()[same], expected[same], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.quantized] + list(OTHERS), ids=lambda s: s.name)
def test_linear(scheme: Scheme) -> None:
    for tokens in (1, 17, 64, 300, 1000):
        support.check_linear(scheme, tokens, (4096, 512, 520), 2048)
    support.check_linear(scheme, 5, (40, 136, 20), 384)


@pytest.mark.parametrize("scheme", [SCHEMES["mxfp8"], SCHEMES["mxfp4"], SCHEMES["nvfp4_dynamic"], *MIXED.values()],
                         ids=lambda s: s.name)  # fmt: skip
def test_linear_by_parts_of_a_weight(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are decoded once, 256 outputs at a time, rounded by the library where it may."""
    monkeypatch.setattr(linear_decoded, "TILES", 0)
    w, x = support.weight(scheme, (600, 136), 2048), support.randn(200, 2048)
    rows = triton.encode(x, scheme.activation, support.static_scale(scheme.activation))
    y = triton.linear_quant(rows, w)
    support.close(y, reference.linear_quant(support.in_double(rows), w), scheme.name)
    monkeypatch.setattr(linear_decoded, "ROOM", 1)
    support.close(triton.linear_quant(rows, w), y.double(), "by parts")


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_experts(scheme: Scheme) -> None:
    for tokens, how in ((0, "usual"), (1, "usual"), (61, "holes"), (2039, "holes")):
        support.check_experts(scheme, tokens, SMALL, how)


@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp8", "w4afp8"])
def test_ragged_experts(name: str) -> None:
    """All rows to one expert; and blocks of 32 and 64 rows."""
    for tokens, how in ((67, "one expert"), (263, "usual"), (1021, "usual")):
        support.check_experts(SCHEMES[name], tokens, SMALL, how)


@pytest.mark.parametrize("scheme", OTHERS, ids=lambda s: s.name)
def test_experts_in_other_schemes(scheme: Scheme) -> None:
    for tokens in (2, 61, 2039):
        support.check_experts(scheme, tokens, LITE, "holes")


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "nvfp4", "w4afp8_static"])
def test_large_experts(name: str) -> None:
    for tokens in (1, 131):
        support.check_experts(SCHEMES[name], tokens, LARGE)


@pytest.mark.parametrize("name", ["bf16", "mxfp4", "mxfp4a8"])
def test_experts_of_gpt_oss(name: str) -> None:
    for tokens, how in ((1, "usual"), (67, "holes"), (1031, "usual")):
        support.check_experts(SCHEMES[name], tokens, GPT_OSS, how, OAI)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.activation.by_row], ids=lambda s: s.name)
def test_slotted(scheme: Scheme) -> None:
    support.check_slotted(scheme, (32, 128, 2048, 768), COUNTS)


def test_slotted_chain_of_w4afp8() -> None:
    support.check_slotted_chain((32, 128, 7168, 2048), COUNTS)


@pytest.mark.parametrize(("window", "sinks"), [(None, False), (128, True)])
@pytest.mark.parametrize(("view", "heads"), [(KVView(1, 576, 0, 512), 128), (KVView(1, 576, 0, 512), 16),
                                             (KVView(4, 128, 512, 128), 32), (KVView(8, 64, 512, 64), 64),
                                             (KVView(2, 24, 48, 24), 4)], ids=str)  # fmt: skip
def test_attend_paged(view: KVView, heads: int, window: int | None, sinks: bool) -> None:
    support.check_paged(view, heads, (1,), (1,), window, sinks)
    support.check_paged(view, heads, (3000,), (1,), window, sinks)
    support.check_paged(view, heads, tuple(range(1, 1300, 41)), (1,) * 32, window, sinks)
    support.check_paged(view, heads, (700, 300, 513), (1, 300, 129), window, sinks)


@pytest.mark.parametrize(("queries", "length"), [(1, 1), (257, 257), (64, 1031)])
def test_attend_dense(queries: int, length: int) -> None:
    q, k, v = (support.randn(n, 16, size) for n, size in ((queries, 192), (length, 192), (length, 128)))
    mine = triton.attend_dense(q, k, v, 0.07)
    theirs = reference.attend_dense(q.double(), k.double(), v.double(), 0.07)
    support.close(mine.flatten(1), theirs.flatten(1), "attend_dense")


@pytest.mark.parametrize("size", [(300, 2048, 6144), (1, 2048, 128), (64, 7168, 256)], ids=str)
def test_plain_products_are_summed_in_fp32(size: tuple[int, int, int]) -> None:
    tokens, k, n = size
    for dtype in (torch.bfloat16, torch.float32):
        x, w = support.randn(tokens, k, dtype=dtype), support.randn(n, k, dtype=dtype)
        support.close(triton.linear(x, w), x.double() @ w.double().T, "linear", dtype)
        if dtype == torch.float32:
            assert support.worst(triton.linear(x, w), x.double() @ w.double().T) < 1e-5, "TF32 in the router"


@pytest.mark.parametrize("scale", [0.3, 1.7, 1e-3, 1e-30, 1e-40, 3e30])
def test_requantised_slots_are_the_references_bit_for_bit(scale: float) -> None:
    """All codes but NaN, -0 among them; scales that saturate everything, or round it to 0."""
    from moesaic.kernels._triton.requantize import requantize_slots as kernel

    codes = torch.randint(0, 256, (32, 128, 7168), dtype=torch.uint8, device="cuda")
    data = torch.where(codes % 128 == 127, 128, codes).view(torch.float8_e4m3fn)
    scales = (torch.rand(32, 56, 128, device="cuda") + 0.1).transpose(1, 2)
    counts, one = torch.randint(0, 129, (32,), device="cuda"), torch.tensor(scale, device="cuda")
    mine, theirs = kernel(data, scales, counts, one), requantize_slots(data, scales, counts, one)
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("name", ["bf16", "fp8", "nvfp4"])
def test_experts_in_a_graph(name: str) -> None:
    """Captured once, replayed on other tokens and other routings: nothing of the first routing is left in it."""
    scheme, (experts, hidden, width, top_k) = SCHEMES[name], SMALL
    w, x = support.expert_weights(scheme, (experts, hidden, width), SILU), support.randn(24, hidden)
    ids, weights = support.some_ids(24, experts, top_k, "usual"), torch.rand(24, top_k, device="cuda")
    scale = support.static_scale(scheme.activation)

    def call() -> torch.Tensor:
        out: torch.Tensor = triton.experts(triton.encode(x, scheme.activation, scale), w, ids, weights)
        return out

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for how in ("one expert", "holes", "usual"):
        x.copy_(support.randn(24, hidden))
        ids.copy_(support.some_ids(24, experts, top_k, how))
        graph.replay()
        assert torch.equal(captured, call()), how
