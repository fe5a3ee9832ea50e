"""Which tensors of a checkpoint fill which field of a weight: the value that dialects return and the loader follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.contracts.spec import LinearSpec
from moesaic.errors import CheckpointError
from moesaic.formats.dialects.check import check_field

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Convert = Callable[[Tensor, LinearSpec], Tensor]


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor of one projection.

    field: the canonical field that it fills (`formats/base.py`), or `input_scale`, or None where it is only checked.
    shape, dtypes: what the checkpoint must hold; `also` are other shapes that mean the same (a scalar, a column).
    convert: pure, (tensor as stored, projection) -> the field; None where the tensor is the field.
    optional: the checkpoint may lack it.
    """

    name: str
    field: str | None
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    convert: Convert | None = None
    optional: bool = False
    also: tuple[tuple[int, ...], ...] = ()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.shape, *self.also)

    def check(self, value: Tensor) -> None:
        """Of the converted value. Raises CheckpointError naming the tensor."""
        check_field(self.name, self.field, value)

    def read(self, tensor: Tensor, part: LinearSpec) -> Tensor:
        """Shape, dtype, conversion and values, all checked. Raises CheckpointError naming the tensor."""
        check_stored(self.name, tensor, self.shapes, self.dtypes)
        value = self.convert(tensor, part) if self.convert else tensor
        self.check(value)
        return value


@dataclass(frozen=True)
class FusedSource:
    """One checkpoint tensor that holds a field of many experts.

    take: (tensor as stored, expert) -> {(projection, field): view}; a projection is gate, up or down, a field is a
    canonical one or `bias`. Views only: nothing is copied until it is put where it belongs.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    take: Callable[[Tensor, int], Mapping[tuple[str, str], Tensor]]

    def check(self, tensor: Tensor) -> None:
        """Shape, dtype and values of the whole tensor. Raises CheckpointError naming it."""
        check_stored(self.name, tensor, (self.shape,), self.dtypes)
        for field in {field for _, field in self.take(tensor, 0)}:
            check_field(self.name, "data" if field == "bias" else field, tensor)


def check_stored(name: str, tensor: Tensor, shapes: tuple[tuple[int, ...], ...],
                 dtypes: tuple[torch.dtype, ...]) -> None:  # fmt: skip
    if tuple(tensor.shape) not in shapes:
        meant = " or ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(
            f"its shape is {list(tensor.shape)}; its quantization_config means {meant}",
            where=name, remedy="Check the sizes in config.json, or download the checkpoint again.",
        )  # fmt: skip
    if tensor.dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise CheckpointError(
            f"its dtype is {str(tensor.dtype).removeprefix('torch.')}; its quantization_config means {known}",
            where=name, remedy="Check quantization_config, or download the checkpoint again.",
        )  # fmt: skip
