"""Attention over the paged pool: all decoding sequences in one launch, each prompt in one. Letters as in ops.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels._triton.attention import attention_kernel, merge_kernel
from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels.ops import AttentionBatch, KVView

PROGRAMS = 264
MOST_SPLITS = 32


@dataclass(frozen=True)
class Heads:
    """Keys and values as pointers with strides, and the sizes that a kernel is compiled for."""

    k: Tensor
    v: Tensor
    k_strides: tuple[int, int]
    v_strides: tuple[int, int]
    kv_heads: int
    key_dim: int
    value_dim: int

    def widths(self) -> dict[str, int | bool]:
        """The key in two pieces of power-of-two width; the value is shared where it is the first of them."""
        first = 1 << (self.key_dim.bit_length() - 1)
        rest = self.key_dim - first
        shared = self.k.data_ptr() == self.v.data_ptr() and self.kv_heads == 1 and self.value_dim == first
        return {
            "K": self.key_dim, "V": self.value_dim, "D1": max(first, 16), "D2": power(rest, 16) if rest else 0,
            "BV": first if shared and first >= 16 else power(self.value_dim, 16), "SHARED": shared and first >= 16,
        }  # fmt: skip


@dataclass(frozen=True)
class Spans:
    """How many sequences, the most rows of one, and (start, count, length) of each on the device; or, of a single one
    whose rows start at 0, its length."""

    sequences: int
    longest: int
    spans_S3: Tensor | None
    length: int = 0


@dataclass(frozen=True)
class Softmax:
    scale: float
    window: int | None
    sinks_H: Tensor | None


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    q = q_THK if q_THK.stride(-1) == 1 else q_THK.contiguous()
    width = pool_PW.stride(0)
    heads = Heads(pool_PW, pool_PW[:, view.value_at :], (width, view.key_dim), (width, view.value_dim), view.kv_heads,
                  view.key_dim, view.value_dim)  # fmt: skip
    how = Softmax(scale, window, sinks_H)
    out = torch.empty(*q.shape[:2], view.value_dim, dtype=q.dtype, device=q.device)
    if batch.decodes:
        decode(q, heads, batch, how, out)
    prompts = batch.spans[batch.decodes :]
    if prompts:
        span = Spans(len(prompts), max(each.count for each in prompts), batch.spans_S3[batch.decodes :])
        prefill(q, heads, span, batch.slots_SL[batch.decodes :], how, out)
    return out


def decode(q: Tensor, kv: Heads, batch: AttentionBatch, how: Softmax, out: Tensor) -> None:
    """The first `decodes` sequences, one row each."""
    sequences, heads = batch.decodes, q.shape[1]
    repeat, longest = heads // kv.kv_heads, batch.slots_SL.shape[1]
    sizes, wide = kv.widths(), kv.key_dim > 256
    height = min(max(power(repeat), 16), 32 if wide else 64)
    block = 32 if wide else 64
    programs = sequences * kv.kv_heads * cdiv(repeat, height)
    splits = max(1, min(PROGRAMS // programs, cdiv(longest, 4 * block), MOST_SPLITS))
    target, lse = out, None
    if splits > 1:
        target = out.new_empty(sequences, heads, splits, kv.value_dim, dtype=torch.float32)
        lse = out.new_empty(sequences, heads, splits, dtype=torch.float32)
    attention_kernel[(1, kv.kv_heads * cdiv(repeat, height), sequences * splits)](
        q, q.stride(0), q.stride(1), kv.k, *kv.k_strides, kv.v, *kv.v_strides, batch.slots_SL,
        batch.slots_SL.stride(0), batch.spans_S3, how.sinks_H, target, lse, 0, 1, 0, how.scale, heads, R=repeat,
        WINDOW=how.window or 0, RB=height, BM=height, BL=block, SPLITS=splits, num_warps=8 if wide else 4,
        num_stages=2 if wide else 3, **sizes,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(sequences * heads,)](
            target, lse, how.sinks_H, out, heads, V=kv.value_dim, BV=sizes["BV"], SPLITS=splits, BS=power(splits),
            num_warps=4,
        )  # fmt: skip


def prefill(q: Tensor, kv: Heads, spans: Spans, slots_SL: Tensor | None, how: Softmax, out: Tensor) -> None:
    """Sequences of several rows each, the last positions of their contexts."""
    heads = q.shape[1]
    repeat, wide = heads // kv.kv_heads, kv.key_dim > 256
    height = min(32 if wide else 128, max(16, power(spans.longest * repeat)))
    group = min(power(repeat), height)
    attention_kernel[(cdiv(spans.longest, height // group), kv.kv_heads * cdiv(repeat, group), spans.sequences)](
        q, q.stride(0), q.stride(1), kv.k, *kv.k_strides, kv.v, *kv.v_strides, slots_SL,
        0 if slots_SL is None else slots_SL.stride(0), spans.spans_S3, how.sinks_H, out, None, 0, spans.longest,
        spans.length, how.scale, heads, R=repeat, WINDOW=how.window or 0, RB=group, BM=height, BL=32 if wide else 64,
        SPLITS=1, num_warps=8 if height >= 128 or wide else 4, num_stages=2, **kv.widths(),
    )  # fmt: skip
