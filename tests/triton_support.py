"""What the interpreter and the GPU ring share: operands on the device at hand, and each op held against FP64.

Under TRITON_INTERPRET (see conftest.py) the kernels run on the CPU, a program after the other; otherwise on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.scheme import SCHEMES, Encoding, Scheme
from moesaic.contracts.spec import SILU, Activation
from moesaic.formats import encodings
from moesaic.formats.base import QuantTensor
from moesaic.formats.dummy import fill
from moesaic.formats.encodings import Rows
from moesaic.formats.encodings.requantize import requantize_slots as by_definition
from moesaic.kernels import reference, triton
from moesaic.kernels.ops import AttentionBatch, ExpertWeights, KVView, Span
from tests.compare import assert_rows_close, row_errors

LIMIT = 2**-7
BF16 = torch.bfloat16


def device() -> torch.device:
    from triton import knobs

    return torch.device("cpu" if knobs.runtime.interpret else "cuda")


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=device()).to(dtype)


def weight(scheme: Scheme, segments: tuple[int, ...], columns: int, *lead: int, gain: float = 1.0) -> QuantTensor:
    like = torch.empty(0, dtype=BF16, device=device())
    return fill(QuantTensor.empty(scheme.weight, segments, columns, like, lead), gain)


def static_scale(encoding: Encoding) -> Tensor | None:
    """Of rows of unit size."""
    value = 0.01 if encoding.name == "fp8_tensor" else 0.002
    return torch.tensor(value, device=device()) if encoding.static else None


def in_double(x: Rows) -> Rows:
    """The same codes, to be multiplied in FP64."""
    parts = {name: part for name, part in x.parts.items() if name != "exact"}
    if x.encoding.name == "bf16":
        parts["data"] = parts["data"].double()
    return Rows(x.encoding, parts, torch.float64)


def close(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype = BF16) -> None:
    assert actual.dtype == dtype, what
    assert actual.shape == expected.shape, what
    if actual.numel():
        assert_rows_close(actual, expected, LIMIT, what)


def same_codes(mine: Rows, x: Tensor, scale: Tensor | None) -> None:
    """Bit for bit the reference's codes and scales; and `exact` is what they stand for.

    The reference runs on the CPU: on CUDA, torch multiplies by the reciprocal where it is told to divide by a number.
    """
    theirs = encodings.encode(x.cpu(), mine.encoding, None if scale is None else scale.cpu())
    for name, part in theirs.parts.items():
        own = mine.parts[name].cpu()
        assert own.dtype == part.dtype
        assert own.shape == part.shape
        if part.element_size() == 1:
            own, part = own.view(torch.uint8), part.view(torch.uint8)
        assert torch.equal(own, part), (mine.encoding, name, (own != part).sum())
    if "exact" in mine.parts and len(x):
        top = mine.parts.get("global_scale", torch.ones(()))
        assert torch.equal(mine.parts["exact"].cpu().float() * top.cpu(), theirs.decode()), mine.encoding


def check_encode(encoding: Encoding, tokens: int, size: int, dtype: torch.dtype) -> None:
    x = randn(tokens, size, dtype=torch.float32) * 3
    if tokens > 3:
        x[3], x[2], x[1, : size // 2] = 0, x[2] * 1e-3, x[1, : size // 2] * 1e4
    x, scale = x.to(dtype), static_scale(encoding)
    same_codes(triton.encode(x, encoding, scale), x, scale)


def check_linear(scheme: Scheme, tokens: int, segments: tuple[int, ...], columns: int) -> None:
    w, scale = weight(scheme, segments, columns), static_scale(scheme.activation)
    rows = triton.encode(randn(tokens, columns), scheme.activation, scale)
    for bias in (None, randn(sum(segments))):
        close(triton.linear_quant(rows, w, bias), reference.linear_quant(in_double(rows), w, bias), scheme.name)


def some_ids(tokens: int, experts: int, top_k: int, how: str) -> Tensor:
    """Ragged by construction: the last expert is empty; or one has all; rows and single choices are padding."""
    ids = torch.rand(tokens, experts - 1).argsort(-1)[:, :top_k].to(torch.int32)
    if how == "one expert":
        ids = torch.full_like(ids, 1)
    if how == "holes":
        ids[::3, 0] = -1
        ids[tokens // 2 : tokens // 2 + 2] = -1
    if how == "every height":  # 8 rows, 16, 24 ...
        each = torch.arange(experts, dtype=torch.int32)
        ids = each.repeat_interleave(8 * (each + 1))[torch.randperm(tokens), None]
    return ids.to(device())


def expert_weights(scheme: Scheme, shape: tuple[int, int, int], activation: Activation = SILU) -> ExpertWeights:
    """Gates are wide enough for the clamps of gpt-oss's activation to bite; it comes with biases."""
    experts, hidden, width = shape
    oai = activation.kind == "swiglu_oai"
    biases = (randn(experts, 2 * width), randn(experts, hidden)) if oai else None
    w13 = weight(scheme, (width, width), hidden, experts, gain=5.0 if oai else 1.5)
    return ExpertWeights(w13, weight(scheme, (hidden,), width, experts), activation, scheme.activation,
                         static_scale(scheme.activation), biases)  # fmt: skip


def check_experts(scheme: Scheme, tokens: int, shape: tuple[int, int, int, int], how: str = "usual",
                  activation: Activation = SILU) -> None:  # fmt: skip
    """Stage by stage, each on the kernel's own previous result; then the sum."""
    from moesaic.kernels._triton import experts as code

    experts, hidden, width, top_k = shape
    w = expert_weights(scheme, (experts, hidden, width), activation)
    ids, weights = some_ids(tokens, experts, top_k, how), torch.rand(tokens, top_k, device=device())
    rows = triton.encode(randn(tokens, hidden), scheme.activation, static_scale(scheme.activation))
    out = triton.experts(rows, w, ids, weights)
    assert out.shape == (tokens, hidden)
    assert out.dtype == BF16
    if not tokens:
        return
    blocks, order = code.blocks_of(ids, w), sorted_rows(ids)
    if blocks.order_R is not None:
        assert int(blocks.total) == len(order)  # type: ignore[arg-type]
        assert torch.equal(blocks.order_R[: len(order)].long(), order)
    else:
        order = torch.where(ids.flatten() >= 0)[0]
    second = check_products(rows, w, blocks, order, ids.flatten()[order], top_k)
    check_sum(out, second, ids, weights)


def sorted_rows(ids_TA: Tensor) -> Tensor:
    """Rows t A + a with an expert, in order of it, stable."""
    order = torch.where(ids_TA.flatten() >= 0)[0]
    return order[ids_TA.flatten()[order].argsort(stable=True)]


def check_products(rows: Rows, w: ExpertWeights, blocks: Any, order: Tensor, at: Tensor, top_k: int) -> Tensor:
    """Both products and the encoding between them. order: of sorted rows; at: their experts. -> the second's result."""
    from moesaic.kernels._triton import experts as code
    from moesaic.kernels._triton.encode import encode_rows

    used = slice(0, len(order)) if blocks.order_R is not None else order
    first = code.first_product(rows, w, blocks, top_k)
    x_RD = reference.row_values(in_double(flat(rows)))[order // top_k]
    wide = reference.expert_products(x_RD, w.w13, at, w.biases[0] if w.biases else None)
    close(first[used], reference.activate(wide, w.activation), "first product", first.dtype)
    between = encode_rows(first, w.between, w.between_scale, blocks.total, BF16)
    inside = Rows(between.encoding, {n: p[used] if p.dim() else p for n, p in between.parts.items()}, BF16)
    if w.between.name != "bf16":
        same_codes(inside, first[used], w.between_scale)
    second = code.second_product(between, w, blocks)
    h_RI = reference.row_values(in_double(inside))
    close(second[order], reference.expert_products(h_RI, w.w2, at, w.biases[1] if w.biases else None), "second product")
    return second


def flat(x: Rows) -> Rows:
    """Rows [R, ...] of rows with more axes."""
    return Rows(x.encoding, {n: p.reshape(-1, p.shape[-1]) if p.dim() else p for n, p in x.parts.items()}, x.dtype)


def check_sum(out_TD: Tensor, y_RD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> None:
    """Cancellation within a token's sum is no error of the kernel's, so rows are measured against their terms."""
    y_TAD = torch.where((ids_TA >= 0)[..., None], y_RD.view(*ids_TA.shape, -1).double(), 0.0)
    terms_TAD = y_TAD * weights_TA[..., None].double()
    close(out_TD, terms_TAD.sum(1), "weighted sum")


def check_slotted(scheme: Scheme, shape: tuple[int, int, int, int], counts: list[int]) -> None:
    """Slots of E experts, capacity C; what lies behind a count is NaN and stays out of everything."""
    experts, capacity, hidden, width = shape
    w = expert_weights(scheme, (experts, hidden, width))
    x = randn(experts, capacity, hidden)
    for e, count in enumerate(counts):
        x[e, count:] = float("nan")
    check_slots(triton.encode(x, scheme.activation, static_scale(scheme.activation)), w, counts)


def check_slotted_chain(shape: tuple[int, int, int, int], counts: list[int]) -> None:
    """W4AFP8 behind a dispatcher: rows arrive in FP8 with a scale per 128, group by group, and get the checkpoint's one
    scale; INT4 times FP8, activation, INT4 times FP8."""
    from moesaic.kernels._triton.requantize import requantize_slots

    scheme, (experts, capacity, hidden, width) = SCHEMES["w4afp8_static"], shape
    w, top = expert_weights(scheme, (experts, hidden, width)), static_scale(scheme.activation)
    wire = triton.encode(randn(experts, capacity, hidden), Encoding("fp8_group128"))
    scales = wire.parts["scale"].transpose(1, 2).contiguous().transpose(1, 2)
    counts_E = torch.tensor(counts, device=device())
    assert top is not None
    data = requantize_slots(wire.data, scales, counts_E, top)
    theirs = by_definition(wire.data.cpu(), scales.cpu(), counts_E.cpu(), top.cpu())
    assert torch.equal(data.cpu().view(torch.uint8), theirs.view(torch.uint8))
    check_slots(Rows(scheme.activation, {"data": data, "scale": top}, BF16), w, counts)


def check_slots(rows: Rows, w: ExpertWeights, counts: list[int]) -> None:
    """`experts_slotted` of rows [E, C, D], product by product."""
    from moesaic.kernels._triton import experts as code
    from moesaic.kernels._triton.sort import slots

    (experts, capacity), counts_E = rows.data.shape[:2], torch.tensor(counts)
    out = code.experts_slotted(rows, w, counts_E.to(device()))
    at_EC = torch.arange(experts)[:, None].expand(experts, capacity)
    order = torch.where((torch.arange(capacity) < counts_E[:, None]).flatten())[0]
    blocks = slots(counts_E.to(device()), capacity, code.height_of(experts * capacity, experts))
    at = at_EC.flatten()[order].to(torch.int32).to(device())
    second = check_products(rows, w, blocks, order.to(device()), at, 1)
    assert torch.equal(out.flatten(0, 1)[order.to(device())], second[order.to(device())])


def check_paged(view: KVView, heads: int, lengths: tuple[int, ...], counts: tuple[int, ...], window: int | None = None,
                sinks: bool = False) -> None:  # fmt: skip
    """Sequences with count 1 come first. Pool rows that nobody owns are NaN."""
    width = max(view.kv_heads * view.key_dim, view.value_at + view.kv_heads * view.value_dim)
    owned = sum(lengths)
    pool = randn(owned + 50, width)
    pool[owned:] = float("nan")
    slots_SL = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for s, slots in enumerate(torch.randperm(owned).split(list(lengths))):
        slots_SL[s, : lengths[s]] = slots
    starts = [sum(counts[:s]) for s in range(len(counts))]
    spans = tuple(Span(*each) for each in zip(starts, counts, lengths, strict=True))
    batch = AttentionBatch.of(spans, sum(c == 1 for c in counts), slots_SL.to(device()))
    q, sinks_H = randn(sum(counts), heads, view.key_dim), torch.randn(heads, device=device()) * 3 if sinks else None
    scale = view.key_dim**-0.5
    mine = triton.attend_paged(q, pool, batch, view, scale, window, sinks_H)
    theirs = reference.attend_paged(q.double(), pool.double(), batch, view, scale, window, sinks_H)
    close(mine.flatten(1), theirs.flatten(1), f"{view} {lengths}")


def check_row_wise(tokens: int, size: int, dtype: torch.dtype) -> None:
    x, y, w = (randn(tokens, size, dtype=dtype) * 3, randn(tokens, size, dtype=dtype), randn(size, dtype=dtype))
    close(triton.rms_norm(x, w, 1e-6), reference.rms_norm(x.double(), w.double(), 1e-6), "rms_norm", dtype)
    normed, total = triton.add_rms_norm(x, y, w, 1e-6)
    assert worst(total, x.double() + y.double()) <= LIMIT
    close(normed, reference.rms_norm(total.double(), w.double(), 1e-6), "add_rms_norm", dtype)
    for activation in (SILU, Activation("swiglu_oai")):
        close(triton.activate(x, activation), reference.activate(x.double(), activation), activation.kind, dtype)
    heads = randn(tokens, 9, 40, dtype=dtype)[:, 2:7, :24]  # as the layers cut them out of a fused product
    close(triton.rms_norm(heads, w[:24], 1e-6).flatten(1),
          reference.rms_norm(heads.double(), w[:24].double(), 1e-6).flatten(1), "heads", dtype)  # fmt: skip
    angles = torch.rand(tokens, 12, device=device()) * 6
    for interleaved in (False, True):
        args = (angles.cos(), angles.sin(), interleaved)
        mine, theirs = triton.rotate(heads, *args), reference.rotate(heads.double(), *args)
        close(mine.flatten(1), theirs.flatten(1), "rotate", dtype)


def worst(actual: Tensor, expected: Tensor) -> float:
    errors = row_errors(actual, expected)
    return errors.max().item() if len(errors) else 0.0
