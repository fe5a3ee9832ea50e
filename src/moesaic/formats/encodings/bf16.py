"""`bf16`: rows as they are, in the dtype in which the model computes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def encode(x: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    return {"data": x}


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["data"].float()
