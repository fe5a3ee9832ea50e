"""Dense projections. One stored matrix may be made of several checkpoint projections, stacked by rows.

Stacking (q, k, v; gate, up) turns several small products into one; each part keeps its own checkpoint name, so that a
loader fills it and a quantised format can be cut along the same seams. Parts that a checkpoint quantised differently,
or calibrated differently, are multiplied apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from moesaic.contracts.contract import asks_of
from moesaic.contracts.scheme import UNQUANTIZED, Encoding, Scheme
from moesaic.contracts.spec import LinearSpec, MoESpec
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import ExpertTerms, Ops
from moesaic.kernels.registry import Kernels

PLAIN = Encoding("bf16")


@dataclass(frozen=True)
class Stored:
    """A weight that a checkpoint must fill, in whatever format it stores it.

    name: the checkpoint's module.  part: what it is.  weight: one segment of storage, in the format that is held.
    input_scale: FP32 [1], where the held scheme has a static one.  settle: to be called once everything is filled.
    open: to be called before the fields of `weight` are read or written once it was settled.
    together: the experts among which it is, where a checkpoint may keep them in common tensors.
    """

    name: str
    part: LinearSpec
    weight: QuantTensor
    input_scale: Tensor | None
    settle: Callable[[], None]
    together: Together | None = None
    open: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class Together:
    """All experts of a layer.  weights: storage of `gate`, `up` and `down`, [E, rows, columns] each.

    biases: theirs, [E, rows], where they have any.
    """

    spec: MoESpec
    weights: Mapping[str, QuantTensor]
    biases: Mapping[str, Tensor]


Sources = Iterator[tuple[str, Tensor] | Stored]
"""(checkpoint tensor name, writable view of the storage that it fills), or a weight that may be quantised."""


Taken = tuple[Encoding, Tensor | None]
"""What rows are encoded in, with the scale where it is static."""


def suits(rows: Rows, taken: Taken | None) -> bool:
    """Whether rows have the very encoding and scale that a weight is multiplied with."""
    if taken is None or rows.encoding != taken[0]:
        return False
    return taken[1] is None or any(part is taken[1] for part in rows.parts.values())


class Piece:
    """Consecutive parts in one scheme: one weight, one product, as long as their static input scales agree."""

    def __init__(self, parts: tuple[LinearSpec, ...], scheme: Scheme, kernels: Kernels, like: Tensor) -> None:
        self.parts, self.scheme = parts, scheme
        self.ops: Ops = kernels.under(**asks_of(scheme))
        rows = tuple(part.outputs for part in parts)
        self.weight = QuantTensor.empty(scheme.weight, rows, parts[0].inputs, like)
        static = scheme.activation.static
        self.input_scale_P = like.new_ones(len(parts), dtype=torch.float32) if static else None
        self.products: list[tuple[QuantTensor, Tensor | None]] = [(self.weight, None)]
        self.settle()

    def settle(self) -> None:
        """Derives what is multiplied from what was loaded: one product, or one per part where the scales differ (those
        without memory are taken for equal)."""
        if self.input_scale_P is None:
            return
        if self.input_scale_P.is_meta or bool((self.input_scale_P == self.input_scale_P[0]).all()):
            self.products = [(self.weight, self.input_scale_P[0])]
        else:
            each = [self.weight.segment(i) for i in range(len(self.parts))]
            self.products = list(zip(each, self.input_scale_P, strict=True))

    @property
    def takes(self) -> Taken | None:
        """What its rows are encoded in, where that is one thing."""
        if not self.scheme.quantized or len(self.products) > 1:
            return None
        return self.scheme.activation, self.products[0][1]

    def __call__(self, x_TD: Tensor, rows: Rows | None = None) -> Tensor:
        """The products side by side, without bias. rows: x encoded, used where it `suits`."""
        if not self.scheme.quantized:
            return self.ops.linear(x_TD, self.weight.plain)
        if rows is not None and suits(rows, self.takes):
            return self.ops.linear_quant(rows, self.products[0][0])
        how = self.scheme.activation
        each = [self.ops.linear_quant(self.ops.encode(x_TD, how, scale), w) for w, scale in self.products]
        return each[0] if len(each) == 1 else torch.cat(each, -1)


class Linear:
    """y [T, sum of outputs] = x [T, inputs] w^T + b for the row-stacked parts."""

    def __init__(self, parts: tuple[LinearSpec, ...], kernels: Kernels, like: Tensor, *, plain: bool = False) -> None:
        """`like`: an empty tensor with the model's dtype and device. Parts agree on `inputs`.

        plain: kept unquantised whatever the checkpoint stores.
        """
        self.parts = parts
        of = [UNQUANTIZED if plain else part.runs for part in parts]
        grouped = groupby(range(len(parts)), key=of.__getitem__)
        self.pieces = [Piece(tuple(parts[i] for i in group), scheme, kernels, like) for scheme, group in grouped]
        self.single = self.pieces[0] if len(self.pieces) == 1 and not self.pieces[0].scheme.quantized else None
        self.linear = kernels.ops.linear
        rows = sum(part.outputs for part in parts)
        self.bias_N = like.new_zeros(rows) if any(part.bias for part in parts) else None

    def __call__(self, x_TD: Tensor, rows: Rows | None = None) -> Tensor:
        """rows: x, encoded in whatever way; used where that is what the weight is multiplied with."""
        if self.single:
            return self.linear(x_TD, self.single.weight.plain, self.bias_N)
        each = [piece(x_TD, rows) for piece in self.pieces]
        y_TN = each[0] if len(each) == 1 else torch.cat(each, -1)
        return y_TN if self.bias_N is None else y_TN + self.bias_N

    @property
    def takes(self) -> Taken | None:
        """What rows may be encoded in before they come here; None: they come as they are."""
        return self.pieces[0].takes if len(self.pieces) == 1 else None

    def terms(self, x_TD: Tensor | None, rows: Rows | None = None) -> Tensor:
        """The same as terms [P, T, N] for the reader to add up. x may be None where rows are given that suit."""
        piece, takes = self.pieces[0], self.takes
        if takes is not None and hasattr(piece.ops, "linear_terms"):
            if rows is None or not suits(rows, takes):
                assert x_TD is not None, "rows that suit, or rows as they are"
                rows = piece.ops.encode(x_TD, *takes)
            return piece.ops.linear_terms(rows, piece.products[0][0], self.bias_N)
        return self(rows.data if x_TD is None and rows is not None else x_TD, rows)[None]  # type: ignore[arg-type]

    @property
    def bare(self) -> bool:
        """One unquantised matrix and no bias."""
        return self.single is not None and self.bias_N is None

    @property
    def weight_ND(self) -> Tensor:
        """The whole matrix; only of an unquantised one (UnsupportedError)."""
        return self.pieces[0].weight.plain

    def sources(self) -> Sources:
        at = 0
        for piece in self.pieces:
            for i, part in enumerate(piece.parts):
                scale = None if piece.input_scale_P is None else piece.input_scale_P[i : i + 1]
                yield Stored(part.name, part, piece.weight.segment(i), scale, piece.settle)
                if part.bias and self.bias_N is not None:
                    yield f"{part.name}.bias", self.bias_N[at : at + part.outputs]
                at += part.outputs


class Norm:
    """RMS norm over the last axis with its own epsilon. fused: it adds terms up and encodes in the same pass."""

    def __init__(self, name: str, size: int, eps: float, ops: Ops, like: Tensor) -> None:
        self.name, self.eps, self.ops = name, eps, ops
        self.fused = hasattr(ops, "add_norm_encode")
        self.weight_D = like.new_empty(size)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.ops.rms_norm(x_TD, self.weight_D, self.eps)

    def after_add(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum); the sum is x itself where there is no residual yet."""
        if residual_TD is None:
            return self(x_TD), x_TD
        return self.ops.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps)

    def encoded(self, x: Tensor | ExpertTerms, residual_TD: Tensor | None,
                takes: Taken | None) -> tuple[Tensor, Rows | None, Tensor]:  # fmt: skip
        """(norm of the sum, the same encoded if a fused op did it, the sum). x: rows, or, where this norm is fused,
        terms [P, T, D] or of experts; takes: what the norm's reader takes."""
        if not self.fused:
            assert isinstance(x, Tensor), "terms come only where norms add them up"
            h_TD, residual_TD = self.after_add(x, residual_TD)
            return h_TD, None, residual_TD
        encoding, scale = takes if takes and takes[0].by_row else (PLAIN, None)
        return self.ops.add_norm_encode(x, residual_TD, self.weight_D, self.eps, encoding, scale)

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
