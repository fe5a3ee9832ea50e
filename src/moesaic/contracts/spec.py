"""What a model *is*, as data: the value that every architecture's `describe(config)` returns.

No tensors, no device, no torch: a spec can be made, compared and planned for anywhere. Layers are built from it, the
loader finds checkpoint tensors through it, and nothing below `models/` ever asks which architecture it came from.
Sizes are element counts; names are checkpoint module paths without the trailing `.weight` / `.bias`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moesaic.contracts.scheme import UNQUANTIZED, Scheme

Scoring = Literal["softmax", "sigmoid", "softmax_topk"]
GroupScore = Literal["max", "top2_sum"]


@dataclass(frozen=True, slots=True)
class Activation:
    """What joins gate g and up u. `silu`: g sigmoid(g) u.

    `swiglu_oai` (gpt-oss): g capped at `limit`, u clamped to +-limit, then (u + 1) g sigmoid(alpha g).
    """

    kind: Literal["silu", "swiglu_oai"] = "silu"
    limit: float = 7.0
    alpha: float = 1.702


SILU = Activation()


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN context extension (Peng et al. 2023, arXiv 2309.00071), with the truncation choice of the config."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding over `dim` elements; `interleaved` pairs (0,1),(2,3).. instead of (i, i + dim/2)."""

    dim: int
    theta: float
    interleaved: bool = False
    linear_factor: float = 1.0
    yarn: Yarn | None = None


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One stored projection: `name` is the checkpoint module, weight `[out, in]`, bias `[out]` if any.

    scheme: how the checkpoint stores it.  held: how it is kept and multiplied instead, where the user asked for that.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    scheme: Scheme = UNQUANTIZED
    held: Scheme | None = None

    @property
    def runs(self) -> Scheme:
        """The scheme in memory."""
        return self.held or self.scheme


@dataclass(frozen=True, slots=True)
class KVParts:
    """The row that a token leaves in the KV cache of a layer: `coded` parts, then `plain` elements.

    In an FP8 cache (formats/kv.py) each coded part has a scale of its own, and the plain ones stay in BF16.
    """

    coded: tuple[int, ...]
    plain: int = 0

    @property
    def width(self) -> int:
        """Elements."""
        return sum(self.coded) + self.plain

    @property
    def exponents_at(self) -> int:
        """Bytes of an FP8 row before its exponents."""
        return sum(self.coded) + 2 * self.plain

    @property
    def fp8_bytes(self) -> int:
        """Of an FP8 row: codes, plain elements, an exponent per part, up to a multiple of 16."""
        return -(-(self.exponents_at + len(self.coded)) // 16) * 16


@dataclass(frozen=True, slots=True)
class GQASpec:
    """Grouped-query attention. `window`: how many last positions a query sees, itself included; None is all.

    `q_norm` / `k_norm`: checkpoint names of per-head RMS norms applied before rope, or None. `sinks`: tensor name of a
    logit per head that joins the softmax's denominator and carries no value (arXiv 2309.17453), or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    q: LinearSpec
    k: LinearSpec
    v: LinearSpec
    o: LinearSpec
    q_norm: str | None = None
    k_norm: str | None = None
    window: int | None = None
    sinks: str | None = None

    @property
    def kv_parts(self) -> KVParts:
        """What a token leaves in the KV pool: the keys of each head, then the values."""
        return KVParts((self.head_dim,) * (2 * self.kv_heads))


@dataclass(frozen=True, slots=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1).

    `q_a` is None where queries are not low-rank (then `q_b` reads the hidden state). The norms of the two latents have
    their own epsilon, which is not the model's.
    """

    heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    rope: RopeSpec
    q_a: LinearSpec | None
    q_a_norm: str | None
    q_b: LinearSpec
    kv_a: LinearSpec
    kv_a_norm: str
    kv_b: LinearSpec
    o: LinearSpec
    latent_norm_eps: float = 1e-6
    window: int | None = None

    @property
    def kv_parts(self) -> KVParts:
        """What a token leaves in the KV pool: the normalised latent, then the rotated shared key."""
        return KVParts((self.kv_rank,), self.rope_dim)


@dataclass(frozen=True, slots=True)
class MLPSpec:
    """A gated feed-forward: down(activation(gate(x), up(x)))."""

    gate: LinearSpec
    up: LinearSpec
    down: LinearSpec
    activation: Activation = SILU


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How tokens choose experts. `weight` and `bias` are tensor names; the bias corrects selection, never weights.

    Order: logits, + `logit_bias` (a tensor name too) -> score -> + bias -> keep `top_groups` of `groups` by
    `group_score` -> top-k -> weights are the unbiased scores -> divided by their sum if `renormalize` -> times `scale`.
    `softmax_topk`: the score is the logit, and the weights are the softmax of the chosen ones.
    """

    experts: int
    top_k: int
    scoring: Scoring
    weight: str
    bias: str | None = None
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    logit_bias: str | None = None


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """How a checkpoint keeps all experts of a layer in one tensor per product.

    gate_up, down: tensors [E, 2I, D] and [E, D, I], or, where `transposed`, [E, D, 2I] and [E, I, D].
    biases: their tensors, [E, 2I] and [E, D], where the experts have them.
    interleaved: gate and up take turns along 2I, gate first; otherwise the first half is gate.
    """

    gate_up: str
    down: str
    biases: tuple[str, str] | None = None
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture layer. Expert names hold `{e}`; `shared` is added unscaled to the routed sum.

    fused: how an unquantised checkpoint stores the experts, where they are not modules of their own.
    """

    router: RouterSpec
    gate: LinearSpec
    up: LinearSpec
    down: LinearSpec
    shared: MLPSpec | None = None
    activation: Activation = SILU
    fused: FusedExperts | None = None

    @property
    def intermediate(self) -> int:
        return self.gate.outputs


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A pre-norm decoder block: x += attention(norm(x)); x += mlp(norm(x))."""

    index: int
    input_norm: str
    post_norm: str
    attention: GQASpec | MLASpec
    mlp: MLPSpec | MoESpec


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """A multi-token-prediction layer (DeepSeek-V3, arXiv 2412.19437 section 2.2).

    h' = block(join([embed_norm(embedding of the next token), hidden_norm(h)])); logits = head(final_norm(h')).
    `embed` / `head` name the checkpoint's own copies, which may be absent where they are shared with the model.
    """

    block: LayerSpec
    embed_norm: str
    hidden_norm: str
    join: LinearSpec
    final_norm: str
    embed: str
    head: str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model, complete but for its numbers."""

    architecture: str
    hidden: int
    vocab: int
    norm_eps: float
    max_length: int
    embed: str
    final_norm: str
    head: str
    tied: bool
    layers: tuple[LayerSpec, ...]
    drafts: tuple[DraftSpec, ...] = ()
    checkpoint_dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    ignore: tuple[str, ...] = field(default=())
    """Regular expressions of checkpoint tensors that carry nothing to load (such as stored rotary frequencies)."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the checkpoint was read."""

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotary tables, in order of first use."""
        blocks = [*self.layers, *(draft.block for draft in self.drafts)]
        return tuple(dict.fromkeys(block.attention.rope for block in blocks))
