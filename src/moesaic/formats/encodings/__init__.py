"""How activations travel: a row `[..., K]` in an encoding is a handful of tensors, one file per encoding.

`bf16` stands for "as they are": the tensor keeps the dtype in which the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from moesaic.contracts.scheme import ENCODINGS, Encoding
from moesaic.errors import UnsupportedError

STATIC = ("fp8_tensor", "nvfp4")
"""The encodings that have a tensor-wide scale, which may come with the checkpoint."""


class Coder(Protocol):
    """A file of this folder that bears the name of an encoding."""

    def encode(self, x: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
        """`[..., K]` in any float dtype -> its fields, `data` among them.

        scale: FP32 scalar tensor, the calibrated tensor-wide scale (multiply codes by it to get values), or None where
        the encoding finds its own. Finite input never gives NaN; zeros give zeros.
        """
        ...

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """FP32 `[..., K]`."""
        ...


@dataclass(frozen=True)
class Rows:
    """Activations in an encoding. dtype: of the rows before encoding, which products of them take again."""

    encoding: Encoding
    parts: Mapping[str, Tensor]
    dtype: torch.dtype

    @property
    def data(self) -> Tensor:
        return self.parts["data"]

    def decode(self) -> Tensor:
        """FP32 `[..., K]`."""
        return coder_of(self.encoding).decode(self.parts)


def coder_of(encoding: Encoding) -> Coder:
    """The file that knows an encoding. Raises UnsupportedError for a name that is none of ENCODINGS."""
    if encoding.name not in ENCODINGS:
        raise UnsupportedError(f"encoding {encoding.name!r} is unknown", remedy=f"Known: {', '.join(ENCODINGS)}.")
    return cast(Coder, import_module(f"moesaic.formats.encodings.{encoding.name}"))


def encode(x: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
    """scale: see `Coder.encode`; given if and only if the encoding is static.

    Raises UnsupportedError for a static encoding that has no tensor-wide scale, and where its blocks do not divide K.
    """
    if encoding.static != (scale is not None):
        raise ValueError(f"{encoding} and a scale of {scale} do not go together")
    if encoding.static and encoding.name not in STATIC:
        raise UnsupportedError(f"{encoding} has no tensor-wide scale", remedy=f"Those that have: {', '.join(STATIC)}.")
    return Rows(encoding, coder_of(encoding).encode(x, scale), x.dtype)
