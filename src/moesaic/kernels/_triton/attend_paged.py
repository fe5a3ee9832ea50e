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
    for s in range(batch.decodes, len(batch.spans)):
        span = batch.spans[s]
        if span.count:
            prefill(q, heads, (span.start, span.count, span.length), batch.slots_SL[s], how, out)
    return out


def decode(q: Tensor, kv: Heads, batch: AttentionBatch, how: Softmax, out: Tensor) -> None:
    """Rows 0..decodes, one sequence each."""
    sequences, heads = batch.decodes, q.shape[1]
    repeat, longest = heads // kv.kv_heads, batch.slots_SL.shape[1]
    sizes = kv.widths()
    height = min(max(power(repeat), 16), 32 if kv.key_dim > 256 else 64)
    block = 32 if kv.key_dim > 256 else 64
    programs = sequences * kv.kv_heads * cdiv(repeat, height)
    splits = max(1, min(PROGRAMS // programs, cdiv(longest, 4 * block), MOST_SPLITS))
    target, lse = out, None
    if splits > 1:
        target = out.new_empty(sequences, heads, splits, kv.value_dim, dtype=torch.float32)
        lse = out.new_empty(sequences, heads, splits, dtype=torch.float32)
    attention_kernel[(1, kv.kv_heads * cdiv(repeat, height), sequences * splits)](
        q, q.stride(0), q.stride(1), kv.k, *kv.k_strides, kv.v, *kv.v_strides, batch.slots_SL,
        batch.slots_SL.stride(0), batch.lengths_S, how.sinks_H, target, lse, 0, 1, 0, how.scale, heads, R=repeat,
        WINDOW=how.window or 0, RB=height, BM=height, BL=block, SPLITS=splits, DECODE=True,
        num_warps=8 if kv.key_dim > 256 else 4, num_stages=2 if kv.key_dim > 256 else 3, **sizes,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(sequences * heads,)](
            target, lse, how.sinks_H, out, heads, V=kv.value_dim, BV=sizes["BV"], SPLITS=splits, BS=power(splits),
            num_warps=4,
        )  # fmt: skip


def prefill(q: Tensor, kv: Heads, span: tuple[int, int, int], slots_L: Tensor | None, how: Softmax,
            out: Tensor) -> None:  # fmt: skip
    """Rows start..start + count, the last positions of a context of `length`."""
    start, count, length = span
    heads = q.shape[1]
    repeat = heads // kv.kv_heads
    wide = kv.key_dim > 256
    height = min(32 if wide else 128, max(16, power(count * repeat)))
    group = min(power(repeat), height)
    attention_kernel[(cdiv(count, height // group), kv.kv_heads * cdiv(repeat, group), 1)](
        q, q.stride(0), q.stride(1), kv.k, *kv.k_strides, kv.v, *kv.v_strides, slots_L, 0, None, how.sinks_H, out,
        None, start, count, length, how.scale, heads, R=repeat, WINDOW=how.window or 0, RB=group, BM=height,
        BL=32 if wide else 64, SPLITS=1, DECODE=False, num_warps=8 if height >= 128 or wide else 4,
        num_stages=2, **kv.widths(),
    )  # fmt: skip
