"""Every backend's ops against the reference in FP64, on ragged inputs: the kernel error of DESIGN section 5.

Letters as in kernels/ops.py.
"""

from __future__ import annotations

from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.contracts.spec import SILU, Activation, RouterSpec
from moesaic.kernels import reference
from moesaic.kernels.ops import FUSED, AttentionBatch, ExpertWeights, KVView, Span
from tests.compare import assert_rows_close
from tests.native_support import HAS_COMPILER
from tests.operands import expert_weights, plain_rows

NATIVE = ("cpu_native",) if HAS_COMPILER else ()
BACKENDS = (*NATIVE, "cpu", "cpu_invariant")
ROW_WISE = (*NATIVE, "cpu")
"""Those with norms and rotary embedding of their own."""
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2**-7}
TOKENS = (0, 1, 2, 7, 33, 64)
SINKS = torch.tensor([0.5, -2.0, 3.0, 0.0])
ACTIVATIONS = (SILU, Activation("swiglu_oai"))


def cases() -> list[tuple[str, str]]:
    """(backend, op) for every contract that is not the reference's own."""
    return [(name, c.op) for name in BACKENDS for c in import_module(f"moesaic.kernels.{name}").CONTRACTS]


def both(backend: str, op: str, dtype: torch.dtype, *args: Any) -> tuple[Any, Any]:
    """(the backend's result, the reference's in FP64 on the same operands rounded to dtype)."""
    rounded = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in rounded]
    return getattr(import_module(f"moesaic.kernels.{backend}"), op)(*rounded), getattr(reference, op)(*wide)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if actual.numel():
        assert_rows_close(actual, expected, LIMIT[dtype], what)


def test_every_contract_is_tested_here() -> None:
    tested = {"linear", "rms_norm", "add_rms_norm", "rotate", "activate", "route", "experts", "attend_paged",
              "attend_dense", "encode"}  # fmt: skip
    assert {op for _, op in cases()} - set(FUSED) == tested  # the fused ones are in test_cpu_native.py


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(backend: str, tokens: int, dtype: torch.dtype) -> None:
    x, w, bias = torch.randn(tokens, 96), torch.randn(40, 96), torch.randn(40)
    close(*both(backend, "linear", dtype, x, w), dtype, "linear")
    close(*both(backend, "linear", dtype, x, w, bias), dtype, "linear with bias")


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_norms_rope_activation(tokens: int, dtype: torch.dtype) -> None:
    x, y, w = torch.randn(tokens, 64) * 3, torch.randn(tokens, 64), torch.randn(64)
    for backend in ROW_WISE:
        close(*both(backend, "rms_norm", dtype, x, w, 1e-6), dtype, "rms_norm")
        mine, theirs = both(backend, "add_rms_norm", dtype, x, y, w, 1e-6)
        close(mine[1], theirs[1], dtype, "sum")
        alone = import_module(f"moesaic.kernels.{backend}").rms_norm(mine[1], w.to(dtype), 1e-6)
        assert torch.equal(mine[0], alone)
    for backend in BACKENDS:
        for activation in ACTIVATIONS:
            close(*both(backend, "activate", dtype, x * 3, activation), dtype, activation.kind)
    angles = torch.rand(tokens, 8) * 6
    for backend, interleaved in product(ROW_WISE, (False, True)):
        heads = torch.randn(tokens, 3, 16).to(dtype)
        mine = import_module(f"moesaic.kernels.{backend}").rotate(heads, angles.cos(), angles.sin(), interleaved)
        oracle = complex_rotation(heads.double(), angles.double(), interleaved)
        close(mine.flatten(0, 1), oracle.flatten(0, 1), dtype, "rotate")


def complex_rotation(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding as multiplication by e^(i angle): an oracle that shares nothing with the op."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


ROUTERS = {
    "softmax": RouterSpec(16, 4, "softmax", "w", renormalize=False),
    "softmax, renormalised": RouterSpec(16, 4, "softmax", "w"),
    "max groups": RouterSpec(16, 3, "softmax", "w", renormalize=False, scale=1.5, groups=4, top_groups=2),
    "sigmoid": RouterSpec(16, 4, "sigmoid", "w", "b", scale=2.5),
    "two best of a group": RouterSpec(16, 6, "sigmoid", "w", "b", True, 2.5, 4, 2, "top2_sum"),
    "all groups": RouterSpec(16, 16, "sigmoid", "w", "b", True, 1.0, 4, 4, "top2_sum"),
}


def naive_route(logits: list[float], bias: list[float], spec: RouterSpec) -> dict[int, float]:
    """Routing of one token in plain Python floats, written from formats.md's description."""
    import math

    if spec.scoring == "softmax":
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        scores = [w / math.fsum(weights) for w in weights]
    else:
        scores = [1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = spec.experts // spec.groups
    allowed = range(spec.experts)
    if spec.groups > 1:
        members = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(spec.groups)]
        score = [sum(m[:2]) if spec.group_score == "top2_sum" else m[0] for m in members]
        kept = sorted(range(spec.groups), key=lambda g: (-score[g], g))[: spec.top_groups]
        allowed = [e for e in range(spec.experts) if e // size in kept]
    ids = sorted(allowed, key=lambda e: (-choice[e], e))[: spec.top_k]
    total = (math.fsum(scores[e] for e in ids) + 1e-20) if spec.renormalize else 1.0
    return {e: scores[e] / total * spec.scale for e in ids}


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("spec", ROUTERS.values(), ids=ROUTERS.keys())
@pytest.mark.parametrize("regime", ["usual", "all negative", "huge bias", "negative bias", "ties", "one row", "none"])
def test_route_against_plain_python(backend: str, spec: RouterSpec, regime: str) -> None:
    tokens = {"one row": 1, "none": 0}.get(regime, 37)
    logits_TE = torch.randn(tokens, spec.experts) * 2
    bias_E = torch.randn(spec.experts) * 0.1
    if regime == "all negative":
        logits_TE = -logits_TE.abs() * 10 - 20
    if regime == "ties":
        logits_TE, bias_E = logits_TE.round() * 0, bias_E * 0
    bias_E += {"huge bias": 1000.0, "negative bias": -5.0}.get(regime, 0.0)
    if regime == "huge bias":
        # FP32 cannot hold score + 1000 exactly, so the choice is made on what FP32 holds: make that exact.
        logits_TE, bias_E = logits_TE.sign() * 3, torch.arange(spec.experts) * 4.0 + 1000
    bias = bias_E if spec.bias else None
    ids_TA, weights_TA = import_module(f"moesaic.kernels.{backend}").route(logits_TE, bias, spec)
    assert ids_TA.dtype == torch.int32
    assert weights_TA.dtype == torch.float32
    assert ids_TA.shape == weights_TA.shape == (tokens, spec.top_k)
    for t in range(tokens):
        naive_bias = bias_E.tolist() if spec.bias else [0.0] * spec.experts
        expected = naive_route(logits_TE[t].tolist(), naive_bias, spec)
        assert set(ids_TA[t].tolist()) == set(expected), (t, ids_TA[t], expected)
        found = dict(zip(ids_TA[t].tolist(), weights_TA[t].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-30)


def routings(tokens: int, experts: int, top_k: int) -> dict[str, Tensor]:
    """Ragged by construction: random with an empty expert, all to one, padding rows, padding choices."""
    random = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)]) if tokens else None
    ids = torch.empty(0, top_k, dtype=torch.int32) if random is None else random.to(torch.int32)
    padded, holes = ids.clone(), ids.clone()
    padded[tokens // 2 :] = -1
    holes[::3, 0] = -1
    return {"random": ids, "one expert": torch.full_like(ids, 2), "padding rows": padded, "holes": holes}


def naive_experts(x_TD: Tensor, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """One token and one choice at a time, in FP64, from the formulas."""
    x, y, act = x_TD.double(), torch.zeros(x_TD.shape, dtype=torch.float64), w.activation
    for t, choices in enumerate(ids_TA.tolist()):
        for a, e in enumerate(choices):
            if e < 0:
                continue
            bias13, bias2 = (w.biases[0][e].double(), w.biases[1][e].double()) if w.biases else (0, 0)
            g, u = (w.w13.plain[e].double() @ x[t] + bias13).chunk(2)
            if act.kind == "swiglu_oai":
                g, u = torch.where(g > 7, 7, g), torch.where(u.abs() > 7, 7 * u.sign(), u)
                hidden = (u + 1) * g / (1 + torch.exp(-1.702 * g))
            else:
                hidden = g / (1 + torch.exp(-g)) * u
            y[t] += weights_TA[t, a].double() * (w.w2.plain[e].double() @ hidden + bias2)
    return y


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts(backend: str, tokens: int, dtype: torch.dtype) -> None:
    experts, hidden, width, top_k = 7, 64, 48, 3
    x = torch.randn(tokens, hidden)
    w13, w2 = torch.randn(experts, 2 * width, hidden) / 8, torch.randn(experts, hidden, width) / 7
    both_biases = torch.randn(experts, 2 * width), torch.randn(experts, hidden)
    for name, ids_TA in routings(tokens, experts, top_k).items():
        weights_TA = torch.rand(tokens, top_k)
        for activation, held in ((SILU, None), (ACTIVATIONS[1], both_biases)):
            x_, w13_, w2_, *held_ = (t.to(dtype) for t in (x, w13, w2, *(held or ())))
            biases = (held_[0], held_[1]) if held else None
            w = expert_weights(w13_, w2_, activation, biases)
            mine = import_module(f"moesaic.kernels.{backend}").experts(plain_rows(x_), w, ids_TA, weights_TA)
            theirs = naive_experts(x_, w, ids_TA, weights_TA)
            close(mine, theirs, dtype, f"{name}, {activation.kind}")
            again = reference.experts(plain_rows(x_), w, ids_TA, weights_TA)
            close(again, theirs, dtype, "reference")


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(None, None), (5, None), (5, SINKS)])
@pytest.mark.parametrize("view", [KVView(1, 24, 0, 16), KVView(2, 12, 24, 12), KVView(4, 12, 48, 8)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attend_paged(backend: str, view: KVView, window: int | None, sinks: Tensor | None,
                      dtype: torch.dtype) -> None:  # fmt: skip
    heads, width = 4, max(view.kv_heads * view.key_dim, view.value_at + view.kv_heads * view.value_dim)
    pool, poison = torch.randn(640, width).to(dtype), 600
    pool[poison:] = float("nan")  # no sequence owns these rows
    for lengths, decodes in (((1,), 1), ((13, 1, 300), 3), ((40, 7, 20), 2), ((270,), 0)):
        counts = [1 if s < decodes else min(11, n) for s, n in enumerate(lengths)]
        starts = [sum(counts[:s]) for s in range(len(counts))]
        slots_SL = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for s, length in enumerate(lengths):
            slots_SL[s, :length] = torch.randperm(poison)[:length]
        spans = tuple(Span(*span) for span in zip(starts, counts, lengths, strict=True))
        batch = AttentionBatch.of(spans, decodes, slots_SL)
        q = torch.randn(sum(counts), heads, view.key_dim).to(dtype)
        mine = import_module(f"moesaic.kernels.{backend}").attend_paged(q, pool, batch, view, 0.3, window, sinks)
        theirs = reference.attend_paged(q.double(), pool.double(), batch, view, 0.3, window, sinks)
        close(mine.flatten(1), theirs.flatten(1), dtype, f"{lengths}")


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(None, None), (6, None), (None, SINKS), (6, SINKS)])
@pytest.mark.parametrize(("queries", "length"), [(1, 1), (17, 17), (5, 300), (1, 40)])
@pytest.mark.parametrize("backend", ["cpu", "cpu_invariant"])
def test_attend_dense_against_torch(backend: str, queries: int, length: int, window: int | None,
                                    sinks: Tensor | None, dtype: torch.dtype) -> None:  # fmt: skip
    """A sink is a key at which every query scores its logit, and whose value is nothing."""
    q, k, v = (torch.randn(n, 4, size).to(dtype) for n, size in ((queries, 24), (length, 24), (length, 16)))
    mine = import_module(f"moesaic.kernels.{backend}").attend_dense(q, k, v, 0.25, window, sinks)
    rows = torch.arange(length)[length - queries :, None]
    columns = torch.arange(length)
    mask = (columns <= rows) & (columns > rows - (window or length + 1))
    added = torch.zeros(4, queries, length, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    operands = [x.double().transpose(0, 1) for x in (q, k, v)]
    if sinks is not None:
        added = torch.cat([added, sinks.double()[:, None, None].expand(-1, queries, 1)], -1)
        operands[1:] = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in operands[1:]]
    oracle = torch.nn.functional.scaled_dot_product_attention(*operands, attn_mask=added, scale=0.25)
    close(mine.flatten(1), oracle.transpose(0, 1).flatten(1), dtype, "attend_dense")
