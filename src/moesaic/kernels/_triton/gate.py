"""Gate product and expert choice: the product's parts are added up where the experts are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import RouterSpec
from moesaic.kernels._triton.linear import wide_terms
from moesaic.kernels._triton.route import choose


def gate(x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, bias_E: Tensor | None, spec: RouterSpec,
         live_T: Tensor | None = None, counts_E: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    terms = wide_terms(x_TD, w_ED, logit_bias_E)
    return choose(terms, bias_E, spec, live_T, counts_E, rounded=w_ED.dtype == torch.bfloat16)
