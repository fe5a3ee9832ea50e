"""The expert weights and their product. Letters: T tokens, D hidden size, E experts, I expert width."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from moesaic.contracts.scheme import Scheme
from moesaic.contracts.spec import MoESpec
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import ExpertTerms, ExpertWeights, Ops
from moesaic.layers.linear import Sources, Stored, Taken, Together, suits
from moesaic.moe.values import Dispatched


class Experts:
    """w13 [E, 2I, D]: gate rows, then up rows; w2 [E, D, I]. Applies top-k weights and reduces over the top-k.

    Gate, up and down of a layer are held in one scheme, which the plan says. A static input scale of a product is the
    largest over experts, gate and up: nothing saturates that the checkpoint foresaw.
    packer: the backend in whose order of bytes the kernels want the weights, if they do.
    """

    def __init__(self, spec: MoESpec, scheme: Scheme, like: Tensor, packer: ModuleType | None = None) -> None:
        self.spec, self.scheme = spec, scheme
        how, form = scheme.activation, scheme.weight
        count, width, hidden = spec.router.experts, spec.intermediate, spec.gate.inputs
        w13 = QuantTensor.empty(form, (width, width), hidden, like, (count,))
        w2 = QuantTensor.empty(form, (hidden,), width, like, (count,))
        biases = (like.new_empty(count, 2 * width), like.new_empty(count, hidden)) if spec.gate.bias else None
        self.input_scales_E3, self.input_scale, between = None, None, None
        if how.static:
            self.input_scales_E3 = like.new_ones(count, 3, dtype=torch.float32)
            self.input_scale, between = (like.new_ones((), dtype=torch.float32) for _ in range(2))
        self.weights = ExpertWeights(w13, w2, spec.activation, how, between, biases)
        self.plain, self.packer, self.packed = self.weights, packer, None
        self.scale()

    def scale(self) -> None:
        """Derives the input scales of the two products, where they are, from those that were loaded for gate, up and
        down."""
        between = self.weights.between_scale
        if self.input_scales_E3 is not None and self.input_scale is not None and between is not None:
            with torch.inference_mode():  # they may have been made in it
                largest_3 = self.input_scales_E3.amax(0)
                self.input_scale.copy_(largest_3[:2].amax())
                between.copy_(largest_3[2])

    def settle(self) -> None:
        """After the storage was filled: derives what follows from it, and orders its bytes as the kernels want them."""
        self.scale()
        if self.packer and self.weights.packing == "plain" and not self.plain.w13.parts["data"].is_meta:
            self.weights = self.packed = self.packer.pack(self.plain, self.packed)

    def open(self) -> None:
        """Before the storage is read or written by its formats: `settle` must follow before the next call."""
        if self.packer and self.weights.packing != "plain":
            self.packer.unpack(self.weights)
            self.weights = self.plain

    @property
    def takes(self) -> Taken | None:
        """What rows may be encoded in before they come here."""
        return (self.scheme.activation, self.input_scale) if self.scheme.quantized else None

    def __call__(self, sent: Dispatched, ops: Ops) -> Tensor:
        return ops.experts(self.rows(sent, ops), self.weights, sent.ids_TA, sent.weights_TA)

    def terms(self, sent: Dispatched, ops: Ops) -> ExpertTerms:
        """The same for the reader to weight and reduce; for ops that have it."""
        return ops.experts_terms(self.rows(sent, ops), self.weights, sent.ids_TA, sent.weights_TA)

    def rows(self, sent: Dispatched, ops: Ops) -> Rows:
        """What came, encoded as the products take it; the weights are in order from here on."""
        if self.packer and self.weights.packing == "plain":
            self.settle()
        rows = sent.rows
        if rows is None or not suits(rows, self.takes):
            rows = ops.encode(sent.x_TD, self.scheme.activation, self.input_scale)
        return rows

    def sources(self) -> Sources:
        spec, (w13, w2) = self.spec, (self.plain.w13, self.plain.w2)
        gate_up, together = [w13.segment(0), w13.segment(1)], self.together() if self.spec.fused else None
        for e in range(spec.router.experts):
            parts = ((spec.gate, gate_up[0][e]), (spec.up, gate_up[1][e]), (spec.down, w2[e]))
            for i, (part, weight) in enumerate(parts):
                scale = None if self.input_scales_E3 is None else self.input_scales_E3[e, i : i + 1]
                yield Stored(part.name.format(e=e), part, weight, scale, self.settle, together, self.open)
            yield from self.biases_of(e)

    def together(self) -> Together:
        (w13, w2), biases = (self.plain.w13, self.plain.w2), {}
        if self.weights.biases:
            gate, up = self.weights.biases[0].split(self.spec.intermediate, 1)
            biases = {"gate": gate, "up": up, "down": self.weights.biases[1]}
        return Together(self.spec, {"gate": w13.segment(0), "up": w13.segment(1), "down": w2}, biases)

    def biases_of(self, e: int) -> Sources:
        if self.weights.biases:
            (bias13, bias2), width = (each[e] for each in self.weights.biases), self.spec.intermediate
            yield f"{self.spec.gate.name.format(e=e)}.bias", bias13[:width]
            yield f"{self.spec.up.name.format(e=e)}.bias", bias13[width:]
            yield f"{self.spec.down.name.format(e=e)}.bias", bias2
