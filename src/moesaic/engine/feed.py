"""The tokens that a step chose and that only the device knows yet: where the next step finds them.

A step may be prepared while the one before it still runs. A token that this one is about to choose is then a place in a
buffer on the device, not a number: on its way there it is -1 - place, and is looked up when the step runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moesaic.engine.request import Request


class Feed:
    """The last launched step's tokens, one per row that was sampled. Owned by the runner."""

    def __init__(self, most: int, device: torch.device) -> None:
        """most: rows sampled in one step."""
        self.device = device
        self.chosen_R = torch.zeros(most, dtype=torch.int64, device=device)
        self.places: dict[Request, int] = {}

    def token(self, request: Request, position: int) -> int:
        """The token at a position, or -1 - place where it is on the device."""
        token = request.tokens[position]
        return token if token >= 0 else -1 - self.places[request]

    def resolve(self, tokens_T: Tensor) -> Tensor:
        """Tokens as `token` gives them -> tokens. Reads the buffer when the device comes to it."""
        known_T = self.chosen_R.index_select(0, (-1 - tokens_T).clamp_(min=0))
        return torch.where(tokens_T < 0, known_T, tokens_T)

    def keep(self, requests: Iterable[Request], tokens_R: Tensor) -> None:
        """The tokens of the step just launched. A row that failed becomes token 0: what follows it is thrown away."""
        self.places = {request: row for row, request in enumerate(requests)}
        torch.clamp(tokens_R, min=0, out=self.chosen_R[: len(tokens_R)])
