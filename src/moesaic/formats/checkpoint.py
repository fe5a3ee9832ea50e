"""How checkpoints say that they are quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.contracts.spec import LinearSpec, ModelSpec
from moesaic.errors import UnsupportedError


@dataclass(frozen=True)
class Source:
    name: str
    field: str | None
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    convert: Callable[[Tensor, LinearSpec], Tensor] | None = None
    optional: bool = False

    def check(self, value: Tensor) -> None:
        return None


class Dialect(Protocol):
    def apply(self, spec: ModelSpec) -> tuple[ModelSpec, tuple[str, ...]]: ...

    def sources(self, part: LinearSpec, name: str) -> tuple[Source, ...]: ...


def read_quantization(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None) -> Dialect | None:
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        raise UnsupportedError(
            f"quantization_config {method!r:.60} is not implemented",
            where="config.json", remedy="Use the BF16, FP16 or FP32 release of the model.",
        )  # fmt: skip
    return None
