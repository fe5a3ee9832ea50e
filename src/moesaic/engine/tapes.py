"""Decoding steps on a CPU as tapes: the kernels of a forward pass, noted once per number of rows, made in one call.

A small model's step is a few hundred microseconds of kernels and as much Python between them. What differs from step to
step is a few integers: a frame holds those at fixed addresses, with the tape of the native kernels that read them
(`kernels/tape.py`). Where other kernels run too, there is no tape, and steps run as usual. A tape holds addresses and
numbers: weights may be written anew in place, but what a layer is made of may not change once it has run.

A frame's batch stands for every step of its size: its spans are as long as there is room, and only the tensors say how
long contexts are. Kernels on a tape read nothing else; so no answer comes from a frame without a tape.

Legend: R rows of a step (one per sequence), C room for context, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from moesaic.engine.batch import make_input
from moesaic.engine.feed import Feed
from moesaic.engine.scheduler import Step
from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.kernels.tape import Tape, record
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput
from moesaic.models.decoder import Decoder

FRAMES = 16
"""Most frames kept; the one not used for longest goes."""
MEMORY = 16 << 20
"""Most bytes that a frame may keep. Where a step has more to remember, Python's part of its time is small."""
BEFORE = 2
"""Steps of a size that run as usual before one is noted, which takes twice as long."""
ROOM = 256
"""Contexts get room in this times powers of two, so that growing ones need few frames."""


class Frame:
    """What goes into the steps of one size, and the tape that reads it."""

    def __init__(self, model: Decoder, pool: KVPool, rows: int, room: int) -> None:
        self.model, self.block, self.runs, self.tape = model, pool.block_size, 0, Tape((), ())
        tokens_3R, slots_RC = torch.zeros(3, rows, dtype=torch.int64), torch.zeros(rows, room, dtype=torch.int64)
        tokens_R, positions_R, slots_R = tokens_3R
        spans_R3 = torch.stack([torch.arange(rows), torch.ones(rows, dtype=torch.int64), torch.zeros(rows).long()], 1)
        self.tokens_3R, self.slots_RC, self.spans_R3 = tokens_3R.numpy(), slots_RC.numpy(), spans_R3.numpy()
        spans = tuple(Span(row, 1, room) for row in range(rows))
        batch = AttentionBatch(spans, rows, slots_RC, 1, spans_R3)
        self.step = StepInput(tokens_R, positions_R, slots_R, batch, pool)
        self.x_RD = model.embed(self.step.tokens_T)
        self.at = model.layer_input(self.step)
        self.scores_RV = self.x_RD

    def write(self, step: Step, feed: Feed) -> None:
        """The integers of a step, and the embeddings and angles that they select."""
        starts, block = [chunk.start for chunk in step.chunks], self.block
        requests = [chunk.request for chunk in step.chunks]
        used = max(starts) // block + 1
        table = np.array([(each.blocks[:used] + [0] * used)[:used] for each in requests])
        slots_RC = (table[:, :, None] * block + np.arange(block)).reshape(len(starts), -1)
        self.slots_RC[:, : used * block] = slots_RC[:, : self.slots_RC.shape[1]]
        self.tokens_3R[0] = [feed.token(each, start) for each, start in zip(requests, starts, strict=True)]
        if self.tokens_3R[0].min() < 0:
            self.step.tokens_T.copy_(feed.resolve(self.step.tokens_T))
        self.tokens_3R[1] = starts
        self.tokens_3R[2] = slots_RC[self.spans_R3[:, 0], starts]
        self.spans_R3[:, 2] = self.tokens_3R[1] + 1
        torch.index_select(self.model.embed.weight_VD, 0, self.step.tokens_T, out=self.x_RD)
        for rope, (cos, sin) in self.at.angles.items():
            table_of = self.model.tables[rope]
            torch.index_select(table_of.cos_LD, 0, self.step.positions_T, out=cos)
            torch.index_select(table_of.sin_LD, 0, self.step.positions_T, out=sin)

    def forward(self) -> Tensor:
        """Scores [R, V] in the model's dtype."""
        return self.model.scores(self.model.trunk(self.x_RD, self.at))

    @property
    def nbytes(self) -> int:
        return self.tape.nbytes + self.slots_RC.nbytes


class DecodeTapes:
    """`run` replaces the model's forward pass for steps that only decode. metered: as in `DecodeGraphs`."""

    metered = False

    def __init__(self, model: Decoder, pool: KVPool, feed: Feed, most: int, length: int) -> None:
        """most: rows of the largest step.  length: longest context in tokens."""
        self.model, self.pool, self.feed, self.most = model, pool, feed, min(most, MEMORY // (8 * room_for(length)))
        self.frames: OrderedDict[tuple[int, int, int], Frame] = OrderedDict()

    def fits(self, step: Step) -> bool:
        return step.decode and len(step.chunks) <= self.most and not self.model.meter.on

    def run(self, step: Step) -> tuple[Tensor, None]:
        """Scores [R, V] of a step that fits; valid until the next one."""
        frame = self.frame(len(step.chunks), room_for(max(chunk.start for chunk in step.chunks) + 1))
        frame.runs += 1
        if frame.runs <= BEFORE:
            return self.usual(step), None
        frame.write(step, self.feed)
        if frame.tape.count:
            frame.tape.play()
        elif not self.note(frame):
            return self.usual(step), None
        return frame.scores_RV, None

    def usual(self, step: Step) -> Tensor:
        """Scores [R, V] without a frame; cache rows that one has written before are written anew."""
        return self.model.scores(self.model(make_input(step, self.pool, self.feed)))

    def frame(self, rows: int, room: int) -> Frame:
        key = rows, room, torch.get_num_threads()  # the arguments of kernels say how many threads they may take
        if key not in self.frames:
            self.frames[key] = Frame(self.model, self.pool, rows, room)
            if len(self.frames) > FRAMES:
                self.frames.popitem(last=False)
        self.frames.move_to_end(key)
        return self.frames[key]

    def note(self, frame: Frame) -> bool:
        """Runs the step and keeps its tape. Where there is none, the scores are void; a backend may have kernels for
        fewer rows only, so steps of up to half as many are still tried."""
        frame.scores_RV, tape = record(frame.forward)
        frame.tape = tape or frame.tape
        if tape is None or frame.nbytes > MEMORY:
            self.most = len(frame.spans_R3) // 2 if tape is None else len(frame.spans_R3) - 1
            self.frames.clear()
        return tape is not None


def room_for(length: int) -> int:
    return ROOM << max(0, -(-length // ROOM) - 1).bit_length()
