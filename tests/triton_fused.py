"""What the interpreter and the GPU ring share for fused ops and the FP8 cache: each held against its twin in FP64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding, Scheme
from moesaic.contracts.spec import KVParts, RouterSpec
from moesaic.formats import kv
from moesaic.kernels import reference, reference_fused, triton
from moesaic.kernels.ops import AttentionBatch, ExpertTerms, HeadNorms, KVView, Latent, Softmax, Span
from tests.triton_support import (
    BF16,
    close,
    device,
    expert_weights,
    in_double,
    randn,
    same_codes,
    some_ids,
    static_scale,
    weight,
    worst,
)  # fmt: skip

LATE = 2**-20
"""Relative: an FP32 sum in another order."""


def check_add_norm_encode(encoding: Encoding, tokens: int, size: int, terms: int, residual: bool) -> None:
    """The norm against FP64, and the encoding bit for bit of the norm as it came out."""
    x = randn(terms, tokens, size, dtype=torch.float32) if terms else randn(tokens, size)
    r, w, scale = randn(tokens, size) if residual else None, randn(size), static_scale(encoding)
    y, rows, total = triton.add_norm_encode(x, r, w, 1e-6, encoding, scale)
    summed = x.double().sum(0) if terms else x.double()
    summed = summed if r is None else summed + r.double()
    assert total.dtype == BF16
    assert worst(total, summed) <= 2**-8
    close(y, reference.rms_norm(total.double(), w.double(), 1e-6), "norm")
    assert rows.encoding == encoding
    if encoding.name == "bf16":
        assert rows.data is y
    elif tokens:
        same_codes(rows, y, scale)


def check_norm_of_experts(encoding: Encoding, tokens: int, size: int, top_k: int, onto: bool) -> None:
    """The sum against FP64; and bit for bit what comes out where kernels of their own weight, add and norm. Rows of no
    expert are NaN: nothing may look at them."""
    from moesaic.kernels._triton.experts import combine

    ids, weights = some_ids(tokens, 3 * top_k, top_k, "holes"), torch.rand(tokens, top_k, device=device())
    y, r, w, scale = randn(tokens * top_k, size), randn(tokens, size), randn(size), static_scale(encoding)
    y[ids.flatten() < 0] = float("nan")
    terms = ExpertTerms(y, ids, weights, randn(tokens, size) if onto else None)
    norm, rows, total = triton.add_norm_encode(terms, r, w, 1e-6, encoding, scale)
    wide = ExpertTerms(y.double(), ids, weights, None if terms.onto_TD is None else terms.onto_TD.double())
    assert worst(total, reference_fused.added_up(wide, torch.float64) + r.double()) <= 3 * 2**-9
    summed = combine(y, ids, weights, y.new_empty(tokens, size))
    if terms.onto_TD is not None:  # by a kernel: the interpreter rounds in a way of its own
        summed = triton.add_norm_encode(terms.onto_TD, summed, w, 1e-6, encoding, scale)[2]
    apart = triton.add_norm_encode(summed, r, w, 1e-6, encoding, scale)
    assert torch.equal(total, apart[2])
    assert torch.equal(norm, apart[0])
    assert rows.parts.keys() == apart[1].parts.keys()
    for name, part in rows.parts.items():
        other = apart[1].parts[name]
        assert torch.equal(part.view(torch.uint8), other.view(torch.uint8)) if part.dim() else part is other, name


def check_experts_terms(scheme: Scheme, tokens: int, shape: tuple[int, int, int, int], backend: Any = triton) -> None:
    """Weighted and added up they are what `experts` returns, bit for bit. Where nothing is encoded on the way, each row
    is also that of the twin."""
    from moesaic.kernels._triton.experts import combine

    experts, hidden, width, top_k = shape
    w, ids = expert_weights(scheme, (experts, hidden, width)), some_ids(tokens, experts, top_k, "holes")
    weights = torch.rand(tokens, top_k, device=device())
    rows = triton.encode(randn(tokens, hidden), scheme.activation, static_scale(scheme.activation))
    terms = backend.experts_terms(rows, w, ids, weights)
    assert torch.equal(terms.ids_TA, ids)
    assert torch.equal(terms.weights_TA, weights)
    assert terms.y_RD.shape == (tokens * top_k, hidden)
    summed = combine(terms.y_RD, ids, weights, rows.data.new_empty(tokens, hidden, dtype=BF16)) if tokens else None
    if summed is not None:
        assert torch.equal(summed, backend.experts(rows, w, ids, weights))
    if scheme.activation.name == "bf16" and tokens:
        twin, used = reference_fused.experts_terms(in_double(rows), w, ids, weights), ids.flatten() >= 0
        close(terms.y_RD[used], twin.y_RD[used], scheme.name)


def check_terms(scheme: Scheme, tokens: int, segments: tuple[int, ...], columns: int) -> None:
    w, scale = weight(scheme, segments, columns), static_scale(scheme.activation)
    rows = triton.encode(randn(tokens, columns), scheme.activation, scale)
    for bias in (None, randn(sum(segments))):
        terms = triton.linear_terms(rows, w, bias)
        assert terms.shape[1:] == (tokens, sum(segments))
        assert terms.dtype == (torch.float32 if len(terms) > 1 else BF16)
        close(terms.double().sum(0).to(BF16), reference.linear_quant(in_double(rows), w, bias), scheme.name)


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    each = torch.rand(tokens, half, device=device()) * 6
    return each.cos(), each.sin()


def pool_of(slots: int, parts: KVParts, fp8: bool) -> Tensor:
    """Random rows of a cache."""
    rows = randn(slots, parts.width, dtype=torch.float32)
    return kv.encode(rows, parts) if fp8 else rows.to(BF16)


def check_rows_written(mine: Tensor, theirs: Tensor, slots: Tensor, parts: KVParts, before: Tensor) -> None:
    """The tokens' rows, and no other. FP8: at most a step of a code apart, in at most 0.1% of places."""
    others = torch.ones(len(mine), dtype=torch.bool, device=mine.device)
    others[slots] = False
    assert torch.equal(mine[others].view(torch.uint8), before[others].view(torch.uint8))
    if mine.dtype == torch.uint8:
        width, plain = sum(parts.coded), slice(sum(parts.coded), parts.exponents_at)
        if parts.plain:
            tails = (rows[slots][:, plain].contiguous().view(BF16) for rows in (mine, theirs))
            close(*tails, "what stays in BF16")
        coded = [i for i in range(mine.shape[1]) if i < width or i >= parts.exponents_at]
        codes, twins = mine[slots][:, coded].int(), theirs[slots][:, coded].int()
        assert (codes != twins).sum() <= max(1, 0.001 * codes.numel())
        assert ((codes - twins).abs() <= 1).all()
    else:
        close(mine[slots], theirs[slots], "rows")


def check_store_heads(tokens: int, sizes: tuple[int, int, int, int], normed: bool, interleaved: bool,
                      fp8: bool) -> None:  # fmt: skip
    """sizes: query heads, kv heads, head size, rotated elements."""
    heads, groups, size, turned = sizes
    view = KVView(groups, size, groups * size, size)
    x, turn = randn(3, tokens, (heads + 2 * groups) * size, dtype=torch.float32), angles(tokens, turned // 2)
    norms = (randn(size), randn(size)) if normed else (None, None)
    before = pool_of(tokens + 9, view.parts, fp8)
    mine, theirs = before.clone(), before.clone() if fp8 else before.double()
    slots = torch.randperm(tokens + 9, device=device())[:tokens]
    q = triton.store_heads(x, HeadNorms(*norms, 1e-6, interleaved, BF16), turn, mine, slots, view)
    wide = HeadNorms(*(None if n is None else n.double() for n in norms), 1e-6, interleaved, torch.float64)
    twin = reference_fused.store_heads(x.double(), wide, turn, theirs, slots, view)
    close(q.flatten(1), twin.flatten(1), "queries")
    check_rows_written(mine, theirs, slots, view.parts, before)


def latent(heads: int, sizes: tuple[int, int, int], column: int = 0, interleaved: bool = True) -> Latent:
    """sizes: of elements without position, of the latent, of values."""
    nope, rank, value = sizes
    w_k, w_v = randn(heads, nope, rank) * nope**-0.5, randn(heads, value, rank) * rank**-0.5
    return Latent(w_k, w_v, randn(rank), 1e-6, 0.1, interleaved, column)


def in_wide(w: Latent) -> Latent:
    return Latent(w.w_k_HNR.double(), w.w_v_HVR.double(), w.norm_R.double(), w.eps, w.scale, w.interleaved, w.column)


def check_store_latent(tokens: int, rank: int, turned: int, fp8: bool) -> None:
    for column, interleaved in ((0, True), (24, False)):
        w = latent(2, (16, rank, 16), column, interleaved)
        parts, x, turn = KVParts((rank,), turned), randn(tokens, column + rank + turned), angles(tokens, turned // 2)
        before = pool_of(tokens + 9, parts, fp8)
        mine, theirs = before.clone(), before.clone() if fp8 else before.double()
        slots = torch.randperm(tokens + 9, device=device())[:tokens]
        triton.store_latent(x, w, turn, mine, slots)
        reference_fused.store_latent(x.double(), in_wide(w), turn, theirs, slots)
        check_rows_written(mine, theirs, slots, parts, before)


def paged(lengths: tuple[int, ...], counts: tuple[int, ...], block: int) -> tuple[AttentionBatch, int]:
    """A batch whose blocks lie anywhere, and how many blocks there are; entries behind a context's end are 0."""
    used = [-(-length // block) for length in lengths]
    table = torch.zeros(len(lengths), max(used), dtype=torch.int32)
    for s, blocks in enumerate((torch.randperm(sum(used)) + 1).split(used)):
        table[s, : used[s]] = blocks
    starts = [sum(counts[:s]) for s in range(len(counts))]
    spans = tuple(Span(*each) for each in zip(starts, counts, lengths, strict=True))
    spans_S3 = torch.tensor([(s.start, s.count, s.length) for s in spans], device=device())
    decodes = sum(count == 1 for count in counts)
    return AttentionBatch(spans, decodes, table.to(device()), block, spans_S3), sum(used) + 1


def check_blocks(view: KVView, heads: int, lengths: tuple[int, ...], counts: tuple[int, ...], how: dict[str, Any],
                 fp8: bool) -> None:  # fmt: skip
    """`attend_paged` over tables of blocks; what lies behind the contexts in their last blocks is NaN."""
    batch, blocks = paged(lengths, counts, 8)
    pool = pool_of(blocks * 8, view.parts, fp8)
    seen = torch.zeros(len(pool), dtype=torch.bool, device=device())
    seen[batch.slots_SL[~batch.outside_SL]] = True
    pool[~seen] = 255 if fp8 else float("nan")
    q, sinks = randn(sum(counts), heads, view.key_dim), how.get("sinks", False)
    sinks_H = torch.randn(heads, device=device()) * 3 if sinks else None
    args = (view, view.key_dim**-0.5, how.get("window"), sinks_H)
    mine = triton.attend_paged(q, pool, batch, *args)
    theirs = reference.attend_paged(q.double(), pool if fp8 else pool.double(), batch, *args)
    close(mine.flatten(1), theirs.flatten(1), f"{view} {lengths} {how}")


def check_attend_encode(encoding: Encoding, view: KVView, heads: int, lengths: tuple[int, ...], fp8: bool) -> None:
    """The rows are those of attention on its own, which is held elsewhere, encoded bit for bit."""
    batch, blocks = paged(lengths, (1,) * len(lengths), 16)
    pool, scale = pool_of(blocks * 16, view.parts, fp8), static_scale(encoding)
    q, how = randn(len(lengths), heads, view.key_dim), Softmax(view.key_dim**-0.5, None, None)
    rows = triton.attend_encode(q, pool, batch, view, how, encoding, scale)
    plain = triton.attend_paged(q, pool, batch, view, how.scale).flatten(1)
    close(plain, reference.attend_paged(q.double(), pool if fp8 else pool.double(), batch, view, how.scale).flatten(1),
          "attention")  # fmt: skip
    assert rows.encoding == encoding
    if encoding.name == "bf16":
        assert torch.equal(rows.data.flatten(1), plain)
    else:
        same_codes(rows, plain, scale)


def check_attend_latent(heads: int, sizes: tuple[int, int, int], turned: int, lengths: tuple[int, ...],
                        fp8: bool) -> None:  # fmt: skip
    """Stage by stage, each on the kernel's own previous result; the op is their composition."""
    from moesaic.kernels._triton.attend_latent import per_head

    w, tokens = latent(heads, sizes), len(lengths)
    nope, rank, value = sizes
    batch, blocks = paged(lengths, (1,) * tokens, 16)
    pool, turn = pool_of(blocks * 16, KVParts((rank,), turned), fp8), angles(tokens, turned // 2)
    q, view = randn(tokens, heads, nope + turned), KVView(1, rank + turned, 0, rank)
    absorbed = per_head(q, w.w_k_HNR.transpose(1, 2), q.new_empty(tokens, heads, rank + turned), turn, w.interleaved)
    latents = torch.einsum("thn,hnr->thr", q[..., :nope].double(), w.w_k_HNR.double())
    close(absorbed[..., :rank].flatten(1), latents.flatten(1), "into the latent space")
    turned_q = reference.rotate(q[..., nope:].double(), *turn, w.interleaved)
    close(absorbed[..., rank:].flatten(1), turned_q.flatten(1), "rotated")
    within = triton.attend_paged(absorbed, pool, batch, view, w.scale)
    theirs = reference.attend_paged(absorbed.double(), pool if fp8 else pool.double(), batch, view, w.scale)
    close(within.flatten(1), theirs.flatten(1), "attention")
    out = per_head(within, w.w_v_HVR, q.new_empty(tokens, heads, value))
    close(out.flatten(1), torch.einsum("thr,hvr->thv", within.double(), w.w_v_HVR.double()).flatten(1), "out of it")
    assert torch.equal(triton.attend_latent(q, w, turn, pool, batch), out)


def check_gate(spec: RouterSpec, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    """Logits to FP32's precision; choices and weights those of the twin for them; padding and counts."""
    from moesaic.kernels._triton.linear import wide_terms

    x, w = randn(tokens, hidden, dtype=dtype), randn(spec.experts, hidden, dtype=torch.float32) * hidden**-0.5
    logit_bias = torch.randn(spec.experts, device=device())
    bias = torch.randn(spec.experts, device=device()) if spec.bias else None
    logits = wide_terms(x, w, logit_bias).sum(0)
    exact = x.double() @ w.double().T + logit_bias.double()
    if tokens:
        assert worst(logits, exact) < LATE
    live = (torch.arange(tokens, device=device()) % 3 != 1).long() * 7
    counts = torch.full((spec.experts,), 5, device=device())
    ids, weights = triton.gate(x, w, logit_bias, bias, spec, live, counts)
    assert (ids[live == 0] == -1).all()
    chosen = ids[live != 0].flatten().cpu()
    assert torch.equal(counts.cpu() - 5, torch.bincount(chosen, minlength=spec.experts))
    theirs, expected = reference_fused.gate(x.double(), w.double(), logit_bias.double(), bias, spec, live)
    same = (ids == theirs).all(1)
    assert same.sum() >= tokens - max(1, tokens // 100), "only near ties may be decided by a last bit"
    torch.testing.assert_close(weights[same], expected[same], rtol=1e-4, atol=1e-6)


def check_narrow_gate(spec: RouterSpec, tokens: int, hidden: int) -> None:
    """A gate in BF16: logits are rounded to it, and equal ones go to the lower expert."""
    x, w = randn(tokens, hidden), randn(spec.experts, hidden) * hidden**-0.5
    bias = torch.randn(spec.experts, device=device()) if spec.bias else None
    ids, weights = triton.gate(x, w, None, bias, spec)
    theirs, expected = reference_fused.gate(x, w, None, bias, spec)
    same = (ids == theirs).all(1)
    assert same.sum() >= tokens - max(1, tokens // 20), "a logit at the middle between two may be rounded either way"
    torch.testing.assert_close(weights[same], expected[same], rtol=2**-7, atol=1e-6)


def check_top_two(rows: int, vocab: int, dtype: torch.dtype) -> None:
    scores = randn(rows, vocab, dtype=dtype)
    if rows > 4:
        scores[1] = scores[1].round()  # many equal ones
        scores[2, vocab // 2] = float("nan")
        scores[3] = float("-inf")
        scores[4] = -scores[4].abs() * 0.0  # zeros of both signs
    ids, best, second = triton.top_two(scores)
    theirs = reference_fused.top_two(scores)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, theirs[0])
    assert torch.equal(best.nan_to_num(9e9), theirs[1].nan_to_num(9e9))
    known = ~best.isnan()
    assert torch.equal(second[known], theirs[2][known])
