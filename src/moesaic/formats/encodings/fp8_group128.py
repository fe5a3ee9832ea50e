"""`fp8_group128`: E4M3 with an FP32 scale per 128 along K, `[..., ceil(K/128)]`; the last group may be smaller.

value = data x scale, scale = amax / 448.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from moesaic.formats import blocks, e4m3

GROUP = 128


def encode(x: Tensor, scale: None) -> dict[str, Tensor]:
    groups = _groups(x.float())
    found = blocks.amax(groups) / e4m3.MAX
    data = e4m3.cast(blocks.divide(groups, found[..., None])).flatten(-2)
    return {"data": data[..., : x.shape[-1]].contiguous(), "scale": found}


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    data = parts["data"]
    groups = _groups(data.float()).mul_(parts["scale"][..., None])
    return groups.flatten(-2)[..., : data.shape[-1]].contiguous()


def _groups(x: Tensor) -> Tensor:
    """`[..., K]` -> `[..., ceil(K/128), 128]`, padded with zeros where 128 does not divide K."""
    if short := -x.shape[-1] % GROUP:
        x = pad(x, (0, short))
    return blocks.split(x, GROUP)
