"""What the sampler is told about one sampled position, and how small host data reaches the device.

Legend: R rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.engine.params import SamplingParams

if TYPE_CHECKING:
    from moesaic.engine.grammar import Guide

_UINT64 = 1 << 64


@dataclass(frozen=True, slots=True)
class Row:
    """One position of one request for which a token is wanted; the position is `len(output)`.

    prompt, output: token ids so far; read only when a penalty needs them. An `array('q')` or an int64 NumPy array is
    taken without a copy, a list is converted in time linear in its length.
    seed: any integer; with the position it determines all randomness. Completions of one request need distinct seeds.
    eos: the model's end tokens. They count as end tokens only if `params.ignore_eos` is off.
    guide: what may come at all.
    """

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    seed: int
    eos: frozenset[int] = frozenset()
    guide: Guide | None = None

    @property
    def penalised(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    @property
    def too_short_to_end(self) -> bool:
        return len(self.output) < self.params.min_tokens

    @property
    def processed(self) -> bool:
        """Whether any logit of this row changes before the choice."""
        return self.guide is not None or self.too_short_to_end or bool(self.params.logit_bias) or self.penalised

    @property
    def plain(self) -> bool:
        """The likeliest token, and nothing else asked."""
        return self.params.greedy and self.params.logprobs is None and not self.processed

    @property
    def settled(self) -> bool:
        """Whether the row of the next position can be made before this position's token is known to the host."""
        return self.guide is None and not self.penalised

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end this request."""
        return frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else self.eos)


class Fetch:
    """A tensor on its way to the host. From a GPU it is copied behind what was queued before; `read` waits for that."""

    def __init__(self, tensor: Tensor) -> None:
        self.host, self.done = tensor, None
        if tensor.device.type == "cuda":
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def read(self) -> list[Any]:
        if self.done is not None:
            self.done.synchronize()
        found: list[Any] = self.host.tolist()
        return found


def upload(
    values: npt.NDArray[Any] | Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A host array as a tensor on `device`. On CUDA through pinned memory, so that the host does not wait."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload_words(words: Sequence[int], device: torch.device) -> Tensor:
    """Unsigned 64-bit words as int64 of the same bits."""
    return upload(np.array([w % _UINT64 for w in words], dtype=np.uint64).view(np.int64), torch.int64, device)
