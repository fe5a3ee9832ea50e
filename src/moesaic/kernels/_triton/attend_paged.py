"""Attention over the paged pool: all decoding sequences in one launch, all prompts in one. Letters as in ops.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.errors import UnsupportedError
from moesaic.kernels._triton.attention import attention_kernel, merge_kernel
from moesaic.kernels._triton.emit import GROUPS, emitting
from moesaic.kernels._triton.launch import cdiv, power
from moesaic.kernels._triton.pdl import options
from moesaic.kernels.ops import AttentionBatch, KVView, Softmax

PROGRAMS = 264
MOST_SPLITS = 32
PLAIN = Encoding("bf16")


@dataclass(frozen=True)
class Heads:
    """Keys and values as pointers with strides, and the sizes that a kernel is compiled for.

    exponents_at: where those of an FP8 cache begin in a row of bytes, or None.
    """

    k: Tensor
    v: Tensor
    k_strides: tuple[int, int]
    v_strides: tuple[int, int]
    kv_heads: int
    key_dim: int
    value_dim: int
    exponents_at: int | None = None

    @staticmethod
    def of(pool_PW: Tensor, view: KVView) -> Heads:
        width, fp8 = pool_PW.stride(0), pool_PW.dtype == torch.uint8
        if fp8 and view.latent and view.value_dim & (view.value_dim - 1):
            raise UnsupportedError(f"no kernel reads latents of {view.value_dim} elements in FP8",
                                   remedy="Use --kv bf16.")  # fmt: skip
        codes = pool_PW.view(torch.float8_e4m3fn) if fp8 else pool_PW
        return Heads(codes, codes[:, view.value_at :], (width, view.key_dim), (width, view.value_dim), view.kv_heads,
                     view.key_dim, view.value_dim, view.parts.exponents_at if fp8 else None)  # fmt: skip

    @property
    def wide(self) -> bool:
        """Whether few rows at a time fill the registers."""
        return self.key_dim > 256

    def arguments(self) -> dict[str, Any]:
        """The key in two pieces of power-of-two width; the value is shared where it is the first of them."""
        first = 1 << (self.key_dim.bit_length() - 1)
        rest = self.key_dim - first
        shared = self.k.data_ptr() == self.v.data_ptr() and self.kv_heads == 1 and self.value_dim == first
        shared = shared and first >= 16
        (k_token, k_head), (v_token, v_head), fp8 = self.k_strides, self.v_strides, self.exponents_at is not None
        return {
            "k_ptr": self.k, "k_token": k_token, "k_head": k_head, "v_ptr": self.v, "v_token": v_token,
            "v_head": v_head, "bytes_ptr": self.k.view(torch.uint8) if fp8 else None,
            "tail_ptr": self.k.view(torch.bfloat16) if fp8 and shared and rest else None,
            "exponents_at": self.exponents_at or 0, "FP8": fp8, "K": self.key_dim, "V": self.value_dim,
            "D1": max(first, 16), "D2": power(rest, 16) if rest else 0,
            "BV": first if shared else power(self.value_dim, 16), "SHARED": shared,
        }  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """Blocks per position, and (start, count, length) of each sequence on the device; both None for a single sequence
    whose rows start at 0 and whose positions are slots.  longest: most rows of one.  length: of that single one."""

    table_SB: Tensor | None
    block: int
    spans_S3: Tensor | None
    sequences: int
    longest: int
    length: int = 0

    @staticmethod
    def of(batch: AttentionBatch) -> Tables:
        longest = max(span.count for span in batch.spans)
        return Tables(batch.table_SB, batch.block, batch.spans_S3, len(batch.spans), longest)

    def arguments(self) -> dict[str, Any]:
        return {
            "table_ptr": self.table_SB, "table_stride": 0 if self.table_SB is None else self.table_SB.stride(0),
            "spans_ptr": self.spans_S3, "start": 0, "count": self.longest, "length": self.length, "BLOCK": self.block,
        }  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Where results go: rows in the model's dtype, and, where they are encoded, the parts of that."""

    out: Tensor
    encoding: Encoding = PLAIN
    parts: dict[str, Tensor] | None = None


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    q = q_THK if q_THK.stride(-1) == 1 else q_THK.contiguous()
    heads, how = Heads.of(pool_PW, view), Softmax(scale, window, sinks_H)
    out = torch.empty(*q.shape[:2], view.value_dim, dtype=q.dtype, device=q.device)
    if batch.decodes:
        decode(q, heads, batch.decoding(), how, Target(out[: batch.decodes]))
    if batch.decodes < len(batch.spans):
        prefill(q, heads, Tables.of(batch.prompts()), how, out)
    return out


def decode(q: Tensor, kv: Heads, batch: AttentionBatch, how: Softmax, target: Target) -> None:
    """Sequences of one row each."""
    sequences, heads = len(batch.spans), q.shape[1]
    repeat = heads // kv.kv_heads
    tile = decode_tile(kv, repeat)
    programs = sequences * kv.kv_heads * cdiv(repeat, tile["RB"])
    splits = max(1, min(PROGRAMS // programs, cdiv(batch.longest, 2 * tile["BL"]), MOST_SPLITS))
    if splits == 1 and target.encoding == PLAIN:
        attend(q, kv, Tables.of(batch), how, tile, target.out)
    else:
        in_parts(q, kv, Tables.of(batch), how, tile, splits, target)


def decode_tile(kv: Heads, repeat: int) -> dict[str, int]:
    """Five stages are two buffers of keys: the first ones hold entries of the table."""
    height = min(max(power(repeat), 16), 32 if kv.wide else 64)
    block, warps = (32, 8) if kv.wide else (64, 4)
    return {"RB": height, "BM": height, "BL": block, "num_warps": warps, "num_stages": 5}


def prefill_tile(kv: Heads, repeat: int, longest: int) -> dict[str, int]:
    height = min(32 if kv.wide else 128, max(16, power(longest * repeat)))
    warps = 8 if height >= 128 or kv.wide else 4
    return {"RB": min(power(repeat), height), "BM": height, "BL": 32 if kv.wide else 64, "num_warps": warps,
            "num_stages": 2}  # fmt: skip


def in_parts(q: Tensor, kv: Heads, tables: Tables, how: Softmax, tile: dict[str, int], splits: int, target: Target,
             chunk: int = 0) -> None:  # fmt: skip
    """Contexts shared out over programs, then joined. The sequences' rows are those of the target, in order."""
    rows, heads = len(target.out), q.shape[1]
    part = q.new_empty(rows, heads, splits, kv.value_dim, dtype=torch.float32)
    lse = q.new_empty(rows, heads, splits, dtype=torch.float32)
    attend(q, kv, tables, how, tile, part, lse, chunk)
    merge(part, lse, how, target)


def attend(q: Tensor, kv: Heads, tables: Tables, how: Softmax, tile: dict[str, int], out: Tensor,
           lse: Tensor | None = None, chunk: int = 0) -> None:  # fmt: skip
    """lse: of parts of the context [T, H, splits], where it is shared out; `out` then holds the parts."""
    heads, splits = q.shape[1], 1 if lse is None else lse.shape[2]
    repeat = heads // kv.kv_heads
    queries, blocks = cdiv(tables.longest, tile["BM"] // tile["RB"]), cdiv(repeat, tile["RB"])
    attention_kernel[(queries, kv.kv_heads * blocks, tables.sequences * splits)](
        q, q.stride(0), q.stride(1), sinks_ptr=how.sinks_H, out_ptr=out, lse_ptr=lse, splits=splits, scale=how.scale,
        heads=heads, R=repeat, WINDOW=how.window or 0, SPLIT=lse is not None, CHUNK=chunk, **tile, **kv.arguments(),
        **tables.arguments(), **options(q.device),
    )  # fmt: skip


def merge(part: Tensor, lse: Tensor, how: Softmax, target: Target) -> None:
    """Joins parts [T, H, splits, V] into rows, and encodes them where the target asks for it (see `joins`)."""
    tokens, heads, splits, size = part.shape
    wide, encoding = power(size, 16), target.encoding
    step = GROUPS[encoding.name]
    whole = encoding.name == "fp8_token" or (encoding.name == "nvfp4" and not encoding.static)
    count = power(heads) if whole else max(1, step // size, 1024 // wide)
    count = min(count, power(heads))
    given = emitting(encoding, target.parts or {}, heads * size, max(1, count * size // step))
    merge_kernel[(tokens, cdiv(heads, count))](
        part, lse, how.sinks_H, target.out, splits, HEADS=heads, V=size, BH=count, BV=wide,
        num_warps=min(16, max(1, count * wide // 256)), **given, **options(part.device),
    )  # fmt: skip


def joins(encoding: Encoding, heads: int, size: int) -> bool:
    """Whether rows of so many heads can be encoded where parts of the context are joined: groups are whole heads, or
    heads whole groups, and tiles are full."""
    step = GROUPS[encoding.name]
    full = size >= 16 and size & (size - 1) == 0 and heads & (heads - 1) == 0
    return full and (size % step == 0 or step % size == 0) and heads * size % step == 0


def prefill(q: Tensor, kv: Heads, tables: Tables, how: Softmax, out: Tensor) -> None:
    """Sequences of several rows each, the last positions of their contexts."""
    attend(q, kv, tables, how, prefill_tile(kv, q.shape[1] // kv.kv_heads, tables.longest), out)
