"""The native CPU backend beyond what test_kernels.py asks of every backend: fused ops, awkward sizes, rows, threads.

Letters as in kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.contracts.spec import SILU, Activation, RouterSpec
from moesaic.kernels import _native, cpu_native, reference, reference_fused
from moesaic.kernels.ops import AttentionBatch, KVView, Latent, Span
from tests.compare import assert_rows_close
from tests.native_support import needs_compiler
from tests.operands import expert_weights, plain_rows

pytestmark = needs_compiler
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2**-7}


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    if actual.numel():
        assert_rows_close(actual, expected, LIMIT[actual.dtype], what)


def test_it_can_be_used_here() -> None:
    assert cpu_native.probe() is None


# --- fused ops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 11, 33])
def test_mlp(tokens: int, dtype: torch.dtype) -> None:
    for (hidden, width), how in product(((64, 48), (33, 17)), (SILU, Activation("swiglu_oai"))):
        x, onto = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
        w13, w2 = (torch.randn(2 * width, hidden) / 5).to(dtype), (torch.randn(hidden, width) / 4).to(dtype)
        for plus in (None, onto):
            mine = cpu_native.mlp(x, w13, w2, how, plus)
            theirs = reference_fused.mlp(*map(wide, (x, w13, w2, how, plus)))
            close(mine, theirs, f"{hidden} {width} {how.kind}")


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 11, 40])
def test_gate(tokens: int, dtype: torch.dtype) -> None:
    """The same experts as in FP64, and their weights to FP32's precision, whatever the model's dtype."""
    for spec in (
        RouterSpec(16, 4, "sigmoid", "w", "b", True, 2.5, 4, 2, "top2_sum"),
        RouterSpec(20, 3, "softmax", "w"),
        RouterSpec(8, 4, "softmax_topk", "w", renormalize=False),
    ):
        x, w = torch.randn(tokens, 72).to(dtype), torch.randn(spec.experts, 72) / 5
        biases = torch.randn(spec.experts), torch.randn(spec.experts) * 0.1
        ids_TA, weights_TA = cpu_native.gate(x, w, *biases, spec)
        theirs = reference_fused.gate(wide(x), wide(w), *map(wide, biases), spec)
        assert torch.equal(ids_TA, theirs[0])
        close(weights_TA, theirs[1], spec.scoring)


def latent_case(heads: int, sizes: tuple[int, ...], lengths: list[int], counts: list[int], dtype: torch.dtype
                ) -> tuple[Tensor, Latent, tuple[Tensor, Tensor], Tensor, AttentionBatch, Tensor]:  # fmt: skip
    """(x, weights, angles, pool, batch, slots of the tokens). Every other sequence lies in order."""
    nope, rope, rank, value = sizes
    tokens, room = sum(counts), sum(lengths) + 9
    slots_SL = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for s, length in enumerate(lengths):
        slots_SL[s, :length] = sum(lengths[:s]) + (torch.arange(length) if s % 2 else torch.randperm(length))
    starts = [sum(counts[:s]) for s in range(len(counts))]
    spans = tuple(Span(*span) for span in zip(starts, counts, lengths, strict=True))
    kv_b = (torch.randn(heads, nope + value, rank) / 6).to(dtype)
    w = Latent(kv_b[:, :nope], kv_b[:, nope:], torch.rand(rank).to(dtype) + 0.5, 1e-6, 0.2, bool(tokens % 2), 5)
    angles = torch.rand(tokens, rope // 2) * 6
    own = torch.cat([slots_SL[s, n - c : n] for s, (n, c) in enumerate(zip(lengths, counts, strict=True))])
    pool_PW, x = torch.randn(room, rank + rope).to(dtype), torch.randn(tokens, 5 + rank + rope).to(dtype)
    batch = AttentionBatch.of(spans, len(counts) if max(counts) == 1 else 0, slots_SL)
    return x, w, (angles.cos(), angles.sin()), pool_PW, batch, own


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("sizes", [(32, 32, 128, 32), (12, 8, 24, 20), (7, 4, 33, 16)], ids=str)
@pytest.mark.parametrize(("lengths", "counts"), [([1], [1]), ([9, 70, 1, 30, 65], [1] * 5), ([40, 26], [35, 26])])
def test_latent(lengths: list[int], counts: list[int], sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    heads, (nope, rope, rank, _) = 8, sizes
    x, w, angles, pool_PW, batch, own = latent_case(heads, sizes, lengths, counts, dtype)
    wide_w = replace(w, w_k_HNR=wide(w.w_k_HNR), w_v_HVR=wide(w.w_v_HVR), norm_R=wide(w.norm_R))
    mine, theirs = pool_PW.clone(), wide(pool_PW)
    cpu_native.store_latent(x, w, angles, mine, own)
    reference_fused.store_latent(wide(x), wide_w, (wide(angles[0]), wide(angles[1])), theirs, own)
    close(mine, theirs, "stored rows")
    q = torch.randn(len(x), heads, nope + rope).to(dtype)
    y_THV = cpu_native.attend_latent(q, w, angles, mine, batch)
    # Stage by stage: what the three ops that it fuses would hand on is rounded, each of them is exact.
    angles = wide(angles[0]), wide(angles[1])
    absorbed = torch.einsum("thn,hnr->thr", wide(q[..., :nope]), wide_w.w_k_HNR)
    turned = reference.rotate(wide(q[..., nope:]), *angles, w.interleaved)
    q_THW = wide(torch.cat([absorbed, turned], -1).to(dtype))
    seen = reference.attend_paged(q_THW, wide(mine), batch, KVView(1, rank + rope, 0, rank), w.scale)
    close(y_THV.flatten(1), torch.einsum("thr,hvr->thv", wide(seen.to(dtype)), wide_w.w_v_HVR).flatten(1), "attention")
    if dtype == torch.float32:
        twin = reference_fused.attend_latent(wide(q), wide_w, angles, wide(mine), batch)
        close(y_THV.flatten(1), twin.flatten(1), "twin")


# --- sizes, strides, rows, threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_awkward_products(dtype: torch.dtype) -> None:
    """Odd, tiny and cache-hostile sizes (rows 4,096 bytes apart); rows that are not neighbours; more rows than MANY."""
    for tokens, inputs, outputs in product((1, 5, 10, 11, 17, 29), (1, 7, 64, 65), (1, 3, 16, 50)):
        x, w = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        # A sum of one product is rounded once: relative to the operands, not to a result that may cancel.
        error = (wide(cpu_native.linear(x, w)) - wide(x) @ wide(w).T).abs()
        assert (error <= LIMIT[dtype] * (wide(x).abs() @ wide(w).abs().T)).all(), (tokens, inputs, outputs)
    far = 4096 // dtype.itemsize
    x, w = torch.randn(23, far).to(dtype), torch.randn(40, far).to(dtype)
    close(cpu_native.linear(x, w), wide(x) @ wide(w).T, "rows a page apart")
    close(cpu_native.linear(x[:, 100:292], w[:, :192]), wide(x[:, 100:292]) @ wide(w[:, :192]).T, "strided")
    transposed = torch.randn(64, 12).to(dtype).T
    close(cpu_native.linear(transposed, w[:, :64]), wide(transposed) @ wide(w[:, :64]).T, "columns")
    many = torch.randn(cpu_native.MANY + 1, 64).to(dtype)
    close(cpu_native.linear(many, w[:, :64].contiguous()), wide(many) @ wide(w[:, :64]).T, "many")


def experts_case(tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    w13, w2 = (torch.randn(6, 2 * 40, 64) / 8).to(dtype), (torch.randn(6, 64, 40) / 6).to(dtype)
    ids_TA = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)]).to(torch.int32)
    return torch.randn(tokens, 64).to(dtype), expert_weights(w13, w2), ids_TA, torch.rand(tokens, 2)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_a_broken_row_breaks_no_other(dtype: torch.dtype) -> None:
    for tokens in (3, 40):
        x, w, ids_TA, weights_TA = experts_case(tokens, dtype)
        matrix = torch.randn(50, 64).to(dtype)
        sound = [cpu_native.linear(x, matrix), cpu_native.experts(plain_rows(x), w, ids_TA, weights_TA)]
        x[1, 7] = float("nan")
        broken = [cpu_native.linear(x, matrix), cpu_native.experts(plain_rows(x), w, ids_TA, weights_TA)]
        for before, after in zip(sound, broken, strict=True):
            assert after[1].isnan().all()
            assert torch.equal(torch.cat([after[:1], after[2:]]), torch.cat([before[:1], before[2:]]))


@pytest.fixture
def two_threads() -> Iterator[Callable[[int], None]]:
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_threads_change_nothing(two_threads: Callable[[int], None], dtype: torch.dtype) -> None:
    """Bit for bit: work is cut between outputs, never within a sum."""
    cases: list[Callable[[], Tensor]] = []
    for tokens in (1, 9, 70):
        x, w, ids_TA, weights_TA = experts_case(tokens, dtype)
        rows, matrix = torch.randn(tokens, 640).to(dtype), torch.randn(517, 640).to(dtype)
        latent = latent_case(8, (32, 32, 128, 32), [40] * tokens, [1] * tokens, dtype)
        q = torch.randn(tokens, 8, 64).to(dtype)
        cases += [partial(cpu_native.linear, rows, matrix), partial(cpu_native.attend_latent, q, *latent[1:5]),
                  partial(cpu_native.experts, plain_rows(x), w, ids_TA, weights_TA)]  # fmt: skip
    two_threads(1)
    alone = [case() for case in cases]
    two_threads(2)
    for case, expected in zip(cases, alone, strict=True):
        assert torch.equal(case(), expected)


def test_time_is_booked_under_the_right_name() -> None:
    x, w = torch.randn(2, 32), torch.randn(8, 32)
    calls: dict[str, Callable[[], Any]] = {
        "linear": lambda: cpu_native.linear(x, w),
        "rms_norm": lambda: cpu_native.rms_norm(x, w[0], 1e-6),
        "activate": lambda: cpu_native.activate(x, SILU),
        "route": lambda: cpu_native.route(x, None, RouterSpec(32, 2, "sigmoid", "w")),
        "gate": lambda: cpu_native.gate(x, w, None, None, RouterSpec(8, 2, "sigmoid", "w")),
        "experts": lambda: cpu_native.mlp(x, w, torch.randn(32, 4), SILU),
        "rotate": lambda: cpu_native.rotate(x[:, None], torch.rand(2, 16), torch.rand(2, 16), False),
    }
    for name, call in calls.items():
        before = _native.spent()
        call()
        assert [each for each, seconds in _native.spent().items() if seconds != before[each]] == [name]
