"""Multi-head latent attention: the plain path (prefill) and the absorbed path (decode over the latent cache).

The pool holds, per token, the normalised latent c (R elements) and the rotated shared key (P elements). With
kv_b = [W_k; W_v] per head:
    plain:     k = W_k c, v = W_v c per head, then ordinary attention: fewer operations for many queries;
    absorbed:  q' = W_k^T q, scores = q' . c + q_rope . k_rope, y = W_v (sum of weights times c): reads the latent only.
Both are the same number up to rounding (DeepSeek-V2, arXiv 2405.04434 section 2.1.2).
Letters: T tokens, L context, H heads, N nope size, P rope size, R latent rank, V value size, W = R + P pool row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import MLASpec
from moesaic.formats import kv
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import AttentionBatch, KVView, Latent
from moesaic.kernels.registry import Kernels
from moesaic.layers.linear import Linear, Norm, Sources, Taken
from moesaic.layers.step import LayerInput

SHORT = 128
"""Context up to which a prompt is read absorbed too where that is one fused op: it costs three times the products of
the plain path, but no handful of small operators per sequence (measured on two cores: even at about 150)."""


class MLA:
    """`one_path` uses the absorbed path for every row, so that a token's result does not depend on its phase."""

    def __init__(self, spec: MLASpec, layer: int, kernels: Kernels, like: Tensor, one_path: bool = False) -> None:
        self.spec, self.layer, self.ops, self.one_path = spec, layer, kernels.ops, one_path
        latent = (spec.q_a, spec.kv_a) if spec.q_a else (spec.kv_a,)
        self.down = Linear(latent, kernels, like)
        self.q_rank = spec.q_a.outputs if spec.q_a else 0
        eps = spec.latent_norm_eps
        ops = kernels.ops
        self.q_norm = Norm(spec.q_a_norm, self.q_rank, eps, ops, like) if spec.q_a_norm else None
        self.kv_norm = Norm(spec.kv_a_norm, spec.kv_rank, eps, ops, like)
        self.q_b, self.o = (Linear((part,), kernels, like) for part in (spec.q_b, spec.o))
        # The two paths contract it along different axes: a quantised one is decoded when loaded, never quantised again.
        self.kv_b = Linear((spec.kv_b,), kernels, like, plain=True)
        self.view = KVView(1, spec.kv_rank + spec.rope_dim, value_at=0, value_dim=spec.kv_rank)
        self.fused = hasattr(ops, "store_latent") and hasattr(ops, "attend_latent")
        self.sums = hasattr(ops, "add_norm_encode")
        self.latent = Latent(*self.halves(), self.kv_norm.weight_D, eps, spec.scale, spec.rope.interleaved, self.q_rank)

    @property
    def takes(self) -> Taken | None:
        return self.down.takes

    def __call__(self, x_TD: Tensor, at: LayerInput, rows: Rows | None = None) -> Tensor:
        """[T, D], or terms of that where norms add them up. rows: x encoded."""
        y_TX = self.attend(x_TD, at, rows).flatten(1)
        return self.o.terms(y_TX) if self.sums else self.o(y_TX)

    def attend(self, x_TD: Tensor, at: LayerInput, rows: Rows | None) -> Tensor:
        """[T, H, V]."""
        step, batch = at.step, at.step.attention
        if self.fused and (self.one_path or batch.decodes == len(batch.spans) or batch.longest <= SHORT):
            return self.in_place(x_TD, at, rows)
        q_nope_THN, q_rope_THP, row_TW = self.project(x_TD, at, rows)
        pool_PW = step.pool.write(self.layer, step.slots_T, row_TW, self.view.parts)
        if self.one_path or batch.decodes == len(batch.spans):
            return self.absorbed(q_nope_THN, q_rope_THP, pool_PW, batch)
        y_THV = x_TD.new_empty(len(x_TD), self.spec.heads, self.spec.v_dim)
        if count := batch.decodes:
            y_THV[:count] = self.absorbed(q_nope_THN[:count], q_rope_THP[:count], pool_PW, batch.decoding())
        for s in range(batch.decodes, len(batch.spans)):
            span = batch.spans[s]
            own = slice(span.start, span.start + span.count)
            context_LW = self.cached(pool_PW, batch.slots_SL[s, : span.length], x_TD.dtype)
            y_THV[own] = self.plain(q_nope_THN[own], q_rope_THP[own], context_LW)
        return y_THV

    def cached(self, pool_PW: Tensor, slots_L: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the cache as numbers [L, W]."""
        rows = pool_PW.index_select(0, slots_L)
        return kv.decode(rows, self.view.parts).to(dtype) if pool_PW.dtype == torch.uint8 else rows

    def in_place(self, x_TD: Tensor, at: LayerInput, rows: Rows | None) -> Tensor:
        """[T, H, V] by the fused ops."""
        step, angles, down = at.step, at.angles[self.spec.rope], self.down(x_TD, rows)
        q_THK, pool_PW = self.queries(x_TD, down, rows), step.pool.layers[self.layer]
        self.ops.store_latent(down, self.latent, angles, pool_PW, step.slots_T)
        return self.ops.attend_latent(q_THK, self.latent, angles, pool_PW, step.attention)

    def queries(self, x_TD: Tensor, down_TX: Tensor, rows: Rows | None) -> Tensor:
        """[T, H, N + P], from the hidden state or from its own latent."""
        if self.q_norm:
            x_TD, rows, _ = self.q_norm.encoded(down_TX[:, : self.q_rank], None, self.q_b.takes)
        return self.q_b(x_TD, rows).view(len(x_TD), self.spec.heads, -1)

    def project(self, x_TD: Tensor, at: LayerInput, rows: Rows | None) -> tuple[Tensor, Tensor, Tensor]:
        """x -> (q without position [T,H,N], rotated q [T,H,P], pool row [T,W])."""
        spec, (cos, sin) = self.spec, at.angles[self.spec.rope]
        down = self.down(x_TD, rows)
        q_THK = self.queries(x_TD, down, rows)
        latent_TR, key_TP = down[:, self.q_rank :].split((spec.kv_rank, spec.rope_dim), 1)
        interleaved = spec.rope.interleaved
        q_rope_THP = self.ops.rotate(q_THK[..., spec.nope_dim :], cos, sin, interleaved)
        key_T1P = self.ops.rotate(key_TP[:, None], cos, sin, interleaved)
        row_TW = torch.cat([self.kv_norm(latent_TR), key_T1P[:, 0]], 1)
        return q_THK[..., : spec.nope_dim], q_rope_THP, row_TW

    def halves(self) -> tuple[Tensor, Tensor]:
        """Views of kv_b: (W_k [H, N, R], W_v [H, V, R])."""
        spec = self.spec
        w_HXR = self.kv_b.weight_ND.view(spec.heads, spec.nope_dim + spec.v_dim, spec.kv_rank)
        return w_HXR[:, : spec.nope_dim], w_HXR[:, spec.nope_dim :]

    def absorbed(self, q_nope_THN: Tensor, q_rope_THP: Tensor, pool_PW: Tensor, batch: AttentionBatch) -> Tensor:
        """[T, H, V] for the rows of a batch."""
        w_k, w_v = self.halves()
        q_THW = torch.cat([self.per_head(q_nope_THN, w_k.transpose(1, 2)), q_rope_THP], -1)
        y_THR = self.ops.attend_paged(q_THW, pool_PW, batch, self.view, self.spec.scale)
        return self.per_head(y_THR, w_v)

    def per_head(self, x_THK: Tensor, w_HNK: Tensor) -> Tensor:
        """Each head's own product: x [T, H, K], w [H, N, K] -> [T, H, N]."""
        if self.one_path:
            return torch.stack([self.ops.linear(x_THK[:, h], w_HNK[h]) for h in range(len(w_HNK))], 1)
        return torch.bmm(x_THK.transpose(0, 1), w_HNK.transpose(1, 2)).transpose(0, 1)

    def plain(self, q_nope_THN: Tensor, q_rope_THP: Tensor, context_LW: Tensor) -> Tensor:
        """[T, H, V] for one sequence, whose last T of L context rows are the queries' own."""
        spec = self.spec
        latent_LR, key_LP = context_LW.split((spec.kv_rank, spec.rope_dim), 1)
        kv_LHX = self.kv_b(latent_LR).view(len(latent_LR), spec.heads, -1)
        k_nope, v_LHV = kv_LHX.split((spec.nope_dim, spec.v_dim), -1)
        key_LHP = key_LP[:, None].expand(-1, spec.heads, -1)
        k_LHK, q_THK = torch.cat([k_nope, key_LHP], -1), torch.cat([q_nope_THN, q_rope_THP], -1)
        return self.ops.attend_dense(q_THK, k_LHK, v_LHV, spec.scale)

    def sources(self) -> Sources:
        for part in (self.down, self.q_norm, self.q_b, self.kv_norm, self.kv_b, self.o):
            if part is not None:
                yield from part.sources()
