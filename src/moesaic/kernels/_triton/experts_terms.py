"""The experts' results, left for the norm behind them to weight and add up (add_norm_encode.py): a launch less."""

from __future__ import annotations

from torch import Tensor

from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.experts import expert_rows
from moesaic.kernels.ops import ExpertTerms, ExpertWeights


def experts_terms(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> ExpertTerms:
    ids, weights = ids_TA.contiguous(), weights_TA.contiguous()
    y = expert_rows(x, w, ids) if ids.numel() else x.data.new_empty(0, w.w2.shape[-2], dtype=x.dtype)
    return ExpertTerms(y, ids, weights)
