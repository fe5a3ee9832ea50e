"""Attention over the paged pool on Hopper: sequences that decode by attend_decode.cu, prompts by attend_prompt.cu.

What the CUDA C++ kernels do not have (latents, other sizes) is Triton's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.formats.encodings import Rows
from moesaic.kernels import triton
from moesaic.kernels._hopper.attend_decode import Target, decode, encodes, serves
from moesaic.kernels._hopper.attend_prompt import prefill
from moesaic.kernels._triton.attend_paged import Heads, Tables
from moesaic.kernels._triton.emit import parts_for, rows_of
from moesaic.kernels.ops import AttentionBatch, KVView, Softmax


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax) -> Tensor:
    if not serves(q_THK, pool_PW, view):
        theirs: Tensor = triton.attend_paged(q_THK, pool_PW, batch, view, how.scale, how.window, how.sinks_H)
        return theirs
    out = q_THK.new_empty(*q_THK.shape[:2], view.value_dim)
    if batch.decodes:
        decode(q_THK, pool_PW, batch.decoding(), view, how, Target(out))
    if batch.decodes < len(batch.spans):
        q = q_THK if q_THK.stride(-1) == 1 else q_THK.contiguous()
        prefill(q, Heads.of(pool_PW, view), Tables.of(batch.prompts()), how, out)
    return out


def attend_encode(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax,
                  encoding: Encoding, scale: Tensor | None = None) -> Rows:  # fmt: skip
    """Rows that need other heads for their scales are encoded apart."""
    alone = batch.decodes == len(batch.spans)
    if not (alone and encodes(encoding, view) and serves(q_THK, pool_PW, view)):
        y_THV = attend_paged(q_THK, pool_PW, batch, view, how)
        rows: Rows = triton.encode(y_THV.flatten(1), encoding, scale)
        return rows
    tokens, heads = q_THK.shape[:2]
    out = torch.empty(tokens, heads, view.value_dim, dtype=q_THK.dtype, device=q_THK.device)
    plain = encoding.name == "bf16"
    parts = {} if plain else parts_for(encoding, tokens, heads * view.value_dim, q_THK, scale)
    decode(q_THK, pool_PW, batch, view, how, Target(out, encoding, parts))
    return rows_of(encoding, parts, out.flatten(1) if plain else out)
