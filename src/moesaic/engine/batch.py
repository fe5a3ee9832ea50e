"""From what the scheduler decided to the tensors of a forward pass. T tokens, S sequences, L longest context."""

from __future__ import annotations

import torch

from moesaic.engine.scheduler import Chunk, Step
from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput


def make_input(step: Step, pool: KVPool, device: torch.device) -> StepInput:
    """The input of one step. Chunks of a single token count as decoding whatever they are: the result is the same."""
    chunks, size = step.chunks, pool.block_size
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans: list[Span] = []
    for request, start, count, _ in chunks:
        spans.append(Span(len(tokens), count, start + count))
        if count == 1:
            tokens.append(request.tokens[start])
            positions.append(start)
            slots.append(request.blocks[start // size] * size + start % size)
        else:
            span = range(start, start + count)
            tokens += request.tokens[start : start + count]
            positions += span
            slots += [request.blocks[at // size] * size + at % size for at in span]
    decodes = next((i for i, chunk in enumerate(chunks) if chunk.count != 1), len(chunks))
    tokens_T, positions_T, slots_T = torch.tensor([tokens, positions, slots], device=device).unbind(0)
    attention = AttentionBatch.of(tuple(spans), decodes, context_slots(chunks, size, device))
    return StepInput(tokens_T, positions_T, slots_T, attention, pool)


def context_slots(chunks: tuple[Chunk, ...], size: int, device: torch.device) -> torch.Tensor:
    """The pool slots of every context [S, L], zeros on the right."""
    lengths = [chunk.start + chunk.count for chunk in chunks]
    longest = -(-max(lengths) // size)
    table = torch.tensor([(c.request.blocks[:longest] + [0] * longest)[:longest] for c in chunks], device=device)
    slots_SL = (table[:, :, None] * size + torch.arange(size, device=device)).flatten(1)
    return slots_SL[:, : max(lengths)]
