"""Plain dense products: the vendor's library, which torch calls. Sums are FP32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return F.linear(x_TD, w_ND, bias_N)
