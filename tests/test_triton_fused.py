"""Fused ops and the FP8 cache in Triton's interpreter; the same on a GPU at production shapes (`-m gpu`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moesaic.contracts.scheme import SCHEMES, Encoding
from moesaic.contracts.spec import RouterSpec
from moesaic.kernels.ops import KVView
from moesaic.kernels.registry import backends
from tests import triton_fused as support
from tests.test_kernels import ROUTERS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PLAIN = Encoding("bf16")
EMITTED = [Encoding(n) for n in ("fp8_group128", "fp8_token", "mxfp8", "nvfp4")]
EMITTED += [Encoding("fp8_tensor", True), Encoding("nvfp4", True)]
LATENT, GROUPED, OAI = KVView(1, 576, 0, 512), KVView(4, 128, 512, 128), KVView(8, 64, 512, 64)
DEEPSEEK = RouterSpec(256, 8, "sigmoid", "w", "b", True, 2.5, 8, 4, "top2_sum")
QWEN = RouterSpec(128, 8, "softmax", "w")


@pytest.fixture(autouse=True)
def where(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interpreted, or on the GPU: never both in a process."""
    from triton import knobs

    if knobs.runtime.interpret == (request.node.get_closest_marker("gpu") is not None):
        pytest.skip("runs in the other ring")
    yield
    if not knobs.runtime.interpret:
        torch.cuda.empty_cache()


# --- interpreted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [PLAIN, *EMITTED], ids=str)
def test_add_norm_encode(encoding: Encoding) -> None:
    for tokens, size, terms, residual in ((0, 96, 0, True), (1, 96, 3, True), (5, 288, 0, False), (3, 160, 1, False)):
        support.check_add_norm_encode(encoding, tokens, size, terms, residual)


@pytest.mark.parametrize("encoding", [PLAIN, *EMITTED], ids=str)
def test_the_norm_of_experts(encoding: Encoding) -> None:
    for tokens, size, top_k, onto in ((0, 96, 2, False), (1, 288, 8, False), (5, 96, 3, True), (4, 160, 1, False)):
        support.check_norm_of_experts(encoding, tokens, size, top_k, onto)


@pytest.mark.parametrize("name", ["bf16", "fp8", "wna16"])
def test_experts_terms(name: str) -> None:
    for tokens in (0, 1, 5):
        support.check_experts_terms(SCHEMES[name], tokens, (6, 128, 128, 3))


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "nvfp4", "wna16"])
def test_linear_terms(name: str) -> None:
    support.check_terms(SCHEMES[name], 3, (40, 136), 1024)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("normed", "turned", "interleaved"), [(True, 32, False), (False, 16, True), (True, 16, False)])
def test_store_heads(normed: bool, turned: int, interleaved: bool, fp8: bool) -> None:
    for tokens in (0, 1, 4):
        support.check_store_heads(tokens, (6, 2, 32, turned), normed, interleaved, fp8)


@pytest.mark.parametrize("fp8", [False, True])
def test_store_latent(fp8: bool) -> None:
    for tokens in (0, 1, 4):
        support.check_store_latent(tokens, 48, 16, fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("how", [{}, {"window": 5, "sinks": True}], ids=str)
@pytest.mark.parametrize("view", [KVView(1, 24, 0, 16), KVView(2, 12, 24, 12), KVView(2, 24, 48, 16)], ids=str)
def test_tables_of_blocks(view: KVView, how: dict[str, Any], fp8: bool) -> None:
    support.check_blocks(view, 4, (13, 1, 270), (1, 1, 1), how, fp8)
    support.check_blocks(view, 4, (7, 40, 20), (1, 11, 20), how, fp8)


@pytest.mark.parametrize("encoding", [PLAIN, *EMITTED], ids=str)
def test_attend_encode(encoding: Encoding) -> None:
    support.check_attend_encode(encoding, KVView(2, 32, 64, 32), 8, (5, 130, 1), True)
    support.check_attend_encode(encoding, KVView(3, 24, 72, 24), 12, (5, 70), False)  # heads that are not whole groups


@pytest.mark.parametrize("fp8", [False, True])
def test_attend_latent(fp8: bool) -> None:
    support.check_attend_latent(3, (12, 32, 20), 8, (13, 1, 90), fp8)


@pytest.mark.parametrize("spec", ROUTERS.values(), ids=str)
def test_gate(spec: RouterSpec) -> None:
    for tokens, dtype in ((0, torch.bfloat16), (1, torch.float32), (9, torch.bfloat16)):
        support.check_gate(spec, tokens, 192, dtype)
    support.check_narrow_gate(spec, 9, 192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_two(dtype: torch.dtype) -> None:
    for rows, vocab in ((0, 100), (1, 1), (6, 9001)):
        support.check_top_two(rows, vocab, dtype)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", [PLAIN, *EMITTED], ids=str)
def test_add_norm_encode_on_gpu(encoding: Encoding) -> None:
    for tokens, size in ((1, 2048), (64, 7168), (300, 2880), (4096, 2048)):
        for terms, residual in ((0, True), (4, True), (3, False)):
            support.check_add_norm_encode(encoding, tokens, size, terms, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", [PLAIN, *EMITTED], ids=str)
def test_the_norm_of_experts_on_gpu(encoding: Encoding) -> None:
    for tokens, size, top_k in ((1, 2048, 8), (64, 7168, 8), (300, 2880, 4), (17, 4096, 22)):
        for onto in (False, True):
            support.check_norm_of_experts(encoding, tokens, size, top_k, onto)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp8", "nvfp4", "wna16"])
def test_experts_terms_on_gpu(name: str, backend: str) -> None:
    module = backends()[backend]
    if backend == "hopper" and (reason := module.probe()):
        pytest.skip(reason)
    for tokens in (0, 1, 64, 300):
        support.check_experts_terms(SCHEMES[name], tokens, (32, 1024, 512, 6), module)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.quantized])
def test_linear_terms_on_gpu(name: str) -> None:
    for tokens in (1, 17, 64, 300):
        support.check_terms(SCHEMES[name], tokens, (4096, 512, 512), 2048)
    support.check_terms(SCHEMES[name], 3, (2048,), 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("sizes", [(32, 4, 128, 128), (64, 8, 64, 64), (96, 8, 128, 64)], ids=str)
def test_store_heads_on_gpu(sizes: tuple[int, int, int, int], fp8: bool) -> None:
    for tokens, normed, interleaved in ((1, True, False), (64, False, False), (1021, True, True)):
        support.check_store_heads(tokens, sizes, normed, interleaved, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_store_latent_on_gpu(fp8: bool) -> None:
    for tokens in (1, 64, 1021):
        support.check_store_latent(tokens, 512, 64, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("how", [{}, {"window": 128, "sinks": True}], ids=str)
@pytest.mark.parametrize(("view", "heads"), [(LATENT, 128), (LATENT, 16), (GROUPED, 32), (OAI, 64)], ids=str)
def test_tables_of_blocks_on_gpu(view: KVView, heads: int, how: dict[str, Any], fp8: bool) -> None:
    support.check_blocks(view, heads, (1,), (1,), how, fp8)
    support.check_blocks(view, heads, (3000,), (1,), how, fp8)
    support.check_blocks(view, heads, tuple(range(1, 1300, 41)), (1,) * 32, how, fp8)
    support.check_blocks(view, heads, (700, 300, 513), (1, 300, 129), how, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", [PLAIN, *EMITTED], ids=str)
def test_attend_encode_on_gpu(encoding: Encoding) -> None:
    for view, heads in ((GROUPED, 32), (OAI, 64)):
        for lengths in ((1024,), tuple(range(1, 1300, 20))):
            support.check_attend_encode(encoding, view, heads, lengths, len(lengths) == 1)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads", [16, 128])
def test_attend_latent_on_gpu(heads: int, fp8: bool) -> None:
    for lengths in ((1024,), tuple(range(1, 1300, 41))):
        support.check_attend_latent(heads, (128, 512, 128), 64, lengths, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*ROUTERS.values(), DEEPSEEK, QWEN, RouterSpec(128, 4, "softmax_topk", "w")], ids=str)
def test_gate_on_gpu(spec: RouterSpec) -> None:
    for tokens in (1, 64, 1021):
        for dtype in (torch.float32, torch.bfloat16):
            support.check_gate(spec, tokens, 7168 if spec.experts == 256 else 2048, dtype)
        support.check_narrow_gate(spec, tokens, 2048)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_two_on_gpu(dtype: torch.dtype) -> None:
    for rows, vocab in ((1, 151936), (64, 151936), (7, 129280), (5, 3)):
        support.check_top_two(rows, vocab, dtype)
