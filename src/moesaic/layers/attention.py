"""Grouped-query attention over the paged pool.

Letters: T tokens, H query heads, G kv heads, K head size, W pool row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import GQASpec
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import HeadNorms, KVView, Softmax
from moesaic.kernels.registry import Kernels
from moesaic.layers.linear import Linear, Norm, Sources, Taken
from moesaic.layers.step import LayerInput


class GQA:
    """One product for q, k and v; optional per-head norms; rope; write; attend; output projection."""

    def __init__(self, spec: GQASpec, eps: float, layer: int, kernels: Kernels, like: Tensor) -> None:
        """layer: index of this layer's table in the KV pool. eps: of the per-head norms."""
        self.spec, self.layer = spec, layer
        ops = self.ops = kernels.under(sinks=True) if spec.sinks else kernels.ops
        self.qkv = Linear((spec.q, spec.k, spec.v), kernels, like)
        self.o = Linear((spec.o,), kernels, like)
        self.q_norm = Norm(spec.q_norm, spec.head_dim, eps, ops, like) if spec.q_norm else None
        self.k_norm = Norm(spec.k_norm, spec.head_dim, eps, ops, like) if spec.k_norm else None
        self.sinks_H = like.new_empty(spec.heads, dtype=torch.float32) if spec.sinks else None
        keys = spec.kv_heads * spec.head_dim
        self.view = KVView(spec.kv_heads, spec.head_dim, value_at=keys, value_dim=spec.head_dim)
        q_K, k_K = (norm.weight_D if norm else None for norm in (self.q_norm, self.k_norm))
        self.norms = HeadNorms(q_K, k_K, eps, spec.rope.interleaved, like.dtype)
        self.fused, self.sums = hasattr(ops, "store_heads"), hasattr(ops, "add_norm_encode")

    @property
    def takes(self) -> Taken | None:
        return self.qkv.takes

    def __call__(self, x_TD: Tensor, at: LayerInput, rows: Rows | None = None) -> Tensor:
        """[T, D], or terms of that where norms add them up. rows: x encoded."""
        step, how = at.step, Softmax(self.spec.scale, self.spec.window, self.sinks_H)
        q_THK, takes = self.store(x_TD, at, rows), self.o.takes
        pool_PW = step.pool.layers[self.layer]
        if takes is not None and takes[0].by_row and hasattr(self.ops, "attend_encode"):
            encoded = self.ops.attend_encode(q_THK, pool_PW, step.attention, self.view, how, *takes)
            return self.o.terms(None, encoded)
        y_THK = self.ops.attend_paged(q_THK, pool_PW, step.attention, self.view, how.scale, how.window, how.sinks_H)
        return self.o.terms(y_THK.flatten(1)) if self.sums else self.o(y_THK.flatten(1))

    def store(self, x_TD: Tensor, at: LayerInput, rows: Rows | None) -> Tensor:
        """Writes keys and values; returns queries [T, H, K]."""
        spec, step = self.spec, at.step
        if self.fused:
            terms, pool_PW = self.qkv.terms(x_TD, rows), step.pool.layers[self.layer]
            return self.ops.store_heads(terms, self.norms, at.angles[spec.rope], pool_PW, step.slots_T, self.view)
        heads = self.qkv(x_TD, rows).view(len(x_TD), -1, spec.head_dim)
        q_THK, k_TGK, v_TGK = heads.split((spec.heads, spec.kv_heads, spec.kv_heads), 1)
        if self.q_norm:
            q_THK = self.q_norm(q_THK)
        if self.k_norm:
            k_TGK = self.k_norm(k_TGK)
        q_THK, k_TGK = self.turn(q_THK, at), self.turn(k_TGK, at)
        step.pool.write(self.layer, step.slots_T, torch.cat([k_TGK, v_TGK], 1).flatten(1), self.view.parts)
        return q_THK

    def turn(self, x_THK: Tensor, at: LayerInput) -> Tensor:
        """Rotates the first rope.dim elements of each head; the rest pass through."""
        rope = self.spec.rope
        cos, sin = at.angles[rope]
        if rope.dim == x_THK.shape[-1]:
            return self.ops.rotate(x_THK, cos, sin, rope.interleaved)
        turned = self.ops.rotate(x_THK[..., : rope.dim], cos, sin, rope.interleaved)
        return torch.cat([turned, x_THK[..., rope.dim :]], -1)

    def sources(self) -> Sources:
        for part in (self.qkv, self.o, self.q_norm, self.k_norm):
            if part is not None:
                yield from part.sources()
        if self.spec.sinks and self.sinks_H is not None:
            yield self.spec.sinks, self.sinks_H
