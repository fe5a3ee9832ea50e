"""What a plan costs before it runs: memory per rank, bytes and operations of a step, and the least time they take.

Bytes and operations are counted from the shapes; the floor divides them by what the hardware's data sheet promises, so
that no run can be faster. T tokens in a step, E experts, A experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.contracts.plan import ModelPlan
from moesaic.contracts.scheme import Scheme
from moesaic.contracts.spec import LinearSpec, MLASpec, ModelSpec, MoESpec
from moesaic.formats.sizes import weight_bytes
from moesaic.hardware import Hardware
from moesaic.planning.needs import experts_scheme, stacks_of

RESERVE = 0.08
"""Part of a device's memory that activations, graphs and the allocator need."""
PEAK_OF = {"bf16": "bf16", "fp8_tensor": "fp8", "fp8_token": "fp8", "fp8_group128": "fp8", "mxfp8": "fp8",
           "nvfp4": "fp4"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """Of one rank: bytes read, multiplications and additions, and the least seconds."""

    nbytes: int
    operations: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Memory of one rank. tokens: that its KV cache can hold.  ranks_more: that are lacking, 0 where it fits."""

    weights: int
    usable: int
    tokens: int
    ranks_more: int

    @property
    def fits(self) -> bool:
        return self.ranks_more == 0


def touched(experts: int, top_k: int, tokens: int) -> float:
    """Experts that a step of so many tokens meets, on average, if routing is uniform: E (1 - (1 - A/E)^T)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def step(spec: ModelSpec, plan: ModelPlan, hardware: Hardware, tokens: int, context: int) -> Step:
    """One step of `tokens` rows, each over `context` positions (0: attention's own reads are left out)."""
    world = max(plan.wishes.tp, plan.wishes.ep)
    nbytes, seconds, operations = 0.0, 0.0, 0
    for block in spec.layers:
        dense = [(part, part.runs) for _, parts in stacks_of(block) for part in parts]
        layer_bytes = float(sum(stored(part, scheme) for part, scheme in dense))
        works = [(2 * tokens * part.inputs * part.outputs, scheme) for part, scheme in dense]
        if isinstance(block.attention, MLASpec):
            kv_b = block.attention.kv_b
            layer_bytes += 2 * kv_b.inputs * kv_b.outputs
        if isinstance(block.mlp, MoESpec):
            mix, scheme = block.mlp, experts_scheme(block.mlp)
            parts = (mix.gate, mix.up, mix.down)
            layer_bytes += touched(mix.router.experts, mix.router.top_k, tokens) * sum(stored(p, scheme) for p in parts)
            works += [(2 * tokens * mix.router.top_k * p.inputs * p.outputs, scheme) for p in parts]
        nbytes += layer_bytes + 2 * block.attention.kv_width * context * tokens
        operations += sum(work for work, _ in works)
        seconds += sum(work / peak(hardware, scheme) for work, scheme in works)
    head = spec.vocab * spec.hidden
    nbytes, operations = nbytes + 2 * head, operations + 2 * tokens * head
    slow = nbytes / hardware.bandwidth if hardware.bandwidth else 0.0
    return Step(round(nbytes / world), operations // world, max(slow, seconds) / world)


def stored(part: LinearSpec, scheme: Scheme) -> int:
    return weight_bytes(scheme.weight, part.outputs, part.inputs)


def peak(hardware: Hardware, scheme: Scheme) -> float:
    """Products per second in the scheme's operands; where the hardware lacks them, in the next wider ones it has."""
    wanted = PEAK_OF[scheme.activation.name]
    for name in ("fp4", "fp8", "bf16")[("fp4", "fp8", "bf16").index(wanted) :]:
        if name in hardware.peaks:
            return hardware.peaks[name]
    return float("inf")


def fit(plan: ModelPlan, hardware: Hardware, context: int) -> Fit:
    """Whether weights and one context fit; if not, how many more ranks of this kind would hold them."""
    usable = int(hardware.memory * (1 - RESERVE))
    kv = plan.kv_bytes_per_token
    tokens = max(0, (usable - plan.weight_bytes) // kv) if kv else 0
    world = max(plan.wishes.tp, plan.wishes.ep)
    lacking = plan.weight_bytes + kv * context - usable
    more = -(-(world * (plan.weight_bytes + kv * context)) // usable) - world if lacking > 0 else 0
    return Fit(plan.weight_bytes, usable, tokens, max(more, 1) if lacking > 0 else 0)
