"""Which experts a token goes to. Letters: T tokens, D hidden size, E experts, A experts per token."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import RouterSpec
from moesaic.kernels.ops import Ops
from moesaic.layers.linear import Sources
from moesaic.moe.balance import add_choices
from moesaic.moe.values import Routing


class Router:
    """Gate product and expert choice.

    The gate computes in the dtype that the plan says, whatever the model computes in: rows are taken to it, and the
    logits keep it. FP32, unless the user asks otherwise: expert choice is discontinuous, and DeepSeek's own code does
    the same. The stored weight is widened (exact) or rounded once, when it is loaded. The selection bias is FP32.
    """

    def __init__(self, spec: RouterSpec, hidden: int, dtype: torch.dtype, like: Tensor) -> None:
        self.spec, self.dtype = spec, dtype
        self.weight_ED = like.new_empty(spec.experts, hidden, dtype=dtype)
        self.bias_E = like.new_empty(spec.experts, dtype=torch.float32) if spec.bias else None
        self.logit_bias_E = like.new_empty(spec.experts, dtype=dtype) if spec.logit_bias else None

    def __call__(
        self, x_TD: Tensor, ops: Ops, live_T: Tensor | None = None, counts_E: Tensor | None = None
    ) -> Routing:
        """live_T: 0 for rows that are padding and get no expert.  counts_E: to which the choices are added."""
        if hasattr(ops, "gate"):
            biases = (self.logit_bias_E, self.bias_E)
            return Routing(*ops.gate(x_TD, self.weight_ED, *biases, self.spec, live_T, counts_E))
        ids_TA, weights_TA = ops.route(self.logits(x_TD, ops), self.bias_E, self.spec)
        if live_T is not None:
            ids_TA = ids_TA.masked_fill(live_T[:, None] == 0, -1)
        if counts_E is not None:
            add_choices(counts_E, ids_TA)
        return Routing(ids_TA, weights_TA)

    def logits(self, x_TD: Tensor, ops: Ops) -> Tensor:
        """[T, E] in the gate's dtype."""
        return ops.linear(x_TD.to(self.dtype), self.weight_ED, self.logit_bias_E)

    def sources(self) -> Sources:
        yield self.spec.weight, self.weight_ED
        if self.spec.bias and self.bias_E is not None:
            yield self.spec.bias, self.bias_E
        if self.spec.logit_bias and self.logit_bias_E is not None:
            yield self.spec.logit_bias, self.logit_bias_E
