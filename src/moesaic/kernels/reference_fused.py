"""Twins of the fused ops: compositions of the others. Not declared as contracts: a layer composes what nobody fuses."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.contracts.spec import Activation, KVParts, RouterSpec
from moesaic.formats import kv
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import AttentionBatch, ExpertTerms, ExpertWeights, HeadNorms, KVView, Latent, Softmax
from moesaic.kernels.reference import (
    activate,
    add_rms_norm,
    attend_paged,
    encode,
    expert_rows,
    linear,
    linear_quant,
    rms_norm,
    rotate,
    route,
    wide,
)


def mlp(x_TD: Tensor, w13_ID: Tensor, w2_DI: Tensor, activation: Activation, onto_TD: Tensor | None = None) -> Tensor:
    y_TD = activate(wide(x_TD) @ wide(w13_ID).T, activation) @ wide(w2_DI).T
    return (y_TD if onto_TD is None else y_TD + wide(onto_TD)).to(x_TD.dtype)


def gate(x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, bias_E: Tensor | None, spec: RouterSpec,
         live_T: Tensor | None = None, counts_E: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_TD = wide(x_TD) if w_ED.dtype != torch.bfloat16 else x_TD.to(torch.bfloat16)
    ids_TA, weights_TA = route(linear(x_TD, w_ED, logit_bias_E), bias_E, spec)
    return settle_choices(ids_TA, live_T, counts_E), weights_TA


def settle_choices(ids_TA: Tensor, live_T: Tensor | None, counts_E: Tensor | None) -> Tensor:
    """No expert for rows that are padding; the others are counted."""
    if live_T is not None:
        ids_TA = ids_TA.masked_fill(live_T[:, None] == 0, -1)
    if counts_E is not None:
        counts_E += torch.bincount(ids_TA[ids_TA >= 0], minlength=len(counts_E))
    return ids_TA


def top_two(scores_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores = wide(scores_RV)
    place_R1 = scores.argmax(1, keepdim=True)  # documented to return the first of equal maxima
    others = scores.scatter(1, place_R1, float("-inf"))
    return place_R1[:, 0], scores.gather(1, place_R1)[:, 0], others.amax(1)


def linear_terms(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    return linear_quant(x, w, bias_N)[None]


def experts_terms(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> ExpertTerms:
    rows_R, places_R = torch.where(ids_TA >= 0)
    found_RD = expert_rows(x, w, rows_R, ids_TA[rows_R, places_R])
    y_RD = found_RD.new_zeros(ids_TA.numel(), found_RD.shape[1], dtype=x.dtype)
    y_RD[rows_R * ids_TA.shape[1] + places_R] = found_RD.to(x.dtype)
    return ExpertTerms(y_RD, ids_TA, weights_TA)


def add_norm_encode(x: Tensor | ExpertTerms, residual_TD: Tensor | None, w_D: Tensor, eps: float, encoding: Encoding,
                    scale: Tensor | None = None) -> tuple[Tensor, Rows, Tensor]:  # fmt: skip
    x_TD = added_up(x, w_D.dtype)
    y_TD, total_TD = (rms_norm(x_TD, w_D, eps), x_TD) if residual_TD is None else add_rms_norm(
        x_TD, residual_TD, w_D, eps)  # fmt: skip
    return y_TD, encode(y_TD, encoding, scale), total_TD


def added_up(x: Tensor | ExpertTerms, dtype: torch.dtype) -> Tensor:
    """Terms [P, T, D] or of experts -> their sum; rows stay what they are."""
    if isinstance(x, ExpertTerms):
        y_TAD = wide(x.y_RD).unflatten(0, x.ids_TA.shape)
        y_TAD = torch.where(x.ids_TA[..., None] >= 0, y_TAD, 0.0) * x.weights_TA[..., None].to(y_TAD.dtype)
        y_TD = y_TAD.sum(1).to(dtype)
        return y_TD if x.onto_TD is None else y_TD + x.onto_TD
    return wide(x).sum(0).to(dtype) if x.dim() == 3 else x


def store_heads(x_PTX: Tensor, w: HeadNorms, angles: tuple[Tensor, Tensor], pool_PW: Tensor, slots_T: Tensor,
                view: KVView) -> Tensor:  # fmt: skip
    x_THK = wide(x_PTX).sum(0).unflatten(1, (-1, view.key_dim))
    q, k, v = x_THK.split((x_THK.shape[1] - 2 * view.kv_heads, view.kv_heads, view.kv_heads), 1)
    q, k = (x if norm is None else rms_norm(x, norm, w.eps) for x, norm in ((q, w.q_K), (k, w.k_K)))
    turned = 2 * angles[0].shape[1]
    q, k = (torch.cat([rotate(x[..., :turned], *angles, w.interleaved), x[..., turned:]], -1) for x in (q, k))
    write_rows(pool_PW, slots_T, torch.cat([k, v], 1).flatten(1), view.parts)
    return q.to(w.dtype)


def write_rows(pool_PW: Tensor, slots_T: Tensor, rows_TW: Tensor, parts: KVParts) -> None:
    stored = kv.encode(rows_TW, parts) if pool_PW.dtype == torch.uint8 else rows_TW.to(pool_PW.dtype)
    pool_PW[slots_T] = stored


def attend_encode(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax,
                  encoding: Encoding, scale: Tensor | None = None) -> Rows:  # fmt: skip
    y_THV = attend_paged(q_THK, pool_PW, batch, view, how.scale, how.window, how.sinks_H)
    return encode(y_THV.flatten(1), encoding, scale)


def store_latent(x_TX: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor, slots_T: Tensor) -> None:
    rank, turned = len(w.norm_R), 2 * angles[0].shape[1]
    latent_TR, key_TP = x_TX[:, w.column :].split((rank, turned), 1)
    key_T1P = rotate(key_TP[:, None], *angles, w.interleaved)
    row_TW = torch.cat([rms_norm(latent_TR, w.norm_R, w.eps), key_T1P[:, 0]], 1)
    write_rows(pool_PW, slots_T, row_TW, KVParts((rank,), turned))


def attend_latent(q_THK: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor,
                  batch: AttentionBatch) -> Tensor:  # fmt: skip
    nope, rank = w.w_k_HNR.shape[1:]
    absorbed = torch.einsum("thn,hnr->thr", wide(q_THK[..., :nope]), wide(w.w_k_HNR))
    q_THW = torch.cat([absorbed, wide(rotate(q_THK[..., nope:], *angles, w.interleaved))], -1)
    y_THR = attend_paged(q_THW, pool_PW, batch, KVView(1, q_THW.shape[2], 0, rank), w.scale)
    return torch.einsum("thr,hvr->thv", y_THR, wide(w.w_v_HVR)).to(q_THK.dtype)
