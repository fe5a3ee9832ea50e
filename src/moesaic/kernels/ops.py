"""The ops: every computation that a backend may implement, as one typed vocabulary.

`reference.py` holds a plain torch twin of each, under the same name. A backend implements any subset. A model gets one
`Ops` object, filled at build time by `registry.select`, and calls nothing else for heavy work.

Shape letters: T tokens, D hidden (or any feature) size, N outputs, E experts, I expert width, A experts per token,
H query heads, G kv heads, K key size, V value size, L context length, S sequences, P slots of the KV pool, W pool row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.contracts.spec import Activation, KVParts, RouterSpec
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows

OP_NAMES = ("linear", "encode", "linear_quant", "rms_norm", "add_rms_norm", "rotate", "activate", "route", "experts",
            "attend_paged", "attend_dense")  # fmt: skip
FUSED = ("mlp", "gate", "store_latent", "attend_latent", "top_two", "linear_terms", "add_norm_encode", "store_heads",
         "attend_encode")  # fmt: skip
"""Optional ops, each equal to several of the others. A layer calls one where the plan found a backend that has it, and
composes it otherwise. `experts_terms` is part of `experts`: a backend of those has it too, or it has not."""
PROMPTS = frozenset({"attend_dense"})
"""Ops that are called for prompts only, in no step that only decodes."""


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence in a step: queries are its last `count` of `length` positions."""

    start: int
    count: int
    length: int


Context = tuple[Tensor, Tensor, Tensor]
"""(slots [S, L], lengths [S], hidden [S, L]) of some sequences of an AttentionBatch."""


class Kept:
    """A property that is computed once, unless while something is traced: a trace must not keep its tensors."""

    def __init__(self, make: Callable[[Any], Tensor]) -> None:
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, owner: Any, kind: type) -> Tensor:
        value = self.make(owner)
        if not torch.compiler.is_compiling():
            vars(owner)[self.name] = value
        return value


@dataclass(frozen=True)
class AttentionBatch:
    """Where each sequence's context lies in the KV pool. Made once per step, read by every layer, never mutated.

    spans: one per sequence, in row order; the first `decodes` of them have count == 1.
    table_SB: pool block that holds the positions from b * block on, of sequence s; 0 behind the end of its context.
    block: positions per entry; 1 makes the table one of slots. INT32, or INT64 where it is.
    spans_S3: the spans as INT64 on the table's device.
    fresh_S: INT64, how many of a context's last positions this very step writes, where sequences are rows of one
    another (a prompt in a graph of decoding); None: as many as the sequence has rows.
    Kernels that walk the table read it as it is; the other views are made when somebody first asks for them.
    """

    spans: tuple[Span, ...]
    decodes: int
    table_SB: Tensor
    block: int
    spans_S3: Tensor
    fresh_S: Tensor | None = None

    @staticmethod
    def of(spans: tuple[Span, ...], decodes: int, slots_SL: Tensor) -> AttentionBatch:
        """From INT64 slots; those behind a context's end may be anything. Copies the spans to their device."""
        spans_S3 = torch.tensor([(span.start, span.count, span.length) for span in spans], device=slots_SL.device)
        outside_SL = torch.arange(slots_SL.shape[1], device=slots_SL.device) >= spans_S3[:, 2:]
        return AttentionBatch(spans, decodes, slots_SL.masked_fill(outside_SL, 0), 1, spans_S3)

    @property
    def lengths_S(self) -> Tensor:
        """INT64 context lengths."""
        return self.spans_S3[:, 2]

    @Kept
    def slots_SL(self) -> Tensor:
        """INT64 pool slot of position l of sequence s, 0 behind the end of its context.

        Block 0 is never written, so its rows stay zero. A stale row of an earlier owner may hold NaN: 0 * NaN is NaN.
        """
        if self.block == 1:
            return self.table_SB
        within = torch.arange(self.block, device=self.table_SB.device)
        slots_SL = (self.table_SB.long()[:, :, None] * self.block + within).flatten(1)[:, : self.longest]
        return slots_SL.masked_fill_(self.outside_SL, 0)

    @property
    def longest(self) -> int:
        """Positions for which the table has room."""
        return min(max(span.length for span in self.spans), self.table_SB.shape[1] * self.block)

    @property
    def outside_SL(self) -> Tensor:
        """Boolean: position l is behind the context of sequence s."""
        width = self.table_SB.shape[1] if self.block == 1 else self.longest
        return torch.arange(width, device=self.spans_S3.device) >= self.lengths_S[:, None]

    @Kept
    def hidden_SL(self) -> Tensor:
        """FP32, 0 where position l is in the context of sequence s and -inf behind its end."""
        outside_SL = self.outside_SL
        return torch.zeros(outside_SL.shape, device=outside_SL.device).masked_fill_(outside_SL, float("-inf"))

    def narrow(self, sequences: slice | Tensor, length: int) -> Context:
        """The first `length` positions of some sequences."""
        return self.slots_SL[sequences, :length], self.lengths_S[sequences], self.hidden_SL[sequences, :length]

    def decoding(self) -> AttentionBatch:
        """The sequences at the front that decode, alone."""
        return self if self.decodes == len(self.spans) else self.part(slice(0, self.decodes), self.decodes)

    def prompts(self) -> AttentionBatch:
        """The other ones."""
        return self.part(slice(self.decodes, len(self.spans)), 0) if self.decodes else self

    def part(self, sequences: slice, decodes: int) -> AttentionBatch:
        fresh_S = None if self.fresh_S is None else self.fresh_S[sequences]
        return AttentionBatch(self.spans[sequences], decodes, self.table_SB[sequences], self.block,
                              self.spans_S3[sequences], fresh_S)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KVView:
    """How attention reads one pool row: `kv_heads` keys of `key_dim` from 0, values of `value_dim` from `value_at`.

    In the absorbed form of MLA the value *is* the first part of the key: value_at == 0 with one kv head.
    A pool of bytes holds the same in FP8 (formats/kv.py).
    """

    kv_heads: int
    key_dim: int
    value_at: int
    value_dim: int

    @property
    def latent(self) -> bool:
        return self.value_at == 0

    @property
    def parts(self) -> KVParts:
        """Of a row: keys, then values; or latent and rotary key."""
        if self.latent:
            return KVParts((self.value_dim,), self.key_dim - self.value_dim)
        return KVParts((self.key_dim,) * self.kv_heads + (self.value_dim,) * self.kv_heads)


@dataclass(frozen=True, slots=True)
class Softmax:
    """How scores become weights: as the arguments of `attend_paged`."""

    scale: float
    window: int | None = None
    sinks_H: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """What becomes of the heads of grouped-query attention before they are used: an RMS norm of each query and each
    key (None: there is none), then the rotation of as many first elements as there are angles. dtype: of the queries.
    """

    q_K: Tensor | None
    k_K: Tensor | None
    eps: float
    interleaved: bool
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Latent:
    """What multi-head latent attention does with a latent of R elements and a rotary key of P, apart from products.

    w_k [H, N, R], w_v [H, V, R]: the key and value halves of kv_b.  norm_R, eps: of the latent.
    column: where latent and key begin in the rows that they come in.  interleaved: as in `rotate`.
    """

    w_k_HNR: Tensor
    w_v_HVR: Tensor
    norm_R: Tensor
    eps: float
    scale: float
    interleaved: bool
    column: int = 0


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """All experts of a layer. Made once; the tensors inside are storage, which a reload writes anew.

    w13 [E, 2I, D]: gate rows, then up rows (two segments).  w2 [E, D, I].  between: the encoding of the second
    product's rows, with its calibrated scale where it is static.  biases: ([E, 2I], [E, D]) in the model's dtype.
    packing: the order of the bytes in that storage: `plain`, as the formats say, or what a backend made of it, which
    only those kernels read whose contract names it.
    """

    w13: QuantTensor
    w2: QuantTensor
    activation: Activation
    between: Encoding
    between_scale: Tensor | None = None
    biases: tuple[Tensor, Tensor] | None = None
    packing: str = "plain"

    def must_be(self, packing: str) -> None:
        """Raises ValueError for weights that are packed otherwise: a kernel would read them as other numbers."""
        if self.packing != packing:
            raise ValueError(f"weights packed as {self.packing!r}, not as {packing!r}")


@dataclass(frozen=True, slots=True)
class ExpertTerms:
    """What `experts` leaves for its reader to add up: sum over a of weights[t, a] y[t A + a] where ids[t, a] >= 0, in
    FP32 in the order of a, rounded to y's dtype; then, rounded once more, `onto`, where something is added to it.

    y [T A, D]: an expert's result each; of ids -1 undefined.  ids INT32, weights FP32 [T, A], contiguous.
    """

    y_RD: Tensor
    ids_TA: Tensor
    weights_TA: Tensor
    onto_TD: Tensor | None = None


class Ops(Protocol):
    """The callable vocabulary. All inputs are read-only unless said; outputs are fresh tensors."""

    def linear(self, x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """x w^T + bias in x's dtype, accumulated in FP32. -> [T, N]."""
        ...

    def encode(self, x_TD: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
        """Rows in an encoding; scale: FP32 scalar, given if and only if the encoding is static."""
        ...

    def linear_quant(self, x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
        """x w^T + bias of the values that the codes stand for, accumulated in FP32. -> [T, N] in x.dtype."""
        ...

    def rms_norm(self, x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * w over the last axis, in FP32, rounded once to x's dtype."""
        ...

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual), the sum rounded to x's dtype first."""
        ...

    def rotate(self, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
        """Rotary embedding of the last axis (cos and sin hold D/2 FP32 columns).

        Pairs are (i, i + D/2), or (2i, 2i+1) where interleaved; either way the output holds all first elements, then
        all second ones (a fixed permutation common to queries and keys, which their products do not see).
        """
        ...

    def activate(self, gate_up_TI: Tensor, activation: Activation) -> Tensor:
        """[T, 2I] holding gate then up -> what `Activation` says of them, in FP32, rounded once. -> [T, I]."""
        ...

    def route(self, logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
        """Router logits (FP32 or BF16) -> ids INT32 [T, A] and weights FP32 [T, A], the factor included.

        Ties go to the lower expert id. Order of a row's experts: by selection score, descending.
        """
        ...

    def experts(self, x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """sum over a of weights[t,a] * expert[ids[t,a]](x[t]), an expert being
        w2 encode(activation(w13 x + bias13)) + bias2. -> [T, D] in x.dtype.

        Ids are local; -1 contributes nothing. Layout `tokens` in, `tokens` out; applies top-k weights to the output
        and reduces over A in FP32.
        """
        ...

    def attend_paged(self, q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                     window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
        """Causal attention of every row over its sequence's rows of the pool (already written). -> [T, H, V].

        A query at position p sees positions max(0, p - window + 1) .. p. Softmax in FP32. sinks_H: a logit per head
        that joins the softmax's denominator and carries no value (gpt-oss).
        """
        ...

    def attend_dense(self, q_THK: Tensor, k_LHK: Tensor, v_LHV: Tensor, scale: float,
                     window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
        """Causal attention of one sequence given explicit keys and values per query head: queries are the last T of
        L positions. -> [T, H, V]."""
        ...

    # Fused, optional: see FUSED.

    def mlp(self, x_TD: Tensor, w13_ID: Tensor, w2_DI: Tensor, activation: Activation,
            onto_TD: Tensor | None = None) -> Tensor:  # fmt: skip
        """onto + w2 activate(w13 x), where w13 [2I, D] holds gate rows, then up rows. Rounds less than its parts do."""
        ...

    def gate(self, x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, bias_E: Tensor | None, spec: RouterSpec,
             live_T: Tensor | None = None, counts_E: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`route` of the logits w x + logit_bias. In FP32 throughout where w and logit_bias are FP32 (bias always is);
        where they are BF16, the logits are rounded to it.

        live_T: INT64, 0 for rows that are padding: their ids are -1.  counts_E: INT64, to which the choices are added.
        """
        ...

    def top_two(self, scores_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(id of the first of the largest scores INT64, that score, the largest of the others), [R] each, FP32.

        A NaN counts as the largest. The next score is -inf where there is no other.
        """
        ...

    def linear_terms(self, x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
        """`linear_quant` left for its reader to add up, in order: FP32 terms, or a single one in x.dtype. [P, T, N]."""
        ...

    def experts_terms(self, x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> ExpertTerms:
        """`experts` left for its reader to weight and add up."""
        ...

    def add_norm_encode(self, x: Tensor | ExpertTerms, residual_TD: Tensor | None, w_D: Tensor, eps: float,
                        encoding: Encoding,
                        scale: Tensor | None = None) -> tuple[Tensor, Rows, Tensor]:  # fmt: skip
        """(norm, its rows encoded, sum) of x [T, D], of terms [P, T, D], or of those of experts, plus the residual,
        where there is one.

        The sum is rounded to w's dtype before the norm, the norm before it is encoded. Not for an encoding whose scale
        spans all rows.
        """
        ...

    def store_heads(self, x_PTX: Tensor, w: HeadNorms, angles: tuple[Tensor, Tensor], pool_PW: Tensor, slots_T: Tensor,
                    view: KVView) -> Tensor:  # fmt: skip
        """Terms of [queries, keys, values], heads of one size -> queries [T, H, K], normed and rotated.

        Writes the pool rows of the tokens: keys normed and rotated, and values.
        """
        ...

    def attend_encode(self, q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax,
                      encoding: Encoding, scale: Tensor | None = None) -> Rows:  # fmt: skip
        """`attend_paged`, its rows [T, H x V] rounded to q's dtype and encoded. Not for an encoding whose scale spans
        all rows."""
        ...

    def store_latent(self, x_TX: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor,
                     slots_T: Tensor) -> None:  # fmt: skip
        """Writes the pool rows [normalised latent, rotated key] of the tokens; x holds [latent, key] from w.column."""
        ...

    def attend_latent(self, q_THK: Tensor, w: Latent, angles: tuple[Tensor, Tensor], pool_PW: Tensor,
                      batch: AttentionBatch) -> Tensor:  # fmt: skip
        """Latent attention over the pool's rows as they are ("absorbed"). -> [T, H, V].

        q holds N elements without position, then P to be rotated. With q' = w_k^T q_N the scores are
        (q' . latent + rotated q_P . key) w.scale; the result is w_v (sum of weighted latents).
        """
        ...
