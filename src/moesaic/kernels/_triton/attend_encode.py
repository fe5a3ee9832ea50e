"""Attention whose rows are multiplied next in an encoding: that comes out where parts of the context are joined."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.attend_paged import Heads, Target, attend_paged, decode, joins
from moesaic.kernels._triton.emit import emits, parts_for, rows_of
from moesaic.kernels._triton.encode import encode
from moesaic.kernels.ops import AttentionBatch, KVView, Softmax


def attend_encode(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax,
                  encoding: Encoding, scale: Tensor | None = None) -> Rows:  # fmt: skip
    tokens, heads = q_THK.shape[:2]
    alone = batch.decodes == len(batch.spans) and encoding.name != "bf16"
    if not (alone and emits(encoding) and joins(encoding, heads, view.value_dim)):
        y_THV = attend_paged(q_THK, pool_PW, batch, view, how.scale, how.window, how.sinks_H)
        return encode(y_THV.flatten(1), encoding, scale)
    q = q_THK if q_THK.stride(-1) == 1 else q_THK.contiguous()
    out = torch.empty(tokens, heads, view.value_dim, dtype=q.dtype, device=q.device)
    parts = parts_for(encoding, tokens, heads * view.value_dim, q, scale)
    decode(q, Heads.of(pool_PW, view), batch, how, Target(out, encoding, parts))
    return rows_of(encoding, parts, out)
