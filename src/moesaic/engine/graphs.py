"""Decoding steps as CUDA graphs: the whole forward pass, captured once per number of rows, launched as one.

A graph works on fixed addresses: a step writes its few integers there and replays. Numbers of rows are rounded up to a
captured one; rows that are padding have an empty context, and write to slot 0, which belongs to nobody.

Legend: B rows of a graph, R rows of a step, W blocks per row in use, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moesaic.engine.rows import upload
from moesaic.engine.scheduler import Step
from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput
from moesaic.models.decoder import Decoder

TOKEN, POSITION, SLOT, LENGTH = range(4)


def sizes(most: int) -> list[int]:
    """The numbers of rows to capture: powers of two up to 8, then multiples of 8, of 16 from 64, of 32 from 128 on."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most + 32, 32)]
    return [size for size in steps if size < most] + [most]


@dataclass(frozen=True)
class Captured:
    """A graph and where it leaves its result."""

    graph: torch.cuda.CUDAGraph
    logits_BV: Tensor


class DecodeGraphs:
    """Made once the weights are loaded; `run` replaces the model's forward pass for steps that only decode."""

    def __init__(self, model: Decoder, pool: KVPool, most: int, length: int) -> None:
        """most: rows of the largest step.  length: longest context in tokens."""
        self.model, self.pool = model, pool
        device = pool.layers[0].device
        self.rows_4B = torch.zeros(4, most, dtype=torch.int64, device=device)
        self.table_BW = torch.zeros(most, -(-length // pool.block_size), dtype=torch.int64, device=device)
        self.memory = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones then fit into its memory.
        self.captured = {size: self.capture(size) for size in reversed(sizes(most))}

    @torch.inference_mode()
    def capture(self, size: int) -> Captured:
        """The first, eager run compiles kernels and fills caches; both are forbidden during capture."""
        for _ in range(2):
            self.forward(size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            logits_BV = self.forward(size)
        return Captured(graph, logits_BV)

    def forward(self, size: int) -> Tensor:
        """FP32 logits [B, V] of the rows whose integers lie in the fixed buffers."""
        rows_4B = self.rows_4B[:, :size]
        offsets = torch.arange(self.pool.block_size, device=rows_4B.device)
        slots_SL = (self.table_BW[:size, :, None] * self.pool.block_size + offsets).flatten(1)
        lengths_S = rows_4B[LENGTH]
        numbers, ones = torch.arange(size, device=rows_4B.device), torch.ones_like(lengths_S)
        spans_S3 = torch.stack([numbers, ones, lengths_S], 1)
        spans = tuple(Span(i, 1, slots_SL.shape[1]) for i in range(size))
        batch = AttentionBatch(spans, size, slots_SL, lengths_S, lengths_S[:, None].float(), spans_S3)
        step = StepInput(rows_4B[TOKEN], rows_4B[POSITION], rows_4B[SLOT], batch, self.pool)
        return self.model.logits(self.model(step))

    def fits(self, step: Step) -> bool:
        return step.decode and len(step.chunks) <= len(self.table_BW) and not self.model.meter.on

    def run(self, step: Step) -> Tensor:
        """Logits [R, V] of a step that fits; valid until the next call."""
        count, block = len(step.chunks), self.pool.block_size
        size = min(size for size in self.captured if size >= count)
        rows_4B = np.zeros((4, size), dtype=np.int64)
        widest = -(-max(chunk.start + 1 for chunk in step.chunks) // block)
        table_BW = np.zeros((size, widest), dtype=np.int64)
        for i, (request, start, _, _) in enumerate(step.chunks):
            blocks = request.blocks
            rows_4B[:, i] = request.tokens[start], start, blocks[start // block] * block + start % block, start + 1
            used = start // block + 1
            table_BW[i, :used] = blocks[:used]
        device = self.rows_4B.device
        self.rows_4B[:, :size] = upload(rows_4B, torch.int64, device)
        self.table_BW[:size, :widest] = upload(table_BW, torch.int64, device)
        captured = self.captured[size]
        captured.graph.replay()
        return captured.logits_BV[:count]
