"""What a model takes of a rank's memory, counted from its shapes. Of the time that it takes: `models/floor.py`.

Of max(tp, ep) ranks each holds 1/tp of every projection that is cut and of the vocabulary (embedding and head), and
E/ep experts (where ep is 1: all E, cut). Whole on each are norms, routers, MLA's `down` and its cache, and what belongs
to drafts alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.contracts.plan import ModelPlan, Wishes
from moesaic.contracts.scheme import UNQUANTIZED, Scheme
from moesaic.contracts.spec import GQASpec, KVParts, LayerSpec, MLASpec, ModelSpec, MoESpec
from moesaic.formats.sizes import weight_bytes
from moesaic.hardware import Hardware
from moesaic.planning.needs import experts_scheme, stacks_of

RESERVE = 0.08
"""Part of a device's memory that activations, graphs and the allocator need."""
ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Piece:
    """A weight [rows, columns] on one rank, and its bias. size: bytes of a plain element.  experts: 0: it is dense."""

    role: str
    scheme: Scheme
    rows: int
    columns: int
    size: int
    bias: bool = False
    experts: int = 0

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        plain = self.rows * self.size if self.bias else 0
        return weight_bytes(self.scheme.weight, self.rows, self.columns, 8 * self.size) + plain


def pieces(block: LayerSpec, wishes: Wishes, dtype: str, router: str = "float32") -> Iterator[Piece]:
    """Every weight of a block that is multiplied. router: dtype of the gate."""
    at, mlp, tp, size = block.attention, block.mlp, wishes.tp, ITEMSIZE[dtype]
    for role, parts in stacks_of(block):
        inner, least = role in ("o", "mlp_down"), at.head_dim if isinstance(at, GQASpec) and role == "qkv" else 1
        for part in parts:  # a head is never cut: a kv head is on several ranks where there are fewer than ranks
            rows = part.outputs if inner or role == "down" else max(part.outputs // tp, least)
            yield Piece(role, part.runs, rows, part.inputs // (tp if inner else 1), size, part.bias)
    if isinstance(at, MLASpec):
        yield Piece("kv_b", UNQUANTIZED, at.kv_b.outputs // tp, at.kv_b.inputs, size)
    if isinstance(mlp, MoESpec):
        of = (mlp.router.experts, mlp.gate.inputs, ITEMSIZE[router], bool(mlp.router.logit_bias))
        yield Piece("router", UNQUANTIZED, *of)
        width, count = mlp.intermediate // (tp if wishes.ep == 1 else 1), mlp.router.experts // wishes.ep
        scheme, hidden = experts_scheme(mlp), mlp.gate.inputs
        for part, rows, columns in ((mlp.gate, width, hidden), (mlp.up, width, hidden), (mlp.down, hidden, width)):
            yield Piece("experts", scheme, rows, columns, size, part.bias, count)


def vectors(block: LayerSpec, hidden: int, wishes: Wishes, dtype: str) -> int:
    """Bytes of a block's norms, sinks and selection bias."""
    at, mlp = block.attention, block.mlp
    biases = mlp.router.experts if isinstance(mlp, MoESpec) and mlp.router.bias else 0
    if isinstance(at, MLASpec):
        norms = at.kv_rank + (at.q_a.outputs if at.q_a else 0)
    else:
        norms, biases = 2 * at.head_dim * bool(at.q_norm), biases + bool(at.sinks) * at.heads // wishes.tp
    return ITEMSIZE[dtype] * (2 * hidden + norms) + 4 * biases


def block_bytes(block: LayerSpec, hidden: int, wishes: Wishes, dtype: str, router: str = "float32") -> int:
    held = sum((each.experts or 1) * each.nbytes for each in pieces(block, wishes, dtype, router))
    return held + vectors(block, hidden, wishes, dtype)


def experts_bytes(block: LayerSpec, wishes: Wishes, dtype: str) -> int:
    """One copy of a block's experts on one rank."""
    return sum(each.experts * each.nbytes for each in pieces(block, wishes, dtype))


def vocabulary(spec: ModelSpec, wishes: Wishes) -> int:
    """Rows of embedding and head on one rank; the last may have fewer."""
    return -(-spec.vocab // wishes.tp)


def weights(spec: ModelSpec, wishes: Wishes, dtype: str) -> int:
    """Bytes on one rank of what is in no block."""
    size, hidden = ITEMSIZE[dtype], spec.hidden
    joins = sum(Piece("join", d.join.runs, d.join.outputs, d.join.inputs, size).nbytes for d in spec.drafts)
    rows = (2 - spec.tied) * vocabulary(spec, wishes)
    return size * hidden * (rows + 1 + 3 * len(spec.drafts)) + joins


def kv_bytes(block: LayerSpec, wishes: Wishes, dtype: str) -> int:
    """Per token on one rank. MLA's row serves all heads, so that each rank has it; kv heads are dealt out."""
    at, parts = block.attention, block.attention.kv_parts
    if isinstance(at, GQASpec):
        parts = KVParts(parts.coded[: 2 * max(at.kv_heads // wishes.tp, 1)])
    return parts.fp8_bytes if wishes.kv == "fp8" else ITEMSIZE[dtype] * parts.width


@dataclass(frozen=True, slots=True)
class Fit:
    """Memory of one rank: weights, what may be used, what lacks for them and one context, tokens that KV can hold."""

    weights: int
    usable: int
    lacking: int
    tokens: int


def fit(plan: ModelPlan, hardware: Hardware, context: int) -> Fit:
    usable, kv = int(hardware.memory * (1 - RESERVE)), plan.kv_bytes_per_token
    room = usable - plan.weight_bytes
    return Fit(plan.weight_bytes, usable, max(0, kv * context - room), max(0, room) // kv)
