"""The values that travel between the stages of a mixture layer: one frozen value per arrow.

Letters: T tokens, D hidden size, A experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic.formats.encodings import Rows


@dataclass(frozen=True, slots=True)
class Routing:
    """ids_TA INT32 global expert ids (-1 for padding); weights_TA FP32, `routed_scaling_factor` included."""

    ids_TA: Tensor
    weights_TA: Tensor


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What the experts of this rank receive, in layout `tokens`: rows and local expert ids (-1 where not here).

    rows: x, encoded before it was sent; None where nobody did.
    """

    x_TD: Tensor
    ids_TA: Tensor
    weights_TA: Tensor
    rows: Rows | None = None
