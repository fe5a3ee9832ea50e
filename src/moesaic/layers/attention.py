"""Grouped-query attention over the paged pool.

Letters: T tokens, H query heads, G kv heads, K head size, W pool row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import GQASpec
from moesaic.kernels.ops import KVView
from moesaic.kernels.registry import Kernels
from moesaic.layers.linear import Linear, Norm, Sources
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

    def __call__(self, x_TD: Tensor, at: LayerInput) -> Tensor:
        spec, step = self.spec, at.step
        heads = self.qkv(x_TD).view(len(x_TD), -1, spec.head_dim)
        q_THK, k_TGK, v_TGK = heads.split((spec.heads, spec.kv_heads, spec.kv_heads), 1)
        if self.q_norm:
            q_THK = self.q_norm(q_THK)
        if self.k_norm:
            k_TGK = self.k_norm(k_TGK)
        q_THK, k_TGK = self.turn(q_THK, at), self.turn(k_TGK, at)
        pool_PW = step.pool.write(self.layer, step.slots_T, torch.cat([k_TGK, v_TGK], 1).flatten(1))
        how = (spec.scale, spec.window, self.sinks_H)
        return self.o(self.ops.attend_paged(q_THK, pool_PW, step.attention, self.view, *how).flatten(1))

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
