"""One projection through a dialect: from the tensors of a checkpoint to a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.spec import LinearSpec, ModelSpec
from moesaic.formats.base import QuantTensor, format_of
from moesaic.formats.checkpoint import Dialect, read_quantization
from tests import dialect_cases as cases

NAME = "model.layers.1.mlp.experts.2.down_proj"


def with_width(rows: int, columns: int) -> ModelSpec:
    """The tiny model, whose experts' down projections are of that size: no layer ever multiplies with them."""
    spec = cases.describe(cases.TINY)
    mlp: Any = spec.layers[1].mlp
    mlp = replace(mlp, down=replace(mlp.down, inputs=columns, outputs=rows))
    return replace(spec, layers=(spec.layers[0], replace(spec.layers[1], mlp=mlp)), drafts=())


def dialect_for(config: Mapping[str, Any], rows: int, columns: int, stored: Mapping[str, Tensor] | None = None,
                name: str = NAME) -> tuple[Dialect, LinearSpec]:  # fmt: skip
    """The dialect and the projection `name` of it. stored: tensors of that projection, for what they settle."""
    dialect = read_quantization({"quantization_config": config})
    assert dialect
    spec, _ = dialect.apply(with_width(rows, columns))
    headers = {key: tensor.dtype for key, tensor in (stored or {}).items()}
    for e in range(4):  # all experts alike, as `settle` demands
        headers |= {key.replace("experts.2.", f"experts.{e}."): dtype for key, dtype in headers.items()}
    dialect, spec, _ = dialect.settle(spec, headers)
    return dialect, cases.parts(spec)[name]


def fields_of(dialect: Dialect, part: LinearSpec, tensors: Mapping[str, Tensor], name: str = NAME) -> dict[str, Tensor]:
    """The canonical fields and the input scale; every tensor must be wanted, and every wanted one there."""
    sources = {source.name: source for source in dialect.sources(part, name)}
    assert not set(tensors) - set(sources)
    assert not {key for key, source in sources.items() if not source.optional} - set(tensors)
    read = {sources[key].field: sources[key].read(tensor, part) for key, tensor in tensors.items()}
    return {field: value for field, value in read.items() if field}


def weight_of(part: LinearSpec, fields: Mapping[str, Tensor]) -> QuantTensor:
    """Of exactly the fields, shapes and dtypes that the format means."""
    form = part.scheme.weight
    wanted = format_of(form).fields(form)
    for key, field in wanted.items():
        assert tuple(fields[key].shape) == field.shape((part.outputs,), part.inputs), key
        assert fields[key].dtype == (field.dtype or torch.bfloat16), key
    return QuantTensor(form, (part.outputs,), part.inputs, {key: fields[key] for key in wanted})


def load(config: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: int,
         columns: int) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(weight in FP32, input scale). tensors: named without the module."""
    stored = {f"{NAME}.{key}": tensor for key, tensor in tensors.items()}
    dialect, part = dialect_for(config, rows, columns, stored)
    fields = fields_of(dialect, part, stored)
    return weight_of(part, fields).dequantize(), fields.get("input_scale")
