"""The expert weights and their product. Letters: T tokens, D hidden size, E experts, I expert width."""

from __future__ import annotations

from torch import Tensor

from moesaic.contracts.spec import MoESpec
from moesaic.kernels.ops import Ops
from moesaic.layers.linear import Sources
from moesaic.moe.values import Dispatched


class Experts:
    """w13 [E, 2I, D]: gate rows, then up rows; w2 [E, D, I]. Applies top-k weights and reduces over the top-k."""

    def __init__(self, spec: MoESpec, ops: Ops, like: Tensor) -> None:
        self.spec, self.ops = spec, ops
        count, width, hidden = spec.router.experts, spec.intermediate, spec.gate.inputs
        self.w13_EID = like.new_empty(count, 2 * width, hidden)
        self.w2_EDI = like.new_empty(count, hidden, width)

    def __call__(self, sent: Dispatched) -> Tensor:
        return self.ops.experts(sent.x_TD, self.w13_EID, self.w2_EDI, sent.ids_TA, sent.weights_TA)

    def sources(self) -> Sources:
        width = self.spec.intermediate
        for e in range(self.spec.router.experts):
            yield f"{self.spec.gate.name.format(e=e)}.weight", self.w13_EID[e, :width]
            yield f"{self.spec.up.name.format(e=e)}.weight", self.w13_EID[e, width:]
            yield f"{self.spec.down.name.format(e=e)}.weight", self.w2_EDI[e]
