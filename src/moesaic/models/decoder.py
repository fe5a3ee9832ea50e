"""The model that every architecture is: a pre-norm decoder built from its spec.

Letters: T tokens, D hidden size, R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import DraftSpec, LayerSpec, MLASpec, ModelSpec, MoESpec
from moesaic.kernels.ops import ExpertTerms
from moesaic.kernels.registry import Kernels
from moesaic.layers.attention import GQA
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.linear import Embedding, Linear, Norm, Sources, Stored
from moesaic.layers.mla import MLA
from moesaic.layers.rope import RopeTable
from moesaic.layers.step import LayerInput, StepInput
from moesaic.moe.balance import LoadMeter
from moesaic.moe.dispatch import dispatchers
from moesaic.moe.layer import MLP, MoELayer


class Parts:
    """What every block is built with: kernels, the weights' dtype and device, and how paths are chosen."""

    def __init__(self, spec: ModelSpec, kernels: Kernels, like: Tensor, one_path: bool) -> None:
        self.eps, self.hidden, self.kernels = spec.norm_eps, spec.hidden, kernels
        self.like, self.one_path, self.dispatchers = like, one_path, dispatchers()
        blocks = [*spec.layers, *(draft.block for draft in spec.drafts)]
        mixtures = [block for block in blocks if isinstance(block.mlp, MoESpec)]
        self.place = {block.index: i for i, block in enumerate(mixtures)}
        self.meter = LoadMeter([b.mlp.router.experts for b in mixtures if isinstance(b.mlp, MoESpec)], like.device)

    def norm(self, name: str) -> Norm:
        return Norm(name, self.hidden, self.eps, self.kernels.ops, self.like)


class Block:
    """Attention and feed-forward, each behind a norm; the residual is carried beside x so that sum and norm fuse."""

    def __init__(self, spec: LayerSpec, parts: Parts) -> None:
        kernels, like = parts.kernels, parts.like
        self.input_norm, self.post_norm = parts.norm(spec.input_norm), parts.norm(spec.post_norm)
        self.attention = (
            MLA(spec.attention, spec.index, kernels, like, parts.one_path)
            if isinstance(spec.attention, MLASpec)
            else GQA(spec.attention, parts.eps, spec.index, kernels, like)
        )
        self.mlp = (
            MoELayer(spec.mlp, spec.index, parts.place[spec.index], kernels, parts.dispatchers, parts.meter, like)
            if isinstance(spec.mlp, MoESpec)
            else MLP(spec.mlp, kernels, like)
        )

    def __call__(
        self, x: Tensor | ExpertTerms, residual_TD: Tensor | None, at: LayerInput
    ) -> tuple[Tensor | ExpertTerms, Tensor]:
        """(output not yet added, residual). x may be terms of rows, where norms add them up, and so may the output."""
        h_TD, rows, residual_TD = self.input_norm.encoded(x, residual_TD, self.attention.takes)
        y_TD = self.attention(h_TD, at, rows)
        h_TD, rows, residual_TD = self.post_norm.encoded(y_TD, residual_TD, self.mlp.takes)
        if isinstance(self.mlp, MoELayer):
            return self.mlp(h_TD, at.step.phase, at.step.live_T, rows), residual_TD
        return self.mlp(h_TD, rows=rows), residual_TD

    def sources(self) -> Sources:
        for part in (self.input_norm, self.attention, self.post_norm, self.mlp):
            yield from part.sources()


class Draft:
    """A multi-token-prediction layer: from the state at a position and the token after it, the state one further."""

    def __init__(self, spec: DraftSpec, parts: Parts) -> None:
        self.embed_norm, self.hidden_norm = parts.norm(spec.embed_norm), parts.norm(spec.hidden_norm)
        self.join = Linear((spec.join,), parts.kernels, parts.like)
        self.block, self.final_norm = Block(spec.block, parts), parts.norm(spec.final_norm)

    def __call__(self, embedded_TD: Tensor, hidden_TD: Tensor, at: LayerInput) -> Tensor:
        joined = torch.cat([self.embed_norm(embedded_TD), self.hidden_norm(hidden_TD)], -1)
        return self.final_norm.encoded(*self.block(self.join(joined), None, at), None)[0]

    def sources(self) -> Sources:
        for part in (self.embed_norm, self.hidden_norm, self.join, self.block, self.final_norm):
            yield from part.sources()


class Decoder:
    """A language model with uninitialised weights until `sources()` are filled.

    one_path: compute a token the same way whether it is prompt or generated (`--deterministic`).
    length: positions for which rotary angles are prepared.
    """

    def __init__(self, spec: ModelSpec, kernels: Kernels, like: Tensor, length: int, one_path: bool = False) -> None:
        self.spec, self.kernels, self.ops = spec, kernels, kernels.ops
        parts = Parts(spec, kernels, like, one_path)
        self.meter = parts.meter
        self.embed = Embedding(spec.embed, spec.vocab, spec.hidden, like)
        self.blocks = [Block(layer, parts) for layer in spec.layers]
        self.final_norm = parts.norm(spec.final_norm)
        self.head = None if spec.tied else Embedding(spec.head, spec.vocab, spec.hidden, like)
        self.drafts = [Draft(draft, parts) for draft in spec.drafts]
        self.tables = {rope: RopeTable(rope, length, like.device) for rope in spec.ropes}

    def __call__(self, step: StepInput) -> Tensor:
        """Normalised last hidden states [T, D]; writes this step's rows into the KV pool."""
        return self.trunk(self.embed(step.tokens_T), self.layer_input(step))

    def trunk(self, x_TD: Tensor, at: LayerInput) -> Tensor:
        """The same from embedded tokens on."""
        x: Tensor | ExpertTerms = x_TD
        residual_TD = None
        for block in self.blocks:
            x, residual_TD = block(x, residual_TD, at)
        return self.final_norm.encoded(x, residual_TD, None)[0]

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """FP32 logits [R, V] of normalised hidden states."""
        return self.scores(hidden_RD).float()

    def scores(self, hidden_RD: Tensor) -> Tensor:
        """The same in the model's dtype, as the product leaves them."""
        head = self.embed if self.head is None else self.head
        return self.ops.linear(hidden_RD, head.weight_VD)

    def draft(self, index: int, step: StepInput, hidden_TD: Tensor) -> Tensor:
        """The draft's normalised state [T, D]: step.tokens_T holds the token *after* each position of hidden_TD."""
        return self.drafts[index](self.embed(step.tokens_T), hidden_TD, self.layer_input(step))

    def layer_input(self, step: StepInput) -> LayerInput:
        return LayerInput(step, {rope: table.at(step.positions_T) for rope, table in self.tables.items()})

    def kv_widths(self, drafts: bool = False) -> list[int]:
        """Pool elements per token for each layer, draft layers last; bytes in FP8."""
        blocks = [*self.spec.layers, *(draft.block for draft in self.spec.drafts if drafts)]
        parts = [block.attention.kv_parts for block in blocks]
        return [each.fp8_bytes if self.kernels.plan.kv == "fp8" else each.width for each in parts]

    @property
    def kv_like(self) -> Tensor:
        """An empty tensor with the dtype and device of the pool."""
        return self.embed.weight_VD.new_empty(0, dtype=torch.uint8 if self.kernels.plan.kv == "fp8" else None)

    def pool(self, blocks: int, block_size: int, drafts: bool = False) -> KVPool:
        """A KV pool of this model."""
        return KVPool(self.kv_widths(drafts), blocks, block_size, self.kv_like)

    def nbytes(self) -> int:
        """Of all weights."""
        each = (s.weight if isinstance(s, Stored) else s[1] for s in self.sources())
        return sum(weight.nbytes for weight in each)

    def sources(self) -> Sources:
        """Everything that this model needs of a checkpoint, and the storage that it fills."""
        yield from self.embed.sources()
        for block in self.blocks:
            yield from block.sources()
        yield from self.final_norm.sources()
        if self.head is not None:
            yield from self.head.sources()
        for draft in self.drafts:
            yield from draft.sources()
