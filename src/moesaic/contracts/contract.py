"""What a kernel, a router or a dispatcher promises, and what a layer asks for, as data.

A backend declares one `Contract` per op and variant. The planner matches contracts with a `Need` once, when a model is
built; nothing asks again at run time. Fields that do not concern an op keep their defaults and are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moesaic.contracts.scheme import Scheme, WeightFormat

Duty = Literal["route", "weights", "factor", "reduce", "shared"]
"""What must be done exactly once on the path of a mixture: choose experts; apply the top-k weights; apply
`routed_scaling_factor`; sum over the top-k; add the shared expert."""

Layout = Literal["tokens", "sorted", "slotted"]
"""`tokens` [T, H] plus ids; `sorted` by expert, groups padded to an alignment; `slotted` [E_local, capacity, H]."""

GateUp = Literal["halves", "swapped", "interleaved"]
"""Rows of an expert's first product: gate then up, up then gate, or row by row in turn."""

FLOATS16 = frozenset({"float32", "bfloat16"})
EAGER = "cannot stand in a CUDA graph"
CACHE_OPS = frozenset({"attend_paged", "attend_encode", "attend_latent", "store_heads", "store_latent"})
"""Those that read or write the KV cache as it is stored."""


@dataclass(frozen=True, slots=True)
class Path:
    """What a stage of the mixture's path takes and leaves.

    layout, emits: of its rows before and after.  align: rows to which a `sorted` group is padded.
    ids: id space of the expert ids that it takes (dispatchers: that it emits).  counts: where slot counts live.
    does: duties that it always discharges; can: those it takes over on request.
    routes: it takes router logits instead of ids and weights.  routing: how it takes those: apart, or packed in one
    integer, which rounds the weights to BF16.
    combines: layouts that a dispatcher's way back takes; combine_does: the duties of that way back.
    encodes: a dispatcher that takes rows in the model's dtype and encodes them itself for the wire.
    """

    layout: Layout = "tokens"
    emits: Layout = "tokens"
    align: int = 1
    ids: Literal["local", "global"] = "local"
    counts: Literal["host", "device"] = "device"
    does: frozenset[Duty] = frozenset()
    can: frozenset[Duty] = frozenset()
    routes: bool = False
    routing: Literal["pair", "packed"] = "pair"
    combines: frozenset[Layout] = frozenset({"tokens"})
    combine_does: frozenset[Duty] = frozenset()
    encodes: bool = False


def path_of(op: str) -> Path:
    """What our own ops do on the path, as `kernels/ops.py` defines them."""
    does: dict[str, frozenset[Duty]] = {
        "route": frozenset({"route", "factor"}),
        "experts": frozenset({"weights", "reduce"}),
    }
    return Path(does=does.get(op, frozenset()))


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that a stage insists on: in elements, or of a rank. hidden_in: the only hidden sizes. None is no limit."""

    hidden_multiple: int = 1
    width_multiple: int = 1
    hidden_in: frozenset[int] = frozenset()
    max_top_k: int | None = None
    max_tokens: int | None = None
    max_experts: int | None = None
    max_groups_kept: int | None = None
    min_ranks: int = 1
    max_ranks: int | None = None


@dataclass(frozen=True, slots=True, order=True)
class Packed:
    """How expert weights lie in memory for a kernel: the order of the first product's rows, and how codes and scales
    are packed. One copy serves every phase and token bucket, so all kernels of a layer must want the same."""

    gate_up: GateUp = "halves"
    packing: str = "plain"

    def __str__(self) -> str:
        return f"{self.gate_up}, {self.packing}"


@dataclass(frozen=True, slots=True)
class Contract:
    """One op of one backend.

    dtypes: what it computes in (of unquantised rows and of its output).  batch_invariant: a row's result does not
    depend on which other rows run beside it.  rank: lower is preferred among equals.  requires: hardware features by
    name (see `hardware.py`).  arch: inclusive range of CUDA compute capability times ten, 90 being Hopper.
    package, versions: what must be installed.  built: False where Moesaic knows the kernel and cannot run it yet.
    broken: why it cannot run on this very machine, found by trying; empty where it can, or where nobody tried.
    formats, encodings: of the weights and rows that it multiplies; pairs, where given, lists the only combinations;
    forms, where given, the only variants of the formats that it names (groups, dtypes of scales, zero points).
    gate_up: order of the rows of the first product as the kernel wants them; packing: of its codes and scales.
    activations, expert_bias, sinks: as the names say.  kv: formats of the cache that attention reads.
    latent_only: attention that knows MLA's cache alone; heads_only: that knows keys and values of heads alone;
    head_dims: the only sizes of keys.
    scorings, logits, router_bias, groups: of routing, by name and dtype; group_scores: by which groups are ranked;
    renormalizes: whether it can, and can not, divide weights by their sum.  capturable: it can stand in a CUDA graph.
    workspace: bytes per token and element of width, roughly.
    """

    op: str
    backend: str
    devices: frozenset[str]
    dtypes: frozenset[str]
    batch_invariant: bool
    rank: float
    requires: frozenset[str] = frozenset()
    formats: frozenset[str] = frozenset({"bf16"})
    encodings: frozenset[str] = frozenset({"bf16"})
    activations: frozenset[str] = frozenset({"silu"})
    expert_bias: bool = False
    sinks: bool = False
    latent_only: bool = False
    heads_only: bool = False
    head_dims: frozenset[int] = frozenset()
    kv: frozenset[str] = frozenset({"bf16"})
    pairs: frozenset[tuple[str, str]] | None = None
    forms: frozenset[WeightFormat] = frozenset()
    arch: tuple[int, int] | None = None
    package: str | None = None
    versions: str = ""
    built: bool = True
    broken: str = ""
    capturable: bool = True
    gate_up: GateUp = "halves"
    packing: str = "plain"
    scorings: frozenset[str] = frozenset({"softmax", "sigmoid", "softmax_topk"})
    logits: frozenset[str] = FLOATS16
    router_bias: frozenset[str] = frozenset({"float32"})
    groups: bool = True
    group_scores: frozenset[str] = frozenset({"max", "top2_sum"})
    renormalizes: frozenset[bool] = frozenset({True, False})
    path: Path = Path()
    limits: Limits = Limits()
    workspace: int = 0

    @property
    def packed(self) -> Packed:
        return Packed(self.gate_up, self.packing)

    def other_cache(self, need: Need) -> bool:
        """Whether it is for the other of the two kinds of attention."""
        return self.heads_only if need.latent else self.latent_only

    def misses(self, need: Need) -> str | None:
        """The first reason why this kernel cannot serve the need, or None where it can."""
        if self.broken:
            return self.broken
        if need.device not in self.devices:
            return f"runs on {listed(self.devices)}, not on {need.device}"
        if self.arch and not self.arch[0] <= need.arch <= self.arch[1]:
            return f"is for compute capability {self.arch[0]} to {self.arch[1]}, not {need.arch}"
        if need.dtype not in self.dtypes:
            return f"computes in {listed(self.dtypes)}, not in {need.dtype}"
        if need.batch_invariant and not self.batch_invariant:
            return "its result for a row depends on the other rows, which --deterministic forbids"
        if lacking := self.requires - need.features:
            return f"needs {listed(lacking)}, which this hardware lacks"
        return self.misses_operands(need) or (EAGER if need.capturable and not self.capturable else None)

    def misses_operands(self, need: Need) -> str | None:
        """The same for what one layer brings; each op looks only at what it meets."""
        multiplies, routed = self.op in ("linear_quant", "linear_terms", "experts"), self.op == "experts"
        if multiplies and need.format not in self.formats:
            return f"takes weights in {listed(self.formats)}, not in {need.format}"
        if (multiplies or self.op == "encode") and need.encoding not in self.encodings:
            return f"takes rows in {listed(self.encodings)}, not in {need.encoding}"
        if multiplies and self.pairs is not None and (need.format, need.encoding) not in self.pairs:
            return f"does not multiply {need.format} weights with rows in {need.encoding}"
        if multiplies and (reason := self.misses_form(need)):
            return reason
        if (routed or self.op in ("activate", "mlp")) and need.activation not in self.activations:
            return f"applies {listed(self.activations)}, not {need.activation}"
        if routed and need.expert_bias and not self.expert_bias:
            return "takes no expert biases"
        if self.op == "gate" and need.logits not in self.logits:
            return f"computes router logits in {listed(self.logits)}, not in {need.logits}"
        if self.op in CACHE_OPS and need.kv not in self.kv:
            return f"reads a KV cache in {listed(self.kv)}, not in {need.kv}"
        if self.op.startswith("attend") and self.latent_only and not need.latent:
            return "attends over MLA's latent cache only"
        if self.op in CACHE_OPS and self.heads_only and need.latent:
            return "attends over keys and values of heads only, not over MLA's latent cache"
        if self.head_dims and (others := need.head_dims - self.head_dims):
            sizes = (" or ".join(map(str, sorted(each))) for each in (self.head_dims, others))
            return "attends over keys of {} elements, not of {}".format(*sizes)
        return "takes no attention sinks" if need.sinks and self.op.startswith("attend") and not self.sinks else None

    def misses_form(self, need: Need) -> str | None:
        """Only of formats that come in variants; a need that does not say which one is content with any."""
        known = [form for form in self.forms if form.name == need.format]
        if need.form is None or not known or need.form in known:
            return None
        zero = " and zero points" * need.form.zero_points
        only = listed(frozenset(f"{form} with {form.scale_dtype} scales" for form in known))
        return f"takes {only}, not {need.form} with {need.form.scale_dtype} scales{zero}"


def listed(names: frozenset[str]) -> str:
    """`a`, `a or b`, in alphabetical order."""
    return " or ".join(sorted(names))


@dataclass(frozen=True, slots=True)
class Need:
    """What one build asks of every op (capturable: to stand in a CUDA graph, as decoding does; latent: its attention is
    MLA; head_dims: sizes of its keys; kv: format of its cache), and, from `format` on, one layer of its own."""

    device: str
    dtype: str
    batch_invariant: bool = False
    features: frozenset[str] = frozenset()
    arch: int = 0
    capturable: bool = False
    latent: bool = False
    head_dims: frozenset[int] = frozenset()
    kv: str = "bf16"
    format: str = "bf16"
    encoding: str = "bf16"
    activation: str = "silu"
    expert_bias: bool = False
    sinks: bool = False
    form: WeightFormat | None = None
    logits: str = "float32"

    @property
    def stored(self) -> str:
        """The format with its group, where it has one."""
        return self.format if self.form is None else str(self.form)


def asks_of(scheme: Scheme) -> dict[str, Any]:
    """The fields of a Need that a scheme decides. form: None for formats without variants."""
    weight = scheme.weight
    return {"format": weight.name, "encoding": scheme.activation.name, "form": weight if weight.group else None}


@dataclass(frozen=True, slots=True)
class Rejection:
    """A candidate that was not taken, and why."""

    candidate: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel taken for one op, and every one that was not."""

    op: str
    chosen: str
    rejected: tuple[Rejection, ...] = ()

    def explain(self) -> str:
        """One line per candidate, the chosen one first."""
        lines = [f"{self.op}: {self.chosen}"]
        lines += [f"  not {r.candidate}: {r.reason}" for r in self.rejected]
        return "\n".join(lines)
