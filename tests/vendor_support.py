"""What the GPU tests of other packages' kernels share: every stage of theirs and ours, recorded and held against FP64.

Weights that a backend packs are compared by a copy in the formats' own order, made before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.contracts.scheme import Scheme
from moesaic.contracts.spec import SILU, Activation
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels import deep_gemm, humming, reference, triton
from moesaic.kernels.ops import ExpertWeights
from tests.code_checks import HALF, LIMIT, activated, check_codes
from tests.compare import assert_rows_close
from tests.triton_support import device, expert_weights, some_ids, static_scale

_TRIED: dict[str, str | None] = {}


def usable(module: ModuleType) -> None:
    """Skips where the package is not installed; fails, at once for all tests, where it is and cannot be used."""
    name, package = module.__name__, module.CONTRACTS[0].package
    if name not in _TRIED:
        _TRIED[name] = module.probe()
    if reason := _TRIED[name]:
        (pytest.skip if "is not installed" in reason or "is used on" in reason else pytest.fail)(f"{package}: {reason}")


@dataclass
class Record:
    """Calls of functions of a backend, with what they returned."""

    products: list[tuple[tuple[Any, ...], Tensor]] = field(default_factory=list)
    joined: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    from moesaic.kernels._triton import join_rows as code

    made = Record()

    def spied(module: ModuleType, name: str, keep: Any) -> None:
        real = getattr(module, name)

        def call(*args: Any, **named: Any) -> Any:
            result = real(*args, **named)
            keep(args, result)
            return result

        monkeypatch.setattr(module, name, call)

    for module, name in ((deep_gemm, "product"), (deep_gemm, "slotted_product"), (humming, "product")):
        spied(module, name, lambda args, y: made.products.append((args, y)))
    for name in ("join_rows", "join_slots"):
        spied(code, name, lambda _, y: made.joined.append(y))
    return made


def layer(scheme: Scheme, tokens: int, shape: tuple[int, int, int, int], how: str = "",
          activation: Activation = SILU) -> tuple[ExpertWeights, Rows, Tensor, Tensor]:  # fmt: skip
    """Weights, encoded rows, ids, weights of choices."""
    experts, hidden, width, top_k = shape
    w, ids = expert_weights(scheme, (experts, hidden, width), activation), some_ids(tokens, experts, top_k, how)
    x = torch.randn(tokens, hidden, device=device()).bfloat16()
    rows = triton.encode(x, scheme.activation, static_scale(scheme.activation))
    return w, rows, ids, torch.rand(tokens, top_k, device=device())


def plain_of(w: ExpertWeights) -> ExpertWeights:
    """A copy without tensor-wide scales: those are applied by our own kernels, and compared there."""
    w13, w2 = (copy.deepcopy(each) for each in (w.w13, w.w2))
    for each in (w13, w2):
        if "global_scale" in each.parts:
            each.parts["global_scale"].fill_(1.0)
    return replace(w, w13=w13, w2=w2)


def decoded(x: Tensor, scale: Tensor | None) -> Tensor:
    """FP64 of an operand as kernels take it: [.., M, K] with no scale, one, one per row, or one per 128 of a row."""
    if scale is None or scale.numel() == 1:
        return x.double() * (1.0 if scale is None else scale.double())
    wide = scale.double().repeat_interleave(-(-x.shape[-1] // scale.shape[-1]), -1)[..., : x.shape[-1]]
    return x.double() * wide


def products_of(values: Tensor, w: QuantTensor, ids: Tensor) -> Tensor:
    return reference.expert_products(values, w, ids, None)


def scaled(y: Tensor, top: Tensor | None, row: Tensor | None, at: Tensor, tokens_of: Tensor) -> Tensor:
    """Results of a product with the scales that it did not know of. top: of its segments, [E, S]."""
    y = y.double()
    if top is not None:
        y = y * top.double()[at.long()].repeat_interleave(y.shape[1] // top.shape[1], 1)
    if row is not None:
        y = y * (row.double() if row.numel() == 1 else row.double().view(-1, 1)[tokens_of])
    return y


def check_between(record: Record, w: ExpertWeights, y: Tensor, at: Tensor, extras: tuple[Any, Any, Any],
                  used: Tensor) -> None:  # fmt: skip
    """Bias, activation and encoding of the first product's results, as they are in BF16.

    extras: tensor-wide scales, scales of rows, the number of each row's token.
    """
    wide = scaled(y, extras[0], extras[1], at, extras[2])
    size, roundings = wide.abs(), sum(each is not None for each in extras[:2])
    if w.biases:
        bias, roundings = w.biases[0].double()[at.long()], roundings + 1
        wide, size = wide + bias, size + bias.abs()
    wide, off = activated(wide, roundings * HALF * size, w.activation)
    rows, scale = record.joined[0]
    if rows.dtype == torch.float32:  # encoded by another kernel, which is tested bit for bit
        assert_rows_close(rows[used], wide, 1e-5, "activation")
    else:
        scale = None if scale is None else scale[used]
        check_codes(rows[used], scale, wide, off, w.between, "activation and codes")


def check_sum(out: Tensor, y: Tensor, routed: Tensor, ids: Tensor, weights: Tensor) -> None:
    """y: of the routed rows, in FP64, all scales and biases applied."""
    top_k, tokens = ids.shape[1], len(ids)
    terms = y * weights.flatten()[routed, None].double()
    want = torch.zeros(tokens, y.shape[1], dtype=torch.float64, device=y.device).index_add_(0, routed // top_k, terms)
    assert_rows_close(out, want, LIMIT, "weighted sum")


def check_deep_gemm(scheme: Scheme, tokens: int, shape: tuple[int, int, int, int], how: str, record: Record,
                    activation: Activation = SILU) -> None:  # fmt: skip
    w, rows, ids, weights = layer(scheme, tokens, shape, how, activation)
    for height in (0, *deep_gemm.HEIGHTS):
        record.products.clear()
        record.joined.clear()
        out = deep_gemm.experts(rows, w, ids, weights, height)
        if not tokens:
            assert out.shape == (0, shape[1])
            return
        stages_of_deep_gemm(record, w, (rows, ids, weights), out)


def stages_of_deep_gemm(record: Record, w: ExpertWeights, given: tuple[Rows, Tensor, Tensor], out: Tensor) -> None:
    """given: rows, ids, weights of the one call that was recorded."""
    from moesaic.kernels._triton.place import place

    rows, ids, weights = given
    flat, top_k = ids.flatten(), ids.shape[1]
    routed = torch.where(flat >= 0)[0]
    (first, y1), (second, y2) = record.products
    at = place(ids, w.w13.shape[0], first[4]).place_R[routed].long()
    moved = (first[0], first[1]) if "scale" in rows.parts else (first[0],)
    for mine, part in zip(moved, rows.parts.values(), strict=True):
        assert torch.equal(mine[at].double(), part[routed // top_k].double()), "rows are moved as they are"
    values = decoded(first[0][at], None if first[1] is None else first[1][at])
    assert_rows_close(y1[at], products_of(values, w.w13, flat[routed]), LIMIT, "first product")
    check_between(record, w, y1[at], flat[routed], (None, None, routed // top_k), at)
    values = decoded(second[0][at], None if second[1] is None else second[1][at])
    assert_rows_close(y2[at], products_of(values, w.w2, flat[routed]), LIMIT, "second product")
    bias = w.biases[1].double()[flat[routed].long()] if w.biases else 0.0
    check_sum(out, y2[at].double() + bias, routed, ids, weights)


def check_slots(scheme: Scheme, shape: tuple[int, int, int, int], counts: list[int], record: Record) -> None:
    """Slots [E, C, K]; what lies behind a count is NaN and stays out of everything."""
    experts, capacity, hidden, width = shape
    w, counts_E = expert_weights(scheme, (experts, hidden, width)), torch.tensor(counts, device=device())
    x = torch.randn(experts, capacity, hidden, device=device()).bfloat16()
    for e, count in enumerate(counts):
        x[e, count:] = float("nan")
    rows = triton.encode(x, scheme.activation, static_scale(scheme.activation))
    out = deep_gemm.experts_slotted(rows, w, counts_E, max(1, sum(counts) // experts))
    (first, y1), (second, y2) = record.products
    used = torch.arange(capacity, device=device()) < counts_E[:, None]
    at = torch.arange(experts, device=device())[:, None].expand(experts, capacity)[used].to(torch.int32)
    for (x, scale), y, weight in ((first[:2], y1, w.w13), (second[:2], y2, w.w2)):
        values = decoded(x[used], None if scale is None else scale[used])
        assert_rows_close(y[used], products_of(values, weight, at), LIMIT, "product of slots")
    both = y1[used].double()
    wide, off = activated(both, torch.zeros_like(both), w.activation)
    mine, scale = record.joined[0]
    check_codes(mine[used], None if scale is None else scale[used], wide, off, w.between, "activation of slots")
    assert torch.equal(out[used], y2[used])


def check_humming(scheme: Scheme, tokens: int, shape: tuple[int, int, int, int], how: str, record: Record,
                  activation: Activation = SILU) -> None:  # fmt: skip
    w, rows, ids, weights = layer(scheme, tokens, shape, how, activation)
    if tokens:
        fresh_call(humming, w, (rows, ids, weights), record)
    else:
        assert humming.experts(rows, humming.pack(w), ids, weights).shape == (0, shape[1])


def stages_of_humming(record: Record, w: ExpertWeights, plain: ExpertWeights, given: tuple[Rows, Tensor, Tensor],
                      out: Tensor) -> None:  # fmt: skip
    """w, plain: the weights packed or not, and their `plain_of` from before. given: as above."""
    rows, ids, weights = given
    flat, top_k = ids.flatten(), ids.shape[1]
    routed = torch.where(flat >= 0)[0]
    at, owner = flat[routed], routed // top_k
    (first, y1), (second, y2) = record.products
    assert_rows_close(y1[routed], products_of(decoded(*first[:2])[owner], plain.w13, at), LIMIT, "first product")
    _, _, row = humming.operand(rows)
    check_between(record, w, y1[routed], at, (w.w13.parts.get("global_scale"), row, owner), routed)
    values = decoded(*second[:2])[routed]
    assert_rows_close(y2[routed], products_of(values, plain.w2, at), LIMIT, "second product")
    last = scaled(y2[routed], w.w2.parts.get("global_scale"), row_of(record, w), at, routed)
    bias = w.biases[1].double()[at.long()] if w.biases else 0.0
    check_sum(out, last + bias, routed, ids, weights)


def fresh_call(module: ModuleType, w: ExpertWeights, given: tuple[Rows, Tensor, Tensor], record: Record) -> Tensor:
    """The layer, every stage of it held against FP64. w: plain; packed by this where the backend packs."""
    record.products.clear()
    record.joined.clear()
    if module is humming:
        plain, there = plain_of(w), humming.pack(w)
        out = humming.experts(given[0], there, *given[1:])
        stages_of_humming(record, w, plain, given, out)
    else:
        out = deep_gemm.experts(given[0], w, *given[1:])
        stages_of_deep_gemm(record, w, given, out)
    return out


def row_of(record: Record, w: ExpertWeights) -> Tensor | None:
    """What the encoder left to the sum: NVFP4's scale of each row."""
    if w.between.name != "nvfp4":
        return None
    scale = triton.encode(record.joined[0][0], w.between, w.between_scale).parts.get("global_scale")
    assert scale is not None
    return scale
