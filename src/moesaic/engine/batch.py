"""From what the scheduler decided to the tensors of a forward pass. T tokens, S sequences, B blocks of the longest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from moesaic.engine.feed import Feed
from moesaic.engine.rows import upload
from moesaic.engine.scheduler import Chunk, Step
from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput

Integers = npt.NDArray[np.int64]


def make_input(step: Step, pool: KVPool, feed: Feed) -> StepInput:
    """The input of one step. Chunks of a single token count as decoding whatever they are: the result is the same.

    On a GPU all of it is copied without the host waiting.
    """
    chunks, device = step.chunks, feed.device
    spans, tokens_3T = [], np.empty((3, step.tokens), np.int64)
    at = 0
    for chunk in chunks:
        spans.append(Span(at, chunk.count, chunk.start + chunk.count))
        fill(tokens_3T[:, at : at + chunk.count], chunk, pool.block_size, feed)
        at += chunk.count
    decodes = next((i for i, chunk in enumerate(chunks) if chunk.count != 1), len(chunks))
    rows = upload(np.concatenate([tokens_3T.ravel(), np.array(spans_of(spans), np.int64).ravel()]), torch.int64, device)
    tokens_T, positions_T, slots_T = rows[: tokens_3T.size].view(3, -1).unbind(0)
    table_SB = upload(table_of(chunks, pool.block_size), torch.int32, device)
    batch = AttentionBatch(tuple(spans), decodes, table_SB, pool.block_size, rows[tokens_3T.size :].view(-1, 3))
    if (tokens_3T[0] < 0).any():
        tokens_T = feed.resolve(tokens_T)
    return StepInput(tokens_T, positions_T, slots_T, batch, pool)


def fill(columns_3T: Integers, chunk: Chunk, size: int, feed: Feed) -> None:
    """Token, position and pool slot of each of a chunk's tokens."""
    request, start, count, _ = chunk
    if count == 1:
        columns_3T[:, 0] = feed.token(request, start), start, request.blocks[start // size] * size + start % size
        return
    positions = np.arange(start, start + count)
    columns_3T[0] = request.tokens[start : start + count]
    columns_3T[1] = positions
    columns_3T[2] = np.array(request.blocks)[positions // size] * size + positions % size


def spans_of(spans: Sequence[Span]) -> list[tuple[int, int, int]]:
    return [(span.start, span.count, span.length) for span in spans]


def table_of(chunks: Sequence[Chunk], size: int) -> npt.NDArray[np.int32]:
    """The blocks of every context, zeros on the right."""
    used = [-(-(chunk.start + chunk.count) // size) for chunk in chunks]
    table_SB = np.zeros((len(chunks), max(used)), np.int32)
    for row, chunk, count in zip(table_SB, chunks, used, strict=True):
        row[:count] = chunk.request.blocks[:count]
    return table_SB
