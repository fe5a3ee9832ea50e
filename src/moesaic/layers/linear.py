"""Dense projections. One stored matrix may be made of several checkpoint projections, stacked by rows.

Stacking (q, k, v; gate, up) turns several small products into one; each part keeps its own checkpoint name, so that a
loader fills it and a quantised format can be cut along the same seams.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.contracts.spec import LinearSpec
from moesaic.kernels.ops import Ops

Sources = Iterator[tuple[str, Tensor]]
"""(checkpoint tensor name, writable view of the storage that it fills)."""


class Linear:
    """y [T, sum of outputs] = x [T, inputs] w^T + b for the row-stacked parts."""

    def __init__(self, parts: tuple[LinearSpec, ...], ops: Ops, like: Tensor) -> None:
        """`like`: an empty tensor whose dtype and device the weights take. Parts agree on `inputs`."""
        self.parts, self.ops = parts, ops
        rows = sum(part.outputs for part in parts)
        self.weight_ND = like.new_empty(rows, parts[0].inputs)
        self.bias_N = like.new_zeros(rows) if any(part.bias for part in parts) else None

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.ops.linear(x_TD, self.weight_ND, self.bias_N)

    def sources(self) -> Sources:
        at = 0
        for part in self.parts:
            rows = slice(at, at + part.outputs)
            yield f"{part.name}.weight", self.weight_ND[rows]
            if part.bias and self.bias_N is not None:
                yield f"{part.name}.bias", self.bias_N[rows]
            at += part.outputs


class Norm:
    """RMS norm over the last axis with its own epsilon."""

    def __init__(self, name: str, size: int, eps: float, ops: Ops, like: Tensor) -> None:
        self.name, self.eps, self.ops = name, eps, ops
        self.weight_D = like.new_empty(size)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.ops.rms_norm(x_TD, self.weight_D, self.eps)

    def after_add(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum); the sum is x itself where there is no residual yet."""
        if residual_TD is None:
            return self(x_TD), x_TD
        return self.ops.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps)

    def sources(self) -> Sources:
        yield f"{self.name}.weight", self.weight_D


class Embedding:
    """Token id -> row; also the output head where embeddings are tied."""

    def __init__(self, name: str, vocab: int, hidden: int, like: Tensor) -> None:
        self.name = name
        self.weight_VD = like.new_empty(vocab, hidden)

    def __call__(self, ids_T: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids_T, self.weight_VD)

    def sources(self) -> Sources:
        yield f"{self.name}.weight", self.weight_VD
