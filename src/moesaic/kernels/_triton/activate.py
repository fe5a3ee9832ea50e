"""What joins gate and up, over rows `[T, 2I]`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.contracts.spec import Activation
from moesaic.kernels._triton.launch import cdiv, power


@triton.jit
def join(gate, up, OAI: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """FP32 gate and up -> FP32, as `contracts.spec.Activation` says."""
    if OAI:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return gate * tl.sigmoid(gate * ALPHA) * (up + 1.0)
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def activate_kernel(x_ptr, y_ptr, x_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, OAI: tl.constexpr,
                    LIMIT: tl.constexpr, ALPHA: tl.constexpr):  # fmt: skip
    t, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + t * x_stride + i, i < SIZE, 0.0).to(tl.float32)
    up = tl.load(x_ptr + t * x_stride + SIZE + i, i < SIZE, 0.0).to(tl.float32)
    tl.store(y_ptr + t * SIZE + i, join(gate, up, OAI, LIMIT, ALPHA).to(y_ptr.dtype.element_ty), i < SIZE)


def activate(gate_up_TI: Tensor, activation: Activation) -> Tensor:
    x = gate_up_TI.reshape(-1, gate_up_TI.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    size = x.shape[1] // 2
    y = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    if y.numel():
        block = min(power(size), 1024)
        activate_kernel[(len(x), cdiv(size, block))](
            x, y, x.stride(0), SIZE=size, BLOCK=block, OAI=activation.kind == "swiglu_oai", LIMIT=activation.limit,
            ALPHA=activation.alpha, num_warps=min(4, max(1, block // 256)),
        )  # fmt: skip
    return y.view(*gate_up_TI.shape[:-1], size)
