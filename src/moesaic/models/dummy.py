"""Random weights for a model, in place and on its device: an architecture can be measured without a checkpoint.

Projections and experts get random codes (formats/dummy.py), norms ones, biases and whatever else is a vector zeros.
"""

from __future__ import annotations

import math

from torch import Tensor

from moesaic.formats.dummy import fill
from moesaic.layers.linear import Stored
from moesaic.models.decoder import Decoder

GAIN = 0.5
"""Norm of a product's row over norm of its input: below 1, so that the residual stream of a deep model stays finite."""


def fill_model(model: Decoder) -> Decoder:
    """Overwrites all weights; static input scales suit rows of unit size."""
    settles, items = [], list(model.sources())
    for open_ in dict.fromkeys(item.open for item in items if isinstance(item, Stored) and item.open):
        open_()
    for item in items:
        if isinstance(item, Stored):
            fill(item.weight, GAIN)
            settles.append(item.settle)
            if item.input_scale is not None:
                item.input_scale.fill_(0.01 if item.weight.form.name != "nvfp4" else 0.002)
        else:
            fill_plain(*item)
    for settle in dict.fromkeys(settles):
        settle()
    return model


def fill_plain(name: str, tensor: Tensor) -> None:
    if "norm" in name:
        tensor.fill_(1.0)
    elif tensor.dim() < 2:
        tensor.zero_()
    else:
        tensor.normal_(0, 1 / math.sqrt(tensor.shape[-1]))
