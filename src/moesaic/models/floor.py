"""The least time that a step can take: bytes and operations counted from the shapes, over what the data sheet promises.

A step reads dense weights, the experts that a row chose, and earlier keys and values, once each, and writes new ones.
What else moves, and links between ranks, are left out: no run can be faster. tp ranks together compute the rows of one
batch; W/tp batches run side by side on W = max(tp, ep) ranks. E experts, A experts per token, T rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.contracts.plan import ModelPlan
from moesaic.contracts.scheme import UNQUANTIZED, Scheme
from moesaic.contracts.spec import GQASpec, LayerSpec, ModelSpec, MoESpec
from moesaic.hardware import Hardware
from moesaic.planning.cost import ITEMSIZE, Piece, kv_bytes, pieces, vectors, vocabulary

PEAKS = ("fp4", "fp8", "bf16")
"""Narrow to wide."""
PEAK_OF = {"bf16": "bf16", "fp8_tensor": "fp8", "fp8_token": "fp8", "fp8_group128": "fp8", "mxfp8": "fp8",
           "nvfp4": "fp4"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """tokens: of all ranks. Of one rank: bytes, operations (a multiplication and an addition are two), least seconds.

    seconds: 0 where the hardware's rates are unknown.  bound: by what.
    """

    tokens: int
    nbytes: int
    operations: int
    seconds: float
    bound: str


def step(spec: ModelSpec, plan: ModelPlan, hardware: Hardware, requests: int, new: int, context: int) -> Step:
    """Each request of a batch goes from `context - new` to `context` positions. Drafts do not run."""
    wishes, dtype = plan.wishes, plan.base.dtype
    rows, batches = requests * new, max(wishes.tp, wishes.ep) // wishes.tp
    head = Piece("head", UNQUANTIZED, vocabulary(spec, wishes), spec.hidden, ITEMSIZE[dtype])
    routers = {index: layer.router_dtype for layer in plan.layers for index in layer.layers}
    nbytes = float(head.nbytes + rows * spec.hidden * head.size / wishes.tp)  # the head's weight, and embedded rows
    work = [(2.0 * requests * head.rows * head.columns, UNQUANTIZED)]
    for block in spec.layers:
        for piece in pieces(block, wishes, dtype, routers[block.index]):
            met, passed = routed(block, rows * batches, wishes.ep) if piece.experts else (1.0, float(rows))
            nbytes += met * piece.nbytes
            work.append((2 * passed * piece.rows * piece.columns, piece.scheme))
        kept, each = attention(block, new, context)
        nbytes += requests * kept * kv_bytes(block, wishes, dtype) + vectors(block, spec.hidden, wishes, dtype)
        work.append((requests * each / wishes.tp, UNQUANTIZED))
    slow = nbytes / hardware.bandwidth if hardware.bandwidth else 0.0
    fast = sum(count / peak(hardware, scheme) for count, scheme in work)
    operations = round(sum(count for count, _ in work))
    return Step(rows * batches, round(nbytes), operations, max(slow, fast), "memory" if slow >= fast else "operations")


def routed(block: LayerSpec, tokens: int, ranks: int) -> tuple[float, float]:
    """(experts that have any row, rows that pass through an expert) of one rank, on average, if routing is uniform."""
    assert isinstance(block.mlp, MoESpec)
    router = block.mlp.router
    return touched(router.experts, router.top_k, tokens) / ranks, tokens * router.top_k / ranks


def touched(experts: int, top_k: int, tokens: int) -> float:
    """E (1 - (1 - A/E)^T)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def attention(block: LayerSpec, new: int, context: int) -> tuple[int, int]:
    """Of one request: positions read or written, and operations over all heads.

    MLA decodes over the latent, and multiplies explicit keys and values where there are many queries.
    """
    at = block.attention
    window = min(at.window or context, context)
    pairs = seen(window, context) - seen(window, context - new)
    if isinstance(at, GQASpec):
        size = 2 * at.head_dim
    elif new == 1:
        size = 2 * at.kv_rank + at.rope_dim
    else:
        size = at.nope_dim + at.rope_dim + at.v_dim
    return min(context - new, window - 1) + new, 2 * at.heads * size * pairs


def seen(window: int, positions: int) -> int:
    """(query, key) pairs of so many positions from the first on: 1 + 2 + .., each at most `window`."""
    rising = min(window, positions)
    return rising * (rising + 1) // 2 + window * (positions - rising)


def peak(hardware: Hardware, scheme: Scheme) -> float:
    """Operations per second on the scheme's operands; where the hardware lacks them, on the next wider ones it has."""
    for name in PEAKS[PEAKS.index(PEAK_OF[scheme.activation.name]) :]:
        if name in hardware.peaks:
            return hardware.peaks[name]
    return float("inf")
