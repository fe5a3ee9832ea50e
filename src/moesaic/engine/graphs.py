"""Decoding steps as CUDA graphs: the whole forward pass, captured once per number of rows, launched as one.

Short prompts run in them, too, and parts of longer ones beside requests that decode: each of their tokens is a row of
its own, whose context ends with it, and rows write to the cache before any of them reads it. A step that is not
captured costs a millisecond of Python per layer, whatever it computes. For such steps there are larger graphs than
requests that decode could fill; these score only the rows that choose a token.

A graph works on fixed addresses: a step writes its few integers there and replays. Numbers of rows are rounded up to a
captured one; rows that are padding have an empty context, choose no expert, and write to slot 0, which belongs to
nobody. The greedy choice is part of the graph: where every row is greedy nothing else runs.

Legend: B rows of a graph, R rows of a step, F fields, W blocks of the longest context, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moesaic.contracts.plan import ModelPlan
from moesaic.engine.draw import pick
from moesaic.engine.feed import Feed
from moesaic.engine.rows import upload
from moesaic.engine.scheduler import Chunk, Step
from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput
from moesaic.models.decoder import Decoder

FIELDS = ("token", "waits", "place", "position", "slot", "end", "fresh", "length")
"""INT64 per row. A token that the step before has yet to choose is 0, waits 1, and is looked up at its place.
end: the row that the scores of this place are of, in graphs of more rows than scores.
fresh: as in `AttentionBatch`."""
NUMBERS = len(FIELDS) + 3
"""INT64 of a row: the fields, each of all rows together, then spans (row, 1, length of the context) row by row."""
END = FIELDS.index("end")

ATTENTION = ("attend_paged", "attend_encode", "attend_latent")
"""Ops that read the cache."""
TOGETHER = frozenset({"triton", "hopper"})
"""Backends whose attention reads no position before it is written, although it is another row of the same step that
writes it: all at once behind the kernel in front, or as `fresh_S` says."""
MOST_READ = 1 << 20
"""Positions of contexts that the rows of prompts of a step may read together: each row reads its own, where a prompt's
kernel reads them once for many rows."""
MOST_ROWS, TABLES = 1024, 1 << 24
"""Rows of a step with prompts; and entries of all its tables, of which each row has one."""


def sizes(most: int, rows: int = 0) -> list[int]:
    """The numbers of rows to capture. Up to `most`: powers of two up to 8, then multiples of 8, of 16 from 64, of 32
    from 128 on; and up to `rows`, where that is more, multiples of 64, of 128 from 512 on."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most + 32, 32)]
    more = [*range(64, 512, 64), *range(512, rows, 128), rows]
    return [size for size in steps if size < most] + [most] + [size for size in more if most < size <= rows]


@dataclass(frozen=True)
class Captured:
    """A graph and where it leaves its results: scores, and the greedy choice of each (see `draw.pick`)."""

    graph: torch.cuda.CUDAGraph
    scores_BV: Tensor
    packed_2B: Tensor | None


class Staging:
    """The integers of a step in pinned memory. Of each row's table only what is new since it was last here is written.

    Two of them take turns: one is filled while the other's copy may still wait for the device.
    """

    def __init__(self, most: int, blocks: int) -> None:
        """most: rows, at most.  blocks: entries of a table."""
        pinned = torch.cuda.is_available()
        self.pinned = torch.zeros(most * (2 * NUMBERS + blocks), dtype=torch.int32, pin_memory=pinned)
        fields_FB, spans_B3, tables_BW = views(self.pinned, most)
        self.fields, self.spans, self.tables = fields_FB.numpy(), spans_B3.numpy(), tables_BW.numpy()
        self.spans[:, 0], self.spans[:, 1] = range(most), 1
        self.held: list[tuple[list[int], int]] = [([], 0)] * most
        self.copied = torch.cuda.Event() if torch.cuda.is_available() else None

    def fill(self, chunks: Sequence[Chunk], size: int, block: int, feed: Feed) -> Tensor:
        """What a graph of `size` rows reads: of each chunk as many as it has tokens; rows behind them are padding."""
        if self.copied is not None:
            self.copied.synchronize()
        at, ends, alone, rows = 0, [], [], []
        for chunk in chunks:
            request, start, count, sample = chunk
            if count == 1:
                blocks = request.blocks
                token, slot = feed.token(request, start), blocks[start // block] * block + start % block
                alone.append(at)
                rows.append((max(token, 0), token < 0, max(-1 - token, 0), start, slot, 0, 1, start + 1))
                self.extend(at, blocks, start // block + 1)
            else:
                self.write_prompt(chunk, at, block)
            at += count
            if sample:
                ends.append(at - 1)
        if rows:
            self.fields[:, alone] = np.array(rows, dtype=np.int64).T
        self.fields[:, at:size] = 0
        self.fields[END, :size] = 0
        self.fields[END, : len(ends)] = ends
        self.spans[:size, 2] = self.fields[-1, :size]
        return self.pinned[: self.pinned.numel() - (len(self.tables) - size) * self.tables.shape[1]]

    def extend(self, row: int, blocks: list[int], used: int) -> None:
        """The table of a row: a list of blocks only grows, and what lies behind a context is not read."""
        held, there = self.held[row]
        if held is not blocks:
            there = 0
        if there < used:
            self.tables[row, there:used] = blocks[there:used]
            self.held[row] = blocks, used

    def write_prompt(self, chunk: Chunk, at: int, block: int) -> None:
        """The rows of a chunk of known tokens, from row `at` on."""
        request, start, count, _ = chunk
        used, positions = (start + count - 1) // block + 1, np.arange(start, start + count)
        blocks = np.array(request.blocks[:used])
        fields = self.fields[:, at : at + count]
        fields[0], fields[1:3] = request.tokens[start : start + count], 0
        fields[3], fields[4] = positions, blocks[positions // block] * block + positions % block
        fields[-2], fields[-1] = positions - start + 1, positions + 1
        self.tables[at : at + count, :used] = blocks
        self.held[at : at + count] = [(request.blocks, used)] * count

    def send(self, integers: Tensor, onto: Tensor) -> None:
        onto[: len(integers)].copy_(integers, non_blocking=True)
        if self.copied is not None:
            self.copied.record()


def views(integers: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of INT32 storage: fields INT64 [F, most], spans INT64 [most, 3], tables INT32 [most, W]."""
    numbers, fields = integers[: 2 * NUMBERS * most].view(torch.int64), len(FIELDS) * most
    tables_BW = integers[2 * NUMBERS * most :].view(most, -1)
    return numbers[:fields].view(-1, most), numbers[fields:].view(most, 3), tables_BW


class DecodeGraphs:
    """Made once the weights are loaded; `run` replaces the model's forward pass for steps that decode, or nearly so.

    metered: the experts' choices are counted in each of them, whether the meter is on or not.
    """

    metered = True

    def __init__(self, model: Decoder, pool: KVPool, feed: Feed, most: int, length: int, prompts: int = 0,
                 only: Sequence[int] = (), progress: bool = False) -> None:  # fmt: skip
        """most: requests in the largest step.  length: longest context in tokens.  prompts: rows of the largest step
        with prompts, 0 if none is to run here.  only: numbers of rows to capture.
        progress: show a bar; kernels that were never compiled on this machine take a while."""
        self.model, self.pool, self.feed, self.most, self.prompts = model, pool, feed, most, prompts > 0
        rows, blocks = max([most, prompts, *only]), -(-length // pool.block_size)
        self.integers = torch.zeros(rows * (2 * NUMBERS + blocks), dtype=torch.int32, device=feed.device)
        self.fields_FB, self.spans_B3, self.tables_BW = views(self.integers, rows)
        self.spans_B3[:, 0], self.spans_B3[:, 1] = torch.arange(rows), 1
        self.staging, self.turn = [Staging(rows, blocks) for _ in range(2)], 0
        self.captured: dict[int, Captured] = {}
        self.capture_all(only or sizes(most, prompts), progress and sys.stderr.isatty())

    def capture_all(self, each: Sequence[int], show: bool) -> None:
        """The largest first: the smaller ones then fit into its memory."""
        memory = torch.cuda.graph_pool_handle()
        for size in tqdm(sorted(each, reverse=True), "Capturing graphs", file=sys.stderr, disable=not show):
            self.captured[size] = self.capture(size, memory)

    @torch.inference_mode()
    def capture(self, size: int, memory: Any) -> Captured:
        """The first, eager run compiles kernels and fills caches; both are forbidden during capture."""
        for _ in range(2):
            self.forward(size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            scores_BV, packed_2B = self.forward(size)
        return Captured(graph, scores_BV, packed_2B)

    def forward(self, size: int) -> tuple[Tensor, Tensor | None]:
        """(scores [B, V], the greedy choice) of the rows whose integers lie in the buffer; of graphs of more rows than
        requests, of those rows that choose a token."""
        token_B, waits_B, place_B, position_B, slot_B, end_B, fresh_B, length_B = self.fields_FB[:, :size].unbind(0)
        spans = (Span(0, 1, self.tables_BW.shape[1] * self.pool.block_size),) * size  # the longest that may come
        batch = AttentionBatch(spans, size, self.tables_BW[:size], self.pool.block_size, self.spans_B3[:size], fresh_B)
        tokens_B = torch.addcmul(token_B, waits_B, self.feed.chosen_R.index_select(0, place_B))
        step = StepInput(tokens_B, position_B, slot_B, batch, self.pool, live_T=length_B)
        with self.model.meter.counting():
            hidden_BD = self.model(step)
            if size > self.most:
                hidden_BD = hidden_BD.index_select(0, end_B[: self.most])
            scores_BV = self.model.scores(hidden_BD)
        return scores_BV, pick(self.model.ops, scores_BV)

    def fits(self, step: Step) -> bool:
        """Whether there are rows enough; of prompts none that wants to know more than the last row's scores."""
        if step.tokens > max(self.captured) or len(step.chunks) > self.most:
            return False
        if step.decode or not self.prompts:
            return step.decode
        read = sum(chunk.count * (2 * chunk.start + chunk.count + 1) // 2 for chunk in step.chunks if chunk.count > 1)
        return read <= MOST_READ and not any(reported(chunk) for chunk in step.chunks)

    def run(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """(scores [R, V], the greedy choice [2, R]) of the R chunks that sample, in a step that fits; valid until the
        next call."""
        size = min(size for size in self.captured if size >= step.tokens)
        staging, self.turn = self.staging[self.turn], 1 - self.turn
        staging.send(staging.fill(step.chunks, size, self.pool.block_size, self.feed), self.integers)
        captured = self.captured[size]
        captured.graph.replay()
        scores, packed = captured.scores_BV, captured.packed_2B
        if step.decode or size > self.most:
            count = len(step.chunks) if step.decode else sum(chunk.sample for chunk in step.chunks)
            return scores[:count], None if packed is None else packed[:, :count]
        ends = accumulate(chunk.count for chunk in step.chunks)
        last = [end - 1 for end, chunk in zip(ends, step.chunks, strict=True) if chunk.sample]
        if not last:
            return scores[:0], None
        last_R = upload(last, torch.int64, self.feed.device)
        return scores.index_select(0, last_R), None if packed is None else packed.index_select(1, last_R)


def rows_of_prompts(plan: ModelPlan, blocks: int, most: int) -> int:
    """Rows of the largest step with prompts that graphs are to take; 0: none.

    blocks: entries of a row's table.  most: tokens of the largest step.
    """
    return min(MOST_ROWS, TABLES // blocks, most) if takes_prompts(plan) else 0


def takes_prompts(plan: ModelPlan) -> bool:
    """Whether rows may be of prompts: all attention is of `TOGETHER`, and the plan is not `--deterministic`."""
    chosen = {choice.chosen for each in plan.ops.values() for choice in each if choice.op in ATTENTION}
    return chosen <= TOGETHER and not plan.base.batch_invariant


def reported(chunk: Chunk) -> bool:
    """Whether a chunk has rows whose scores are asked for beside the last one's (`Runner.prompt_logprobs`)."""
    request = chunk.request
    return request.params.prompt_logprobs is not None and chunk.start + 1 < len(request.prompt)
