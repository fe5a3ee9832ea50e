"""The native CPU backend: each op is one call into C++ (`_native/`), for the small batches of decoding.

A step of a small model on torch is hundreds of operators of a few microseconds each; here it is about a dozen calls per
layer. Products are made for few rows and read weights as they are stored. Threads are torch's own team. Optional: where
no C++ compiler is found, the probe says so and `cpu` serves. Shape letters as in `ops.py`.

A call passes one packed struct; its layout is the `...Args` of the same name in `_native/`. Tensors that are packed by
address are held by the caller's names until the call returns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from struct import Struct
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.contracts.contract import FLOATS16, Contract, path_of
from moesaic.contracts.spec import Activation, RouterSpec
from moesaic.errors import UnsupportedError
from moesaic.formats.encodings import Rows
from moesaic.kernels._native import library
from moesaic.kernels.ops import AttentionBatch, ExpertWeights, KVView, Latent
from moesaic.kernels.reference_fused import settle_choices

FUSED = ("mlp", "gate", "store_latent", "attend_latent")
OPS = ("linear", "rms_norm", "add_rms_norm", "rotate", "activate", "route", "experts", "attend_paged", *FUSED)
CONTRACTS = tuple(
    Contract(op, "cpu_native", frozenset({"cpu"}), frozenset({"float32", "bfloat16"}), batch_invariant=False, rank=5,
             activations=frozenset({"silu", "swiglu_oai"}), expert_bias=True, sinks=True, path=path_of(op),
             logits=frozenset({"float32"}) if op == "gate" else FLOATS16)
    for op in OPS
)  # fmt: skip
TAPED = frozenset(OPS)
MANY = 256
"""Rows from which oneDNN and MKL, which block for the caches, are at least as fast (measured)."""
SCORINGS = {"sigmoid": 0, "softmax": 1, "softmax_topk": 2}
ACTIVATIONS = {"silu": 0, "swiglu_oai": 1}
SIZE = {torch.float32: 4, torch.bfloat16: 2}
INT32, FLOAT32 = torch.empty(0, dtype=torch.int32), torch.empty(0)
threads = torch.get_num_threads

Call = Callable[[bytes], None]


class Entry(dict[torch.dtype, Call]):
    """dtype -> an entry point of the library, which is loaded when first asked for; `pack` makes its argument.

    note: told of every call by those that fill a cleared entry while it is set (`kernels/tape.py`).
    """

    every: ClassVar[list[Entry]] = []
    note: ClassVar[Callable[[tuple[int, bytes]], None] | None] = None

    def __init__(self, name: str, layout: str) -> None:
        self.name, self.pack = name, Struct("=" + layout).pack
        self.every.append(self)

    def __missing__(self, dtype: torch.dtype) -> Call:
        function = library()[f"{self.name}_{str(dtype).removeprefix('torch.')}"]
        function.argtypes, function.restype = [ctypes.c_char_p], None
        self[dtype] = function if Entry.note is None else noted(function, Entry.note)
        return self[dtype]


def noted(function: Any, note: Callable[[tuple[int, bytes]], None]) -> Call:
    """The function, telling of each call its address and argument."""
    address = ctypes.cast(function, ctypes.c_void_p).value or 0

    def call(packed: bytes) -> None:
        note((address, packed))
        function(packed)

    return call


LINEAR = Entry("linear", "4q 6q")
NORM = Entry("rms_norm", "5q 7q d")
ROTATE = Entry("rotate", "4q 7q")
ACTIVATE = Entry("activate", "2q 4q q2d")
ROUTE = Entry("route", "4q q 7qd")
GATE = Entry("gate", "6q 4q 7qd")
EXPERTS = Entry("experts", "5q 6q q2d 10q")
ATTEND = Entry("attend", "6q 6q 9q d")
STORE_LATENT = Entry("store_latent", "6q 7q d")
ATTEND_LATENT = Entry("attend_latent", "6q 6q 9q d 4q 8q")


@cache
def probe() -> str | None:
    """Compiles and loads the library, and multiplies with it on every thread; the reason where that fails."""
    try:
        library()
    except UnsupportedError as error:
        return error.one_line()
    w, x = torch.arange(-2048.0, 2048.0).view(64, 64) / 64, torch.eye(64)
    for dtype in SIZE:
        if not torch.equal(linear(x.to(dtype), w.to(dtype)), w.t().to(dtype)):
            return f"the native kernels multiply wrongly in {dtype} on this machine"
    return None


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    tokens, inputs = x_TD.shape
    if tokens > MANY:
        return F.linear(x_TD, w_ND, bias_N)
    dtype, outputs = x_TD.dtype, w_ND.shape[0]
    y_TN = x_TD.new_empty(tokens, outputs)
    row, unit = x_TD.stride()
    if unit != 1:
        x_TD, row = x_TD.contiguous(), inputs
    size = SIZE[dtype]
    LINEAR[dtype](LINEAR.pack(
        x_TD.data_ptr(), w_ND.data_ptr(), 0 if bias_N is None else bias_N.data_ptr(), y_TN.data_ptr(),
        row * size, w_ND.stride()[0] * size, tokens, inputs, outputs, threads(),
    ))  # fmt: skip
    return y_TN


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """Also of heads, [T, H, D], whatever their distances."""
    x_TD = rows(x_TD)
    shape, dtype = x_TD.shape, x_TD.dtype
    y_TD, size, (far, near) = x_TD.new_empty(shape), SIZE[dtype], strides(x_TD)
    NORM[dtype](NORM.pack(
        x_TD.data_ptr(), 0, w_D.data_ptr(), y_TD.data_ptr(), 0,
        far * size, near * size, shape[0], shape[1] if len(shape) == 3 else 1, 0, shape[-1], threads(), eps,
    ))  # fmt: skip
    return y_TD


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_TD, residual_TD = rows(x_TD), rows(residual_TD)
    tokens, dim = x_TD.shape
    y_TD, total_TD = x_TD.new_empty(tokens, dim), x_TD.new_empty(tokens, dim)
    dtype, size = x_TD.dtype, SIZE[x_TD.dtype]
    NORM[dtype](NORM.pack(
        x_TD.data_ptr(), residual_TD.data_ptr(), w_D.data_ptr(), y_TD.data_ptr(), total_TD.data_ptr(),
        x_TD.stride()[0] * size, 0, tokens, 1, residual_TD.stride()[0] * size, dim, threads(), eps,
    ))  # fmt: skip
    return y_TD, total_TD


def rows(x: Tensor) -> Tensor:
    """x itself if the elements of a row are neighbours, else a copy."""
    return x if x.stride()[-1] == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int]:
    """Elements from row to row of the first axis, and of the second where there are three."""
    each = x.stride()
    return each[0], each[1] if len(each) == 3 else 0


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
    y_THD = x_THD.new_empty(x_THD.shape)
    x_THD, cos_TD, sin_TD = rows(x_THD), cos_TD.contiguous(), sin_TD.contiguous()
    (tokens, heads, dim), (far, near) = x_THD.shape, strides(x_THD)
    dtype, size = x_THD.dtype, SIZE[x_THD.dtype]
    ROTATE[dtype](ROTATE.pack(
        x_THD.data_ptr(), cos_TD.data_ptr(), sin_TD.data_ptr(), y_THD.data_ptr(),
        far * size, near * size, tokens, heads, dim // 2, interleaved, threads(),
    ))  # fmt: skip
    return y_THD


def activate(gate_up_TI: Tensor, activation: Activation) -> Tensor:
    x_TI = rows(gate_up_TI)
    (tokens, both), dtype = x_TI.shape, x_TI.dtype
    y_TI = x_TI.new_empty(tokens, both // 2)
    ACTIVATE[dtype](ACTIVATE.pack(
        x_TI.data_ptr(), y_TI.data_ptr(), x_TI.stride()[0] * SIZE[dtype], tokens, both // 2, threads(),
        ACTIVATIONS[activation.kind], activation.limit, activation.alpha,
    ))  # fmt: skip
    return y_TI


@cache
def router(spec: RouterSpec) -> tuple[float, ...]:
    """The fields of `Router`."""
    return (spec.experts, spec.top_k, SCORINGS[spec.scoring], spec.renormalize, spec.groups, spec.top_groups,
            spec.group_score == "top2_sum", spec.scale)  # fmt: skip


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    logits_TE = logits_TE.float().contiguous()
    tokens = logits_TE.shape[0]
    ids_TA, weights_TA = INT32.new_empty(tokens, spec.top_k), FLOAT32.new_empty(tokens, spec.top_k)
    ROUTE[torch.float32](ROUTE.pack(
        logits_TE.data_ptr(), 0 if bias_E is None else bias_E.data_ptr(), ids_TA.data_ptr(), weights_TA.data_ptr(),
        tokens, *router(spec),
    ))  # fmt: skip
    return ids_TA, weights_TA


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    w.must_be("plain")
    x_TD, ids_TA, weights_TA = rows(x.data), ids_TA.contiguous(), weights_TA.contiguous()
    (tokens, hidden), dtype, how = x_TD.shape, x_TD.dtype, w.activation
    y_TD = x_TD.new_empty(tokens, hidden)
    EXPERTS[dtype](EXPERTS.pack(
        x_TD.data_ptr(), 0, y_TD.data_ptr(), ids_TA.data_ptr(), weights_TA.data_ptr(),
        x_TD.stride()[0] * SIZE[dtype], 0, tokens, hidden, ids_TA.shape[1], threads(),
        ACTIVATIONS[how.kind], how.limit, how.alpha, *bank(w),
    ))  # fmt: skip
    return y_TD


def bank(w: ExpertWeights) -> tuple[int, ...]:
    """The fields of `Bank`: addresses, bytes from expert to expert, count and width."""
    w13, w2 = w.w13.plain, w.w2.plain
    count, both, hidden = w13.shape
    size, width = SIZE[w13.dtype], both // 2
    at = w.biases and (w.biases[0].data_ptr(), w.biases[1].data_ptr())
    return (w13.data_ptr(), w2.data_ptr(), *(at or (0, 0)), both * hidden * size, hidden * width * size,
            both * size, hidden * size, count, width)  # fmt: skip


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    q_THK = rows(q_THK)
    (tokens, heads, _), dtype, size = q_THK.shape, q_THK.dtype, SIZE[q_THK.dtype]
    out_THV = q_THK.new_empty(tokens, heads, view.value_dim)
    slots_SL, (far, near), value = batch.slots_SL, strides(q_THK), view.value_dim * size
    ATTEND[dtype](ATTEND.pack(
        q_THK.data_ptr(), pool_PW.data_ptr(), batch.spans_S3.data_ptr(), slots_SL.data_ptr(),
        0 if sinks_H is None else sinks_H.data_ptr(), out_THV.data_ptr(),
        far * size, near * size, pool_PW.stride()[0] * size, slots_SL.stride()[0], heads * value, value,
        pool_PW.shape[0], len(batch.spans), heads, view.kv_heads, view.key_dim, view.value_at, view.value_dim,
        window or 0, threads(), scale,
    ))  # fmt: skip
    return out_THV


def mlp(x_TD: Tensor, w13_ID: Tensor, w2_DI: Tensor, activation: Activation, onto_TD: Tensor | None = None) -> Tensor:
    x_TD = rows(x_TD)
    (tokens, hidden), dtype, (both, _) = x_TD.shape, x_TD.dtype, w13_ID.shape
    y_TD, size, onto, onto_row = x_TD.new_empty(tokens, hidden), SIZE[dtype], 0, 0
    if onto_TD is not None:
        onto_TD = rows(onto_TD)
        onto, onto_row = onto_TD.data_ptr(), onto_TD.stride()[0] * size
    EXPERTS[dtype](EXPERTS.pack(
        x_TD.data_ptr(), onto, y_TD.data_ptr(), 0, 0,
        x_TD.stride()[0] * size, onto_row, tokens, hidden, 0, threads(),
        ACTIVATIONS[activation.kind], activation.limit, activation.alpha,
        w13_ID.data_ptr(), w2_DI.data_ptr(), 0, 0, 0, 0, 0, 0, 1, both // 2,
    ))  # fmt: skip
    return y_TD


def gate(x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, bias_E: Tensor | None, spec: RouterSpec,
         live_T: Tensor | None = None, counts_E: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_TD = rows(x_TD)
    (tokens, inputs), dtype = x_TD.shape, x_TD.dtype
    ids_TA, weights_TA = INT32.new_empty(tokens, spec.top_k), FLOAT32.new_empty(tokens, spec.top_k)
    GATE[dtype](GATE.pack(
        x_TD.data_ptr(), w_ED.data_ptr(), 0 if logit_bias_E is None else logit_bias_E.data_ptr(),
        0 if bias_E is None else bias_E.data_ptr(), ids_TA.data_ptr(), weights_TA.data_ptr(),
        x_TD.stride()[0] * SIZE[dtype], tokens, inputs, threads(), *router(spec),
    ))  # fmt: skip
    return settle_choices(ids_TA, live_T, counts_E), weights_TA


def store_latent(x_TX: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor, slots_T: Tensor) -> None:
    x_TX, (cos, sin), (rank,), dtype = rows(x_TX), angles, w.norm_R.shape, x_TX.dtype
    size, width = SIZE[dtype], pool_PW.shape[1]
    STORE_LATENT[dtype](STORE_LATENT.pack(
        x_TX.data_ptr() + w.column * size, w.norm_R.data_ptr(), cos.data_ptr(), sin.data_ptr(), pool_PW.data_ptr(),
        slots_T.data_ptr(), x_TX.stride()[0] * size, pool_PW.stride()[0] * size, x_TX.shape[0], rank, width - rank,
        w.interleaved, threads(), w.eps,
    ))  # fmt: skip


def attend_latent(q_THK: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor,
                  batch: AttentionBatch) -> Tensor:  # fmt: skip
    q_THK, (cos, sin), slots_SL, dtype = rows(q_THK), angles, batch.slots_SL, q_THK.dtype
    (tokens, heads, width), (_, nope, rank), value = q_THK.shape, w.w_k_HNR.shape, w.w_v_HVR.shape[1]
    size, (far, near) = SIZE[dtype], strides(q_THK)
    out_THV = q_THK.new_empty(tokens, heads, value)
    ATTEND_LATENT[dtype](ATTEND_LATENT.pack(
        q_THK.data_ptr(), pool_PW.data_ptr(), batch.spans_S3.data_ptr(), slots_SL.data_ptr(), 0, out_THV.data_ptr(),
        far * size, near * size, pool_PW.stride()[0] * size, slots_SL.stride()[0], heads * value * size, value * size,
        pool_PW.shape[0], len(batch.spans), heads, 1, rank + width - nope, 0, rank, 0, threads(), w.scale,
        w.w_k_HNR.data_ptr(), w.w_v_HVR.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        tokens, w.w_k_HNR.stride()[0] * size, w.w_v_HVR.stride()[0] * size, nope, width - nope, rank, value,
        w.interleaved,
    ))  # fmt: skip
    return out_THV
