"""What one forward pass is about, passed explicitly from the runner through the model to every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic.contracts.plan import Phase
from moesaic.contracts.spec import RopeSpec
from moesaic.kernels.ops import AttentionBatch
from moesaic.layers.kv_pool import KVPool


@dataclass(frozen=True, slots=True)
class StepInput:
    """T tokens of S sequences, in sequence order; decoding sequences come first.

    tokens_T, positions_T, slots_T: INT64. A token's KV row goes to its slot before anyone reads it in this pass.
    live_T: 0 for rows that are padding; None where no row is.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    attention: AttentionBatch
    pool: KVPool
    live_T: Tensor | None = None

    @property
    def phase(self) -> Phase:
        """Decode if and only if every sequence decodes."""
        return "decode" if self.attention.decodes == len(self.attention.spans) else "prefill"


@dataclass(frozen=True, slots=True)
class LayerInput:
    """A step and the rotary angles of its positions, computed once for all layers."""

    step: StepInput
    angles: dict[RopeSpec, tuple[Tensor, Tensor]]
