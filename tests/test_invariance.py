"""The claim on which `--deterministic` stands: a row's result does not depend on the rows beside it. Bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

from moesaic.assets import embedded_model
from moesaic.contracts.plan import Wishes
from moesaic.contracts.spec import SILU, RouterSpec, Scoring
from moesaic.hardware import local_cpu
from moesaic.kernels import cpu, cpu_invariant
from moesaic.kernels.ops import AttentionBatch, KVView, Span
from moesaic.models.build import plan_here, spec_of
from tests.operands import expert_weights, plain_rows

DTYPES = (torch.float32, torch.bfloat16)
COUNTS = (*range(1, 40), 48, 63, 64, 65, 127, 128, 200, 255, 256, 300)
SHAPES = ((256, 1024), (1024, 256), (256, 16), (128, 384), (576, 100), (2048, 130))


def same_for_every_count(compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """compute(x[:n]) and compute(x[k:k+n]) equal the rows of compute(x), for many n and k."""
    whole = compute(x)
    for count in COUNTS:
        for start in {0, 3, len(x) - count}:
            rows = slice(start, start + count)
            if start + count <= len(x):
                assert torch.equal(compute(x[rows]), whole[rows]), (count, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = torch.randn(shape[1], shape[0]).to(dtype)
    same_for_every_count(lambda x: cpu_invariant.linear(x, w), torch.randn(310, shape[0]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_wise_ops(dtype: torch.dtype) -> None:
    x, w = torch.randn(310, 256).to(dtype), torch.randn(256).to(dtype)
    same_for_every_count(lambda x: cpu.rms_norm(x, w, 1e-6), x)
    same_for_every_count(partial(cpu_invariant.activate, activation=SILU), x)
    same_for_every_count(partial(cpu_invariant.activate, activation=SILU), torch.randn(310, 2 * 129).to(dtype))
    same_for_every_count(lambda x: cpu.add_rms_norm(x, x, w, 1e-6)[0], x)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [8, 60, 256])
def test_route(scoring: Scoring, experts: int) -> None:
    spec = RouterSpec(experts, 4, scoring, "w", "b", groups=4, top_groups=2, group_score="top2_sum")
    logits, bias = torch.randn(310, experts), torch.randn(experts)
    same_for_every_count(lambda x: cpu_invariant.route(x, bias, spec)[1], logits)
    same_for_every_count(lambda x: cpu_invariant.route(x, bias, spec)[0], logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts(dtype: torch.dtype) -> None:
    """A token's sum must not depend on which tokens share its experts."""
    w = expert_weights(torch.randn(8, 256, 128).to(dtype), torch.randn(8, 128, 128).to(dtype))
    x, weights = torch.randn(310, 128).to(dtype), torch.rand(310, 3)
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(310)]).to(torch.int32)
    whole = cpu_invariant.experts(plain_rows(x), w, ids, weights)
    for count in (1, 2, 5, 17, 64, 255):
        rows = slice(310 - count, 310)
        assert torch.equal(cpu_invariant.experts(plain_rows(x[rows]), w, ids[rows], weights[rows]), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("view", [KVView(1, 48, 0, 32), KVView(2, 24, 48, 24)], ids=str)
def test_attention_in_any_chunking(view: KVView, window: int | None, dtype: torch.dtype) -> None:
    """Position p alone (decode), in chunks of any size, or in one go; the context reaching beyond it or not."""
    length, heads = 530, 4
    pool, q = torch.randn(length, 96).to(dtype), torch.randn(length, heads, view.key_dim).to(dtype)

    def attend(start: int, count: int) -> Tensor:
        end = start + count
        batch = AttentionBatch.of((Span(0, count, end),), 0, torch.arange(end)[None])
        return cpu_invariant.attend_paged(q[start:end], pool, batch, view, 0.2, window)

    whole = attend(0, length)
    for chunk in (1, 2, 3, 17, 100, 256, 300):
        for start in range(0, length, max(chunk, 61)):
            count = min(chunk, length - start)
            assert torch.equal(attend(start, count), whole[start : start + count]), (chunk, start)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_builds_use_invariant_ops_only(dtype: str) -> None:
    spec = spec_of(json.loads((embedded_model() / "config.json").read_text()))
    made = plan_here(spec, local_cpu(), dtype, Wishes(deterministic=True))
    chosen = [(choice.op, choice.chosen, choice.rejected) for choices in made.ops.values() for choice in choices]
    for layer in made.layers:
        for role in ("route", "experts"):
            chosen += [(role, cell.path.stage(role).kernel, cell.rejected) for cell in layer.cells]
    assert {op for op, _, _ in chosen} >= {"linear", "route", "experts", "attend_paged"}
    for op, backend, rejected in chosen:
        contracts = import_module(f"moesaic.kernels.{backend}").CONTRACTS
        assert next(c for c in contracts if c.op == op).batch_invariant, (op, backend)
        assert rejected, "every other candidate is kept with its reason"


def test_the_plain_backend_is_not_invariant_where_it_says_so() -> None:
    """The gauge is sensitive: the ordinary FP32 product does change with the number of rows on this kind of library.

    If this ever fails, the library became invariant and the padding can go.
    """
    w, x = torch.randn(512, 2048), torch.randn(64, 2048)
    whole = cpu.linear(x, w)
    assert any(not torch.equal(cpu.linear(x[:n], w), whole[:n]) for n in range(1, 12))
