"""What comes out of each op, by shape and dtype alone: the fake kernels of `traced.py`.

The first argument is the backend, the others are the op's own, their tensors without memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.contracts.spec import Activation, RouterSpec
from moesaic.formats import encodings
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import AttentionBatch, ExpertTerms, ExpertWeights, HeadNorms, KVView, Latent, Softmax

ON_GPU = ("triton", "triton_invariant", "hopper")
"""Backends whose encoded rows are Triton's (`_triton/encode.py`)."""
FAKES: dict[str, Callable[..., Any]] = {}
"""Op -> its fake."""


def fake(function: Callable[..., Any]) -> Callable[..., Any]:
    FAKES[function.__name__] = function
    return function


@fake
def linear(backend: str, x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return x_TD.new_empty(*x_TD.shape[:-1], w_ND.shape[0])


@fake
def encode(backend: str, x_TD: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
    if encoding.name == "bf16":
        return Rows(encoding, {"data": x_TD}, x_TD.dtype)
    if backend not in ON_GPU:
        return encodings.encode(x_TD, encoding, scale)
    from moesaic.kernels._triton.emit import parts_for

    lead, size = x_TD.shape[:-1], x_TD.shape[-1]
    if encoding.name == "fp8_tensor" and scale is None:
        scale = x_TD.new_empty((), dtype=torch.float32)
    parts = parts_for(encoding, lead.numel(), size, x_TD, scale)
    shaped = {name: part.view(*lead, part.shape[-1]) if part.dim() else part for name, part in parts.items()}
    return Rows(encoding, shaped, x_TD.dtype)


@fake
def linear_quant(backend: str, x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    return x.data.new_empty(*x.data.shape[:-1], w.shape[-2], dtype=x.dtype)


@fake
def linear_terms(backend: str, x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    from moesaic.kernels._hopper import dense
    from moesaic.kernels._triton.linear_quant import parts_of
    from moesaic.kernels._triton.linear_terms import WAVES

    fixed, rows = backend == "triton_invariant", x.data.shape[:-1].numel()
    parts, how = 1, dense.cut_of(x, w, bias_N) if backend == "hopper" else None
    if how is not None:
        parts = how.parts
    elif backend != "hopper" or dense.many_cut(x, w, bias_N) is None:
        parts = parts_of(x, w, 1 if fixed else WAVES, fixed)
    return x.data.new_empty(parts, rows, w.shape[-2], dtype=x.dtype if parts == 1 else torch.float32)


@fake
def rms_norm(backend: str, x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


@fake
def add_rms_norm(backend: str, x_TD: Tensor, residual_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape)


@fake
def add_norm_encode(backend: str, x: Tensor | ExpertTerms, residual_TD: Tensor | None, w_D: Tensor, eps: float,
                    encoding: Encoding,
                    scale: Tensor | None = None) -> tuple[Tensor, Rows, Tensor]:  # fmt: skip
    tokens = len(x.ids_TA) if isinstance(x, ExpertTerms) else x.shape[-2]
    y_TD, total_TD = (w_D.new_empty(tokens, w_D.shape[0]) for _ in range(2))
    return y_TD, encode(backend, y_TD, encoding, scale), total_TD


@fake
def rotate(backend: str, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
    return x_THD.new_empty(x_THD.shape)


@fake
def activate(backend: str, gate_up_TI: Tensor, activation: Activation) -> Tensor:
    return gate_up_TI.new_empty(*gate_up_TI.shape[:-1], gate_up_TI.shape[-1] // 2)


@fake
def route(backend: str, logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    shape = (logits_TE.shape[0], spec.top_k)
    return logits_TE.new_empty(shape, dtype=torch.int32), logits_TE.new_empty(shape, dtype=torch.float32)


@fake
def gate(backend: str, x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, bias_E: Tensor | None,
         spec: RouterSpec, *more: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    return route(backend, x_TD, bias_E, spec)  # type: ignore[no-any-return]


@fake
def top_two(backend: str, scores_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    new, rows = scores_RV.new_empty, scores_RV.shape[0]
    return new(rows, dtype=torch.int64), new(rows, dtype=torch.float32), new(rows, dtype=torch.float32)


@fake
def experts(backend: str, x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    return x.data.new_empty(ids_TA.shape[0], w.w2.shape[-2], dtype=x.dtype)


@fake
def experts_terms(backend: str, x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> ExpertTerms:
    y_RD = x.data.new_empty(ids_TA.shape[0] * ids_TA.shape[1], w.w2.shape[-2], dtype=x.dtype)
    return ExpertTerms(y_RD, ids_TA, weights_TA)


@fake
def mlp(backend: str, x_TD: Tensor, w13_ID: Tensor, w2_DI: Tensor, activation: Activation,
        onto_TD: Tensor | None = None) -> Tensor:  # fmt: skip
    return x_TD.new_empty(x_TD.shape)


@fake
def attend_paged(backend: str, q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView,
                 *how: Any) -> Tensor:  # fmt: skip
    return q_THK.new_empty(*q_THK.shape[:2], view.value_dim)


@fake
def attend_encode(backend: str, q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax,
                  encoding: Encoding, scale: Tensor | None = None) -> Rows:  # fmt: skip
    y_TX = q_THK.new_empty(q_THK.shape[0], q_THK.shape[1] * view.value_dim)
    return encode(backend, y_TX, encoding, scale)  # type: ignore[no-any-return]


@fake
def attend_dense(backend: str, q_THK: Tensor, k_LHK: Tensor, v_LHV: Tensor, *how: Any) -> Tensor:
    return q_THK.new_empty(*q_THK.shape[:2], v_LHV.shape[-1])


@fake
def store_heads(backend: str, x_PTX: Tensor, w: HeadNorms, angles: tuple[Tensor, Tensor], pool_PW: Tensor,
                slots_T: Tensor, view: KVView) -> Tensor:  # fmt: skip
    heads = x_PTX.shape[2] // view.key_dim - 2 * view.kv_heads
    return x_PTX.new_empty(x_PTX.shape[1], heads, view.key_dim, dtype=w.dtype)


@fake
def store_latent(backend: str, x_TX: Tensor, *rest: Any) -> None:
    return None


@fake
def attend_latent(backend: str, q_THK: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor,
                  batch: AttentionBatch) -> Tensor:  # fmt: skip
    return q_THK.new_empty(*q_THK.shape[:2], w.w_v_HVR.shape[1])
