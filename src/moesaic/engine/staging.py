"""The few integers of a step that a captured graph reads: written to pinned memory, copied to where the graph looks.

Legend: B rows of a graph, S sequences, F fields, W blocks of the longest context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from moesaic.engine.batch import fill
from moesaic.engine.feed import Feed
from moesaic.engine.scheduler import Chunk
from moesaic.kernels.ops import AttentionBatch, Span

FIELDS = ("token", "position", "slot", "waits", "place", "end", "fresh", "length")
"""INT64 per row. A token that the step before has yet to choose is 0, waits 1, and is looked up at its place.
end: of prompts, the row that the scores of this place are of.  fresh: as in `AttentionBatch`.
length: of the context that ends with the row, 0 of padding."""
END, FRESH, LENGTH = (FIELDS.index(name) for name in ("end", "fresh", "length"))
MOST_PROMPTS = 64
"""That stand in a graph as a whole: some kernels have programs for so many of its length, most of which end at once."""


class Integers:
    """In one piece: fields INT64 [F, B], spans INT64 [S, 3], tables INT32 [S, W]."""

    def __init__(self, rows: int, sequences: int, blocks: int, **options: Any) -> None:
        at, end = 2 * len(FIELDS) * rows, 2 * (len(FIELDS) * rows + 3 * sequences)
        self.all = torch.zeros(end + sequences * blocks, dtype=torch.int32, **options)
        self.fields_FB = self.all[:at].view(torch.int64).view(-1, rows)
        self.spans_S3 = self.all[at:end].view(torch.int64).view(-1, 3)
        self.tables_SW = self.all[end:].view(sequences, blocks)

    def part(self, sequences: int) -> torch.Tensor:
        """All but the tables behind those of the first so many sequences."""
        return self.all[: len(self.all) - self.tables_SW[sequences:].numel()]


class Staging:
    """The integers of a step in pinned memory."""

    def __init__(self, rows: int, sequences: int, blocks: int, block: int) -> None:
        """blocks: of a table.  block: positions of one."""
        cuda = torch.cuda.is_available()
        self.integers, self.block = Integers(rows, sequences, blocks, pin_memory=cuda), block
        of = self.integers
        self.fields, self.spans, self.tables = of.fields_FB.numpy(), of.spans_S3.numpy(), of.tables_SW.numpy()
        self.held: list[tuple[list[int], int]] = [([], 0)] * sequences
        self.copied = torch.cuda.Event() if cuda else None

    def wait(self) -> None:
        """Until what was written last has been copied."""
        if self.copied is not None:
            self.copied.synchronize()

    def send(self, sequences: int, onto: Integers) -> None:
        """All, with the tables of the first so many sequences."""
        part = self.integers.part(sequences)
        onto.all[: len(part)].copy_(part, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def decoding(self, chunks: Sequence[Chunk], at: int, feed: Feed) -> None:
        """Requests of one token each, as rows and sequences from number `at` on. Of their tables only what is new since
        they were last here is written."""
        rows, size = [], self.block
        for i, (request, start, _, _) in enumerate(chunks, at):
            blocks, used = request.blocks, start // size + 1
            token, slot = feed.token(request, start), blocks[start // size] * size + start % size
            rows.append((max(token, 0), start, slot, token < 0, max(-1 - token, 0), 0, 1, start + 1))
            held, there = self.held[i]
            if held is not blocks:  # a list of blocks only grows; what lies behind a context is not read
                there = 0
            if there < used:
                self.tables[i, there:used] = blocks[there:used]
                self.held[i] = blocks, used
        if rows:
            end = at + len(rows)
            self.fields[:, at:end] = np.array(rows, dtype=np.int64).T
            self.spans[at:end, 0], self.spans[at:end, 1] = range(at, end), 1
            self.spans[at:end, 2] = self.fields[LENGTH, at:end]

    def prompt(self, chunk: Chunk, at: int, feed: Feed) -> list[int]:
        """The fields of a chunk of a prompt, whose tokens are known, from row `at` on. -> the blocks of its context."""
        request, start, count, _ = chunk
        fields = self.fields[:, at : at + count]
        fill(fields[:3], chunk, self.block, feed)
        fields[3:] = 0
        fields[LENGTH] = fields[FIELDS.index("position")] + 1
        return request.blocks[: (start + count - 1) // self.block + 1]


class Inputs(ABC):
    """What the graphs of one kind read. Two stagings take turns: one is filled while the other's copy may still wait
    for the device."""

    def __init__(self, rows: int, sequences: int, blocks: int, block: int, device: torch.device) -> None:
        self.integers, self.block = Integers(rows, sequences, blocks, device=device), block
        self.room = blocks * block  # the longest context that may come
        self.staging = [Staging(rows, sequences, blocks, block) for _ in range(2)]

    def load(self, chunks: Sequence[Chunk], size: int, feed: Feed) -> None:
        """The integers of a step for a graph of `size` rows, on their way to the device."""
        self.staging.reverse()
        staging = self.staging[0]
        staging.wait()
        staging.send(self.fill(staging, chunks, size, feed), self.integers)

    @abstractmethod
    def fill(self, to: Staging, chunks: Sequence[Chunk], size: int, feed: Feed) -> int:
        """Returns how many sequences there are."""

    @abstractmethod
    def batch(self, size: int) -> AttentionBatch:
        """For attention, with the spans that are the longest possible on the host."""

    def holds(self, chunks: Sequence[Chunk]) -> bool:
        """Whether there are sequences enough."""
        return True


def ends_of(chunks: Sequence[Chunk]) -> list[int]:
    """The last row of each chunk that samples."""
    ends = accumulate(chunk.count for chunk in chunks)
    return [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.sample]


def leading(chunks: Sequence[Chunk]) -> int:
    """How many at the front have one token each."""
    return next((i for i, chunk in enumerate(chunks) if chunk.count != 1), len(chunks))


class RowInputs(Inputs):
    """Every row is a sequence of its own, of a prompt as of padding."""

    def __init__(self, rows: int, blocks: int, block: int, device: torch.device) -> None:
        super().__init__(rows, rows, blocks, block, device)

    def fill(self, to: Staging, chunks: Sequence[Chunk], size: int, feed: Feed) -> int:
        at, ends = 0, ends_of(chunks)
        if all(chunk.count == 1 for chunk in chunks):
            to.decoding(chunks, 0, feed)
            at, chunks = len(chunks), ()
        for chunk in chunks:
            end = at + chunk.count
            if chunk.count == 1:
                to.decoding([chunk], at, feed)
            else:
                used = to.prompt(chunk, at, feed)
                to.tables[at:end, : len(used)] = used
                to.held[at:end] = [(chunk.request.blocks, len(used))] * chunk.count
                to.fields[FRESH, at:end] = range(1, chunk.count + 1)
                to.spans[at:end, 0], to.spans[at:end, 1] = range(at, end), 1
                to.spans[at:end, 2] = to.fields[LENGTH, at:end]
            at = end
        to.fields[:, at:size] = 0
        to.fields[END, : len(ends)] = ends
        to.spans[at:size, 0], to.spans[at:size, 1:] = range(at, size), (1, 0)
        return size

    def batch(self, size: int) -> AttentionBatch:
        of, spans = self.integers, (Span(0, 1, self.room),) * size
        fresh_B = of.fields_FB[FRESH, :size]
        return AttentionBatch(spans, size, of.tables_SW[:size], self.block, of.spans_S3[:size], fresh_B)


class PromptInputs(Inputs):
    """The first rows are of requests that decode, each a sequence; from sequence `most` on come prompts, each of all
    its rows; and padding, which is like one more prompt whose context is slot 0 over and over."""

    def __init__(self, rows: int, most: int, blocks: int, block: int, device: torch.device) -> None:
        self.most, self.prompts = most, min(most, MOST_PROMPTS)
        super().__init__(rows, most + self.prompts + 1, blocks, block, device)

    def holds(self, chunks: Sequence[Chunk]) -> bool:
        return len(chunks) - leading(chunks) <= self.prompts

    def fill(self, to: Staging, chunks: Sequence[Chunk], size: int, feed: Feed) -> int:
        first = leading(chunks)
        to.spans[:] = 0
        to.decoding(chunks[:first], 0, feed)
        at, place, ends = first, self.most, ends_of(chunks)
        for chunk in chunks[first:]:
            used = to.prompt(chunk, at, feed)
            to.tables[place, : len(used)] = used
            to.spans[place] = at, chunk.count, chunk.start + chunk.count
            at, place = at + chunk.count, place + 1
        to.fields[:, at:size] = 0
        to.tables[place, : -(-(size - at) // self.block)] = 0
        to.spans[place] = at, size - at, size - at
        to.fields[END, : len(ends)] = ends
        return place + 1

    def batch(self, size: int) -> AttentionBatch:
        spans = (Span(0, 1, self.room),) * self.most + (Span(0, size, self.room),) * (self.prompts + 1)
        return AttentionBatch(spans, self.most, self.integers.tables_SW, self.block, self.integers.spans_S3)
