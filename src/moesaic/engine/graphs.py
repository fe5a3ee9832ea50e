"""Steps as CUDA graphs: the whole forward pass, captured once per number of rows, launched as one.

A step that is not captured costs a millisecond of Python per layer, whatever it computes. Graphs are of two kinds:

- of decoding: a row per request. Prompts so short that there are rows enough run in them, too: each of their tokens is
  a row of its own, whose context ends with it, and rows write to the cache before any of them reads it;
- of longer prompts beside requests that decode: of more rows, of which only those that choose a token are scored.
  Attention over heads takes each prompt as a whole, as it does without a graph. Over latents, which are decompressed
  for whole prompts, and in `--deterministic` mode, whose kernels take rows as they come, they are rows as above.

A graph works on fixed addresses: a step writes its few integers there and replays. Numbers of rows are rounded up to a
captured one; rows that are padding choose no expert, and write to slot 0, which belongs to nobody. The greedy choice is
part of the graph: where every row is greedy nothing else runs.

Legend: B rows of a graph, R rows of a step, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moesaic.contracts.plan import ModelPlan
from moesaic.contracts.spec import MLASpec, ModelSpec
from moesaic.engine.draw import pick
from moesaic.engine.feed import Feed
from moesaic.engine.rows import upload
from moesaic.engine.scheduler import Chunk, Step
from moesaic.engine.staging import FIELDS, Inputs, PromptInputs, RowInputs, ends_of
from moesaic.kernels.registry import catalogue
from moesaic.kernels.triton_invariant import CHUNK
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput
from moesaic.models.decoder import Decoder

ATTENTION = ("attend_paged", "attend_encode", "attend_latent")
"""Ops that read the cache."""
TOGETHER = frozenset({"triton", "hopper", "triton_invariant"})
"""Backends whose attention reads no position before it is written, although it is another row of the same step that
writes it (all behind the kernel in front, or as `fresh_S` says), and finds prompts by the spans on the device."""
MOST_READ = 1 << 20
"""Positions of contexts that rows of prompts may read together, where each row reads its own."""
MOST_WHOLE, MOST_ROWS = 4096, 1024
"""Rows of a graph, with prompts as a whole and as rows: for more, the device needs as long as Python does to launch the
step."""
TABLES, PARTS = 1 << 24, 1 << 27
"""Entries of the tables of all rows; and numbers in parts of their results, which `--deterministic` attention over a
context leaves to be added up."""
GRID = 65535
"""Most programs of a launch along its third axis, which has those parts of all rows."""


def sizes(most: int) -> list[int]:
    """Numbers of rows that decode: powers of two up to 8, then multiples of 8, of 16 from 64, of 32 from 128 on."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most + 32, 32)]
    return [size for size in steps if size < most] + [most]


def prompt_sizes(most: int, rows: int) -> list[int]:
    """Numbers of rows with prompts, above `most` and up to `rows`: two, from 128 on three for each doubling."""
    steps = [32, 48, 64, 96, *(power * part // 4 for power in (128, 256, 512, 1024, 2048) for part in (4, 5, 6))]
    return [size for size in steps if most < size < rows] + [rows] * (rows > most)


@dataclass(frozen=True)
class Captured:
    """A graph and where it leaves its results: scores, and the greedy choice of each (see `draw.pick`)."""

    graph: torch.cuda.CUDAGraph
    scores_BV: Tensor
    packed_2B: Tensor | None


class DecodeGraphs:
    """Made once the weights are loaded; `run` replaces the model's forward pass for the steps that fit.

    metered: the experts' choices are counted in each of them, whether the meter is on or not.
    """

    metered = True

    def __init__(self, model: Decoder, pool: KVPool, feed: Feed, most: int, length: int, each: Sequence[int],
                 progress: bool = False) -> None:  # fmt: skip
        """most: requests in the largest step.  length: longest context in tokens.  each: numbers of rows to capture,
        those above `most` for longer prompts.
        progress: show a bar; kernels that were never compiled on this machine take a while."""
        self.model, self.pool, self.feed, self.most = model, pool, feed, most
        plan, of = model.kernels.plan, (-(-length // pool.block_size), pool.block_size, feed.device)
        self.short, self.whole = takes_short(plan), takes_whole(plan)
        self.decoding: Inputs = RowInputs(most, *of)
        self.prompts: Inputs = self.decoding
        if (rows := max(each)) > most:
            self.prompts = PromptInputs(rows, most, *of) if self.whole else RowInputs(rows, *of)
        self.scores_RV: Tensor | None = None
        self.captured: dict[int, Captured] = {}
        self.capture_all(each, progress and sys.stderr.isatty())

    def capture_all(self, each: Sequence[int], show: bool) -> None:
        """The largest first: the smaller ones then fit into its memory."""
        memory = torch.cuda.graph_pool_handle()
        for size in tqdm(sorted(each, reverse=True), "Capturing graphs", file=sys.stderr, disable=not show):
            self.captured[size] = self.capture(size, memory)

    @torch.inference_mode()
    def capture(self, size: int, memory: Any) -> Captured:
        """Of padding. The first, eager run compiles kernels and fills caches; both are forbidden during capture."""
        self.inputs(size).load((), size, self.feed)
        for _ in range(2):
            self.forward(size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            scores_BV, packed_2B = self.forward(size)
        return Captured(graph, scores_BV, packed_2B)

    def forward(self, size: int) -> tuple[Tensor, Tensor | None]:
        """(scores [B, V], the greedy choice) of the rows whose integers lie in the buffer; of more rows than requests,
        of those that these name. Such scores lie in one place for all numbers of rows, which would each keep their own
        (20 MB of 64 requests)."""
        inputs = self.inputs(size)
        fields = dict(zip(FIELDS, inputs.integers.fields_FB[:, :size].unbind(0), strict=True))
        chosen_B = self.feed.chosen_R.index_select(0, fields["place"])
        tokens_B = torch.addcmul(fields["token"], fields["waits"], chosen_B)
        step = StepInput(tokens_B, fields["position"], fields["slot"], inputs.batch(size), self.pool, fields["length"])
        with self.model.meter.counting():
            hidden_BD = self.model(step)
            if size > self.most:
                hidden_BD = hidden_BD.index_select(0, fields["end"][: self.most])
            scores_BV = self.model.scores(hidden_BD)
        packed_2B = pick(self.model.ops, scores_BV)
        if size > self.most:
            self.scores_RV = scores_BV.clone() if self.scores_RV is None else self.scores_RV.copy_(scores_BV)
            scores_BV = self.scores_RV
        return scores_BV, packed_2B

    def inputs(self, size: int) -> Inputs:
        return self.decoding if size <= self.most else self.prompts

    def fits(self, step: Step) -> bool:
        return self.size(step) > 0

    def size(self, step: Step) -> int:
        """Rows of the graph that a step runs in; 0 if none does: there are too few rows, or some prompt wants to know
        more than its last row's scores."""
        if len(step.chunks) > self.most:
            return 0
        large = step.tokens > self.most
        if not step.decode:
            if any(reported(chunk) for chunk in step.chunks):
                return 0
            prompts = [chunk for chunk in step.chunks if chunk.count > 1]
            read = sum(chunk.count * (2 * chunk.start + chunk.count + 1) // 2 for chunk in prompts)
            rows = self.short and read <= MOST_READ
            large |= not rows
            if large and not (self.prompts.holds(step.chunks) and (rows or self.whole)):
                return 0
        least = max(step.tokens, self.most + 1) if large else step.tokens
        return min((size for size in self.captured if size >= least), default=0)

    def run(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """(scores [R, V], the greedy choice [2, R]) of the R chunks that sample, in a step that fits; valid until the
        next call."""
        size = self.size(step)
        self.inputs(size).load(step.chunks, size, self.feed)
        captured = self.captured[size]
        captured.graph.replay()
        scores, packed = captured.scores_BV, captured.packed_2B
        if step.decode or size > self.most:
            count = len(step.chunks) if step.decode else sum(chunk.sample for chunk in step.chunks)
            return scores[:count], None if packed is None else packed[:, :count]
        last = ends_of(step.chunks)
        if not last:
            return scores[:0], None
        last_R = upload(last, torch.int64, self.feed.device)
        return scores.index_select(0, last_R), None if packed is None else packed.index_select(1, last_R)


def takes_short(plan: ModelPlan) -> bool:
    """Whether rows may be of prompts: all attention is of `TOGETHER`."""
    chosen = {choice.chosen for each in plan.ops.values() for choice in each if choice.op in ATTENTION}
    return chosen <= TOGETHER


def takes_whole(plan: ModelPlan) -> bool:
    """Whether prompts can stand in graphs as a whole, by the kernels that they have without."""
    cells = [cell for layer in plan.layers for cell in layer.cells if cell.phase == "prefill"]
    eager = {(contract.op, contract.backend) for contract in catalogue() if not contract.capturable}
    captured = not any((stage.role, stage.kernel) in eager for cell in cells for stage in cell.path.stages)
    return takes_short(plan) and captured and not plan.base.latent and not plan.base.batch_invariant


def prompt_rows(spec: ModelSpec, plan: ModelPlan, block: int, room: int, most: int) -> int:
    """Rows of the largest graph with prompts; 0 if there can be none.

    block: positions of one.  room: of the longest context, which padding must fit into.  most: tokens of a step.
    """
    if takes_whole(plan):
        return min(MOST_WHOLE, room, most)
    if not takes_short(plan):
        return 0
    rows = min(MOST_ROWS, most, TABLES // -(-room // block))
    if plan.base.batch_invariant:
        each = [layer.attention for layer in spec.layers]
        width = max(at.heads * (at.kv_rank if isinstance(at, MLASpec) else at.head_dim) for at in each)
        parts = -(-room // CHUNK)
        rows = min(rows, PARTS // (width * parts), GRID // parts)
    return rows


def reported(chunk: Chunk) -> bool:
    """Whether a chunk has rows whose scores are asked for beside the last one's (`Runner.prompt_logprobs`)."""
    request = chunk.request
    return request.params.prompt_logprobs is not None and chunk.start + 1 < len(request.prompt)
