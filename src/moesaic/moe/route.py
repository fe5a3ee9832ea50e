"""Which experts a token goes to. Letters: T tokens, D hidden size, E experts, A experts per token."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import RouterSpec
from moesaic.kernels.ops import Ops
from moesaic.layers.linear import Sources
from moesaic.moe.values import Routing


class Router:
    """Gate product and expert choice.

    The gate runs in FP32 whatever the model computes in: expert choice is discontinuous, and DeepSeek's own code and
    `transformers` do the same. The stored weight is widened once, when it is loaded (exact).
    """

    def __init__(self, spec: RouterSpec, hidden: int, ops: Ops, like: Tensor) -> None:
        self.spec, self.ops, self.fused = spec, ops, hasattr(ops, "gate")
        self.weight_ED = like.new_empty(spec.experts, hidden, dtype=torch.float32)
        self.bias_E = like.new_empty(spec.experts, dtype=torch.float32) if spec.bias else None
        self.logit_bias_E = like.new_empty(spec.experts, dtype=torch.float32) if spec.logit_bias else None

    def __call__(self, x_TD: Tensor) -> Routing:
        if self.fused:
            return Routing(*self.ops.gate(x_TD, self.weight_ED, self.logit_bias_E, self.bias_E, self.spec))
        return Routing(*self.ops.route(self.logits(x_TD), self.bias_E, self.spec))

    def logits(self, x_TD: Tensor) -> Tensor:
        """FP32 [T, E]."""
        return self.ops.linear(x_TD.float(), self.weight_ED, self.logit_bias_E)

    def sources(self) -> Sources:
        yield self.spec.weight, self.weight_ED
        if self.spec.bias and self.bias_E is not None:
            yield self.spec.bias, self.bias_E
        if self.spec.logit_bias and self.logit_bias_E is not None:
            yield self.spec.logit_bias, self.logit_bias_E
