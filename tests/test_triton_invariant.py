"""`triton_invariant`: a row's result, bit for bit, whatever runs beside it; and right at all. In both rings.

The claim is about equality, so everything is compared with `torch.equal`: whole against any part, and a token read as
the last of a prompt against the same token decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moesaic.contracts.scheme import SCHEMES, Encoding
from moesaic.contracts.spec import SILU, KVParts, RouterSpec
from moesaic.formats.encodings import Rows
from moesaic.kernels import reference, triton_invariant
from moesaic.kernels.ops import AttentionBatch, KVView, Softmax, Span
from tests import triton_fused, triton_support
from tests.triton_support import close, device, in_double, randn

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LATENT, GROUPED = KVView(1, 576, 0, 512), KVView(4, 128, 512, 128)


@pytest.fixture(autouse=True)
def where(request: pytest.FixtureRequest) -> None:
    from triton import knobs

    if knobs.runtime.interpret == (request.node.get_closest_marker("gpu") is not None):
        pytest.skip("runs in the other ring")


def parts_of(tokens: int) -> list[slice]:
    """One row alone, a few, many: each cut of the rows once."""
    cuts = sorted({0, 1, 3, min(17, tokens), min(64, tokens), min(65, tokens), tokens})
    return [slice(a, b) for a, b in pairwise(cuts)]


def same_in_parts(call: Callable[[slice], Tensor], tokens: int, what: str) -> Tensor:
    whole = call(slice(0, tokens))
    for part in parts_of(tokens):
        assert torch.equal(call(part), whole[part]), f"{what}, {part}"
    return whole


def check_products(scheme: str, tokens: int, segments: tuple[int, ...], columns: int) -> None:
    how = SCHEMES[scheme]
    x, scale = randn(tokens, columns), triton_support.static_scale(how.activation)
    if not how.quantized:
        w = randn(sum(segments), columns)
        y = same_in_parts(lambda part: triton_invariant.linear(x[part], w), tokens, scheme)
        close(y, x.double() @ w.double().T, scheme)
        wide_x, wide_w = x.float() + 1e-4, w.float()
        y = same_in_parts(lambda part: triton_invariant.linear(wide_x[part], wide_w), tokens, "FP32")
        assert triton_support.worst(y, wide_x.double() @ wide_w.double().T) < 1e-5
        return
    weight = triton_support.weight(how, segments, columns)

    def rows_of(part: slice) -> Rows:
        from moesaic.kernels import triton

        return triton.encode(x[part].contiguous(), how.activation, scale)

    y = same_in_parts(lambda part: triton_invariant.linear_quant(rows_of(part), weight), tokens, scheme)
    close(y, reference.linear_quant(in_double(rows_of(slice(0, tokens))), weight), scheme)
    same_in_parts(lambda part: triton_invariant.linear_terms(rows_of(part), weight).transpose(0, 1), tokens, "terms")


def check_gate(tokens: int, hidden: int) -> None:
    spec = RouterSpec(16, 4, "sigmoid", "w", "b", True, 2.5, 4, 2, "top2_sum")
    x, w, bias = randn(tokens, hidden), randn(16, hidden, dtype=torch.float32), torch.randn(16, device=device())
    for i in range(2):
        same_in_parts(lambda part, i=i: triton_invariant.gate(x[part], w, None, bias, spec)[i], tokens, "gate")


def check_experts(scheme: str, tokens: int, sizes: tuple[int, int, int], top_k: int) -> None:
    """sizes: experts, hidden size, width. Some choices are padding, and one expert has a choice of every token."""
    from moesaic.kernels import triton
    from moesaic.kernels._triton.sort import sort

    how = SCHEMES[scheme]
    w, x = triton_support.expert_weights(how, sizes, SILU), randn(tokens, sizes[1])
    ids, weights = triton_support.some_ids(tokens, sizes[0], top_k, "holes"), torch.rand(tokens, top_k, device=device())
    ids[:, 0] = 1
    ids[:, 1:][ids[:, 1:] == 1] = -1
    scale = triton_support.static_scale(how.activation)

    def of(part: slice) -> Tensor:
        rows = triton.encode(x[part].contiguous(), how.activation, scale)
        return triton_invariant.experts(rows, w, ids[part], weights[part])

    y = same_in_parts(of, tokens, scheme)
    rows, order = triton.encode(x, how.activation, scale), triton_support.sorted_rows(ids)
    blocks = sort(ids, sizes[0], triton_invariant.HEIGHT)
    second = triton_support.check_products(rows, w, blocks, order, ids.flatten()[order], top_k)
    triton_support.check_sum(y, second, ids, weights)


def check_attention(view: KVView, heads: int, lengths: tuple[int, ...], counts: tuple[int, ...], window: int | None,
                    fp8: bool) -> None:  # fmt: skip
    """Prompts and decodes together, each alone, and each row of the prompts decoded."""
    batch, blocks = triton_fused.paged(lengths, counts, 8)
    pool = triton_fused.pool_of(blocks * 8, view.parts, fp8)
    q, sinks = randn(sum(counts), heads, view.key_dim), torch.randn(heads, device=device())
    args = (view, view.key_dim**-0.5, window, sinks)
    whole = triton_invariant.attend_paged(q, pool, batch, *args)
    theirs = reference.attend_paged(q.double(), pool if fp8 else pool.double(), batch, *args)
    close(whole.flatten(1), theirs.flatten(1), f"{view}")
    for s, span in enumerate(batch.spans):
        for row in {0, span.count // 2, span.count - 1}:
            length = span.length - span.count + 1 + row
            spans_S3 = torch.tensor([[0, 1, length]], device=device())
            one = AttentionBatch((Span(0, 1, length),), 1, batch.table_SB[s : s + 1], 8, spans_S3)
            at = span.start + row
            alone = triton_invariant.attend_paged(q[at : at + 1], pool, one, *args)
            assert torch.equal(alone[0], whole[at]), f"sequence {s}, row {row}, context {length}"


def check_encoded(view: KVView, heads: int) -> None:
    batch, blocks = triton_fused.paged((90, 600, 3), (1, 2, 1), 8)
    pool, q = triton_fused.pool_of(blocks * 8, view.parts, False), randn(4, heads, view.key_dim)
    how, encoding = Softmax(0.1), Encoding("fp8_group128")
    rows = triton_invariant.attend_encode(q, pool, batch, view, how, encoding)
    plain = triton_invariant.attend_paged(q, pool, batch, view, how.scale)
    triton_support.same_codes(rows, plain.flatten(1), None)


def check_latent(heads: int, sizes: tuple[int, int, int], turned: int) -> None:
    lengths = (13, 700, 1)
    w, (batch, blocks) = triton_fused.latent(heads, sizes), triton_fused.paged(lengths, (1, 1, 1), 8)
    pool = triton_fused.pool_of(blocks * 8, KVParts(sizes[1:2], turned), False)
    angles = triton_fused.angles(3, turned // 2)
    q = randn(3, heads, sizes[0] + turned)
    whole = triton_invariant.attend_latent(q, w, angles, pool, batch)
    for s in range(3):
        one = AttentionBatch((Span(0, 1, lengths[s]),), 1, batch.table_SB[s : s + 1], 8,
                             torch.tensor([[0, 1, lengths[s]]], device=device()))  # fmt: skip
        turn = (angles[0][s : s + 1], angles[1][s : s + 1])
        assert torch.equal(triton_invariant.attend_latent(q[s : s + 1], w, turn, pool, one)[0], whole[s])


@pytest.mark.parametrize("scheme", ["bf16", "fp8", pytest.param("mxfp8", marks=pytest.mark.long)])
def test_products(scheme: str) -> None:
    check_products(scheme, 70, (40, 136), 512)


@pytest.mark.parametrize("scheme", ["w4afp8_token", *(pytest.param(each, marks=pytest.mark.long)
                                                     for each in ("bf16", "fp8", "mxfp8"))])  # fmt: skip
def test_experts(scheme: str) -> None:
    check_experts(scheme, 66, (4, 256, 128), 3)


def test_gate() -> None:
    check_gate(19, 192)


@pytest.mark.parametrize(("window", "fp8"), [(None, False), (20, True)])
@pytest.mark.parametrize("view", [KVView(1, 24, 0, 16), KVView(2, 16, 32, 16)], ids=str)
def test_attention(view: KVView, window: int | None, fp8: bool) -> None:
    check_attention(view, 4, (90, 600, 70), (1, 3, 70), window, fp8)


def test_encoded() -> None:
    check_encoded(KVView(2, 32, 64, 32), 8)


def test_latent() -> None:
    check_latent(3, (12, 32, 20), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [name for name, each in SCHEMES.items() if each.activation.by_row])
def test_products_on_gpu(scheme: str) -> None:
    check_products(scheme, 700, (4096, 512, 512), 2048)
    check_products(scheme, 130, (2048,), 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [name for name, each in SCHEMES.items() if each.activation.by_row])
def test_experts_on_gpu(scheme: str) -> None:
    check_experts(scheme, 300, (32, 2048, 768), 8)


@pytest.mark.gpu
def test_gate_on_gpu() -> None:
    check_gate(700, 2048)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "fp8"), [(None, False), (None, True), (200, False)])
@pytest.mark.parametrize(("view", "heads"), [(GROUPED, 32), (LATENT, 16), (LATENT, 128)], ids=str)
def test_attention_on_gpu(view: KVView, heads: int, window: int | None, fp8: bool) -> None:
    check_attention(view, heads, (1500, 7, 2000, 513), (1, 1, 300, 513), window, fp8)


@pytest.mark.gpu
def test_fused_on_gpu() -> None:
    check_encoded(GROUPED, 32)
    check_latent(16, (128, 512, 128), 64)
