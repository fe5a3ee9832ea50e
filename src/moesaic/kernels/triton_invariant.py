"""The GPU ops whose result for a row never depends on the rows beside it: what `--deterministic` runs.

The kernels are those of `triton`, with tiles, parts of K and cuts of the context that follow from the weight and the
position alone: a row meets the same numbers in the same order, whether it is decoded or part of a prompt, and in
whatever company. What `triton` computes by one program per row is so already.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.contract import Contract
from moesaic.contracts.scheme import Encoding, WeightFormat
from moesaic.contracts.spec import RouterSpec
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels import triton
from moesaic.kernels.ops import AttentionBatch, ExpertWeights, KVView, Latent, Softmax
from moesaic.kernels.triton import probe

__all__ = ["CONTRACTS", "probe"]
OPS = ("linear", "linear_quant", "linear_terms", "gate", "experts", "attend_paged", "attend_dense", "attend_encode",
       "attend_latent")  # fmt: skip
CONTRACTS: tuple[Contract, ...] = tuple(
    replace(triton.contract_of(op), backend="triton_invariant", batch_invariant=True, rank=60) for op in OPS
)
CHUNK = 512
"""Positions of a context that one program folds; parts are then added up in order."""
PLAIN, BF16 = Encoding("bf16"), WeightFormat("bf16")
ROWS = 16
"""Of a tile of products per head."""
HEIGHT = 32
"""Rows of a tile of an expert: most are empty in decoding, which waits for weights; prompts fill them."""


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    from moesaic.kernels._triton.linear import wide_terms
    from moesaic.kernels._triton.linear_quant import added_up

    if x_TD.dtype == torch.float32:
        return added_up(wide_terms(x_TD, w_ND, bias_N, fixed=True), x_TD.dtype)
    w = QuantTensor(BF16, (len(w_ND),), w_ND.shape[1], {"data": w_ND})
    return linear_quant(Rows(PLAIN, {"data": x_TD}, x_TD.dtype), w, bias_N)


def linear_quant(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    from moesaic.kernels._triton.linear_quant import added_up

    terms = linear_terms(x, w, bias_N)
    y_TN = terms[0] if len(terms) == 1 else added_up(terms, x.dtype)
    return y_TN.view(*x.data.shape[:-1], w.shape[-2])


def linear_terms(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    from moesaic.kernels._triton.linear_quant import products

    return products(x, w, bias_N, fixed=True)


def gate(x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, bias_E: Tensor | None, spec: RouterSpec,
         live_T: Tensor | None = None, counts_E: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    from moesaic.kernels._triton.linear import wide_terms
    from moesaic.kernels._triton.route import choose

    terms = wide_terms(x_TD, w_ED, logit_bias_E, fixed=True)
    return choose(terms, bias_E, spec, live_T, counts_E, rounded=w_ED.dtype == torch.bfloat16)


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """A row meets its expert's weights in tiles of one size, in whatever place of a tile it lies."""
    from moesaic.kernels._triton.encode import encode_rows
    from moesaic.kernels._triton.experts import combine, first_product, second_product
    from moesaic.kernels._triton.sort import sort

    w.must_be("plain")
    out = torch.empty(len(ids_TA), w.w2.shape[-2], dtype=x.dtype, device=x.data.device)
    if not ids_TA.numel():
        return out
    ids = ids_TA.contiguous()
    blocks = sort(ids, w.w13.shape[0], HEIGHT)
    hidden = first_product(x, w, blocks, ids.shape[1])
    y = second_product(encode_rows(hidden, w.between, w.between_scale, blocks.total, x.dtype), w, blocks)
    return combine(y, ids, weights_TA.contiguous(), out)


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    from moesaic.kernels._triton.attend_paged import Heads, Tables, Target

    out = q_THK.new_empty(*q_THK.shape[:2], view.value_dim)
    how = Softmax(scale, window, sinks_H)
    in_chunks(q_THK, Heads.of(pool_PW, view), Tables.of(batch), how, batch.longest, Target(out))
    return out


def attend_dense(q_THK: Tensor, k_LHK: Tensor, v_LHV: Tensor, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    from moesaic.kernels._triton.attend_paged import Heads, Tables, Target

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THK, k_LHK, v_LHV))
    heads = Heads(k, v, (k.stride(0), k.stride(1)), (v.stride(0), v.stride(1)), k.shape[1], k.shape[2], v.shape[2])
    out = q.new_empty(*q.shape[:2], v.shape[2])
    if len(q):
        tables = Tables(None, 1, None, 1, len(q), len(k))
        in_chunks(q, heads, tables, Softmax(scale, window, sinks_H), len(k), Target(out))
    return out


def attend_encode(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax,
                  encoding: Encoding, scale: Tensor | None = None) -> Rows:  # fmt: skip
    from moesaic.kernels._triton.attend_paged import Heads, Tables, Target, joins
    from moesaic.kernels._triton.emit import emits, parts_for, rows_of
    from moesaic.kernels._triton.encode import encode

    tokens, heads = q_THK.shape[:2]
    if encoding.name == "bf16" or not (emits(encoding) and joins(encoding, heads, view.value_dim)):
        y_THV = attend_paged(q_THK, pool_PW, batch, view, how.scale, how.window, how.sinks_H)
        return encode(y_THV.flatten(1), encoding, scale)
    out = q_THK.new_empty(tokens, heads, view.value_dim)
    parts = parts_for(encoding, tokens, heads * view.value_dim, q_THK, scale)
    in_chunks(q_THK, Heads.of(pool_PW, view), Tables.of(batch), how, batch.longest, Target(out, encoding, parts))
    return rows_of(encoding, parts, out)


def in_chunks(q: Tensor, kv: Any, tables: Any, how: Softmax, longest: int, target: Any) -> None:
    """Every row alike: its context in chunks from position 0, in tiles of one size."""
    from moesaic.kernels._triton.attend_paged import in_parts
    from moesaic.kernels._triton.launch import cdiv, power

    if not len(q):
        return
    height = 32 if kv.wide else 64
    tile = {"RB": min(power(q.shape[1] // kv.kv_heads), height), "BM": height, "BL": 32 if kv.wide else 64,
            "num_warps": 8 if kv.wide else 4, "num_stages": 3}  # fmt: skip
    in_parts(q if q.stride(-1) == 1 else q.contiguous(), kv, tables, how, tile, cdiv(longest, CHUNK), target, CHUNK)


def attend_latent(q_THK: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor,
                  batch: AttentionBatch) -> Tensor:  # fmt: skip
    from moesaic.kernels._triton.attend_latent import per_head

    q = q_THK if q_THK.stride(-1) == 1 else q_THK.contiguous()
    tokens, heads, _ = q.shape
    rank, turned = w.w_k_HNR.shape[2], 2 * angles[0].shape[1]
    absorbed = q.new_empty(tokens, heads, rank + turned)
    per_head(q, w.w_k_HNR.transpose(1, 2), absorbed, angles, w.interleaved, ROWS)
    y_THR = attend_paged(absorbed, pool_PW, batch, KVView(1, rank + turned, 0, rank), w.scale)
    return per_head(y_THR, w.w_v_HVR, q.new_empty(tokens, heads, w.w_v_HVR.shape[1]), most=ROWS)
