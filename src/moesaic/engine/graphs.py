"""Decoding steps as CUDA graphs: the whole forward pass, captured once per number of rows, launched as one.

A graph works on fixed addresses: a step writes its few integers there and replays. Numbers of rows are rounded up to a
captured one; rows that are padding have an empty context, choose no expert, and write to slot 0, which belongs to
nobody. The greedy choice is part of the graph: where every row is greedy nothing else runs.

Legend: B rows of a graph, R rows of a step, W blocks of the longest context, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moesaic.engine.draw import pick
from moesaic.engine.feed import Feed
from moesaic.engine.scheduler import Step
from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput
from moesaic.models.decoder import Decoder

NUMBERS = 4
"""INT64 per row: token, position, slot, length of the context; two entries of the buffer each. The table follows."""


def sizes(most: int) -> list[int]:
    """The numbers of rows to capture: powers of two up to 8, then multiples of 8, of 16 from 64, of 32 from 128 on."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most + 32, 32)]
    return [size for size in steps if size < most] + [most]


@dataclass(frozen=True)
class Captured:
    """A graph and where it leaves its results: scores, and the greedy choice of each row (see `draw.pick`)."""

    graph: torch.cuda.CUDAGraph
    scores_BV: Tensor
    packed_2B: Tensor | None


class Staging:
    """The integers of a step in pinned memory. Of each row's table only what is new since it was last here is written.

    Two of them take turns: one is filled while the other's copy may still wait for the device.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.pinned = torch.zeros(rows, width, dtype=torch.int32, pin_memory=torch.cuda.is_available())
        self.all = self.pinned.numpy()
        self.numbers, self.tables = self.all[:, : 2 * NUMBERS].view(np.int64), self.all[:, 2 * NUMBERS :]
        self.held: list[tuple[list[int], int]] = [([], 0)] * rows
        self.copied = torch.cuda.Event() if torch.cuda.is_available() else None

    def fill(self, step: Step, size: int, block: int, feed: Feed) -> Tensor:
        """[size, width]; rows behind the step's are padding."""
        if self.copied is not None:
            self.copied.synchronize()
        rows = []
        for i, (request, start, _, _) in enumerate(step.chunks):
            blocks, used = request.blocks, start // block + 1
            rows.append((feed.token(request, start), start, blocks[start // block] * block + start % block, start + 1))
            held, count = self.held[i]
            if held is not blocks:  # a list of blocks only grows; what lies behind a context is not read
                count = 0
            if count < used:
                self.tables[i, count:used] = blocks[count:used]
                self.held[i] = blocks, used
        self.numbers[: len(rows)] = rows
        self.numbers[len(rows) : size] = 0
        return self.pinned[:size]

    def send(self, rows: Tensor, onto: Tensor) -> None:
        onto.copy_(rows, non_blocking=True)
        if self.copied is not None:
            self.copied.record()


class DecodeGraphs:
    """Made once the weights are loaded; `run` replaces the model's forward pass for steps that only decode.

    metered: the experts' choices are counted in each of them, whether the meter is on or not.
    """

    metered = True

    def __init__(self, model: Decoder, pool: KVPool, feed: Feed, most: int, length: int,
                 only: Sequence[int] = (), progress: bool = False) -> None:  # fmt: skip
        """most: rows of the largest step.  length: longest context in tokens.  only: numbers of rows to capture.
        progress: show a bar; kernels that were never compiled on this machine take a while."""
        self.model, self.pool, self.feed, self.most = model, pool, feed, most
        blocks = -(-length // pool.block_size)
        width = 2 * NUMBERS + blocks + blocks % 2  # rows begin where an INT64 may
        self.rows_BX = torch.zeros(most, width, dtype=torch.int32, device=feed.device)
        self.staging, self.turn = [Staging(most, width) for _ in range(2)], 0
        self.captured: dict[int, Captured] = {}
        self.capture_all(only or sizes(most), progress and sys.stderr.isatty())

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
        """(scores [B, V], the greedy choice) of the rows whose integers lie in the buffer."""
        rows_BX = self.rows_BX[:size]
        tokens_B, positions_B, slots_B, lengths_B = rows_BX.view(torch.int64)[:, :NUMBERS].t().contiguous().unbind(0)
        numbers, ones = torch.arange(size, device=rows_BX.device), torch.ones_like(lengths_B)
        spans_S3 = torch.stack([numbers, ones, lengths_B], 1)
        table_BW = rows_BX[:, 2 * NUMBERS :]
        spans = (Span(0, 1, table_BW.shape[1] * self.pool.block_size),) * size  # the longest that may come
        batch = AttentionBatch(spans, size, table_BW, self.pool.block_size, spans_S3)
        step = StepInput(self.feed.resolve(tokens_B), positions_B, slots_B, batch, self.pool, live_T=lengths_B)
        with self.model.meter.counting():
            scores_BV = self.model.scores(self.model(step))
        return scores_BV, pick(self.model.ops, scores_BV)

    def fits(self, step: Step) -> bool:
        return step.decode and len(step.chunks) <= max(self.captured)

    def run(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """(scores [R, V], the greedy choice [2, R]) of a step that fits; valid until the next call."""
        count = len(step.chunks)
        size = min(size for size in self.captured if size >= count)
        staging, self.turn = self.staging[self.turn], 1 - self.turn
        staging.send(staging.fill(step, size, self.pool.block_size, self.feed), self.rows_BX[:size])
        captured = self.captured[size]
        captured.graph.replay()
        packed = captured.packed_2B
        return captured.scores_BV[:count], None if packed is None else packed[:, :count]
