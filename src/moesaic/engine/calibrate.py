"""How large the inputs of a model's projections get: what schemes with static activation scales must know beforehand.

The model runs on whole prompts, draft layers included, with kernels that look at their operands before they compute.
Which projection a product belongs to is known by the storage of its weight. T tokens, D input size, E experts, I width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from moesaic.engine.drafts import whole_sequence
from moesaic.errors import RequestError
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.hardware import local_cpu
from moesaic.kernels.ops import OP_NAMES, ExpertWeights, Ops
from moesaic.kernels.reference import activate, row_values
from moesaic.kernels.registry import BoundCell, Kernels
from moesaic.layers.linear import Sources, Stored
from moesaic.models.build import build, choose_dtype, plan_here, stored_spec
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder

Advance = Callable[[int], None]


@torch.inference_mode()
def calibrate(source: Checkpoint, sequences: Sequence[Sequence[int]], advance: Advance) -> dict[str, float]:
    """The largest magnitude of each projection's input over all sequences, by module name; experts one by one.

    Those that no token reached are missing. A sequence longer than the model's own limit is cut off there. The whole
    model is held in memory. advance: told the tokens done. Raises RequestError for an id that is no token.
    """
    spec, _ = stored_spec(source)
    check_ids(sequences, spec.vocab)
    hardware, longest = local_cpu(), min(max(map(len, sequences)), spec.max_length)
    plan = plan_here(spec, hardware, choose_dtype("auto", spec, hardware))
    watching = Watching(plan)
    model = build(source, spec, plan, longest, kernels=watching).model
    watching.learn(model.sources())
    for tokens in sequences:
        run(model, tokens[:longest])
        advance(len(tokens))
    return watching.amax


def check_ids(sequences: Sequence[Sequence[int]], vocab: int) -> None:
    for tokens in sequences:
        for token in tokens:
            if not 0 <= token < vocab:
                raise RequestError(f"token id {token} is not in [0, {vocab})", where="prompt", remedy="Check the ids.")


def run(model: Decoder, tokens: Sequence[int]) -> None:
    """Every layer over one sequence; each draft layer sees the state of the one before, and the token after it."""
    hidden_TD = model(whole_sequence(model, tokens))
    for index in range(min(len(model.drafts), len(tokens) - 1)):
        step = whole_sequence(model, tokens[index + 1 :])
        hidden_TD = model.draft(index, step, hidden_TD[:-1])


class Watching(Kernels):
    """The kernels of a plan, which note how large their inputs are."""

    def __init__(self, plan: Any) -> None:
        self.names: dict[int, tuple[str, ...]] = {}  # by the address of a weight's storage
        self.amax: dict[str, float] = {}
        super().__init__(plan)

    def learn(self, wanted: Sources) -> None:
        """Whose weight lies where. For experts: gate and up of each in turn, or down of each."""
        for item in wanted:
            if isinstance(item, Stored):
                place = address(item.weight)
                self.names[place] = (*self.names.get(place, ()), item.name)

    def under(self, **asks: Any) -> Ops:
        return self.watched(super().under(**asks))

    def mixture(self, layer: int, **asks: Any) -> tuple[BoundCell, ...]:
        """Experts stay as their formats say but within a call of kernels that want their bytes in another order."""
        cells = super().mixture(layer, **asks)
        return tuple(replace(c, ops=self.watched(within(c.ops, c.packer)), packer=None) for c in cells)

    def watched(self, ops: Ops) -> Ops:
        """Without fused ops: inside those there would be nothing to see, and layers do without them."""
        functions = {name: call for name, call in vars(ops).items() if name in OP_NAMES}
        watch = {"linear": self.linear, "linear_quant": self.linear_quant, "experts": self.experts}
        mine = {name: around(functions[name]) for name, around in watch.items() if name in functions}
        return cast(Ops, SimpleNamespace(**{**functions, **mine}))

    def linear(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def seen(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
            self.note(self.names.get(w_ND.untyped_storage().data_ptr(), ()), x_TD)
            return call(x_TD, w_ND, bias_N)

        return seen

    def linear_quant(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def seen(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
            self.note(self.names.get(address(w), ()), row_values(x))
            return call(x, w, bias_N)

        return seen

    def experts(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def seen(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
            x_TD = row_values(x)
            gate_up, down = self.names[address(w.w13)], self.names[address(w.w2)]
            for e, name in enumerate(down):
                own_TD = x_TD[(ids_TA == e).any(-1)]
                if len(own_TD):
                    self.note(gate_up[2 * e : 2 * e + 2], own_TD)
                    self.note((name,), between(own_TD, w, e))
            return call(x, w, ids_TA, weights_TA)

        return seen

    def note(self, names: tuple[str, ...], x_TD: Tensor) -> None:
        if x_TD.numel():
            largest = float(x_TD.abs().max())
            for name in names:
                self.amax[name] = max(self.amax.get(name, 0.0), largest)


def within(ops: Ops, packer: ModuleType | None) -> Ops:
    """The ops, with experts that take plain weights, and leave them so."""
    if packer is None:
        return ops

    def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        made = packer.pack(w, None)
        try:
            return ops.experts(x, made, ids_TA, weights_TA)
        finally:
            packer.unpack(made)

    return cast(Ops, SimpleNamespace(**{**vars(ops), "experts": experts}))


def between(x_TD: Tensor, w: ExpertWeights, e: int) -> Tensor:
    """[T, I]: what enters the second product of expert e."""
    gate_up_TJ = x_TD @ w.w13[e].dequantize().to(x_TD.dtype).T
    if w.biases:
        gate_up_TJ = gate_up_TJ + w.biases[0][e]
    return activate(gate_up_TJ, w.activation)


def address(weight: QuantTensor) -> int:
    return weight.parts["data"].untyped_storage().data_ptr()
