"""Attention of one sequence given its keys and values: the paged kernel, with positions in place of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels._triton.attend_paged import Heads, Tables, prefill
from moesaic.kernels.ops import Softmax


def attend_dense(q_THK: Tensor, k_LHK: Tensor, v_LHV: Tensor, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THK, k_LHK, v_LHV))
    heads = Heads(k, v, (k.stride(0), k.stride(1)), (v.stride(0), v.stride(1)), k.shape[1], k.shape[2], v.shape[2])
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    if len(q):
        prefill(q, heads, Tables(None, 1, None, 1, len(q), len(k)), Softmax(scale, window, sinks_H), out)
    return out
