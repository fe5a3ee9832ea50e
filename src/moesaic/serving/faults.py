"""Which request broke a step: each of its chunks is run alone, and those that fail again are ended."""

from __future__ import annotations

import logging

from moesaic.engine.engine import Engine
from moesaic.engine.output import Delta
from moesaic.engine.scheduler import Chunk, Step

log = logging.getLogger("moesaic.engine")
MAX_LOST_STEPS = 3
"""Consecutive steps of which no request survived: then it is the engine that is broken."""


def isolate(engine: Engine) -> tuple[list[Delta], bool]:
    """After `engine.step()` raised: ends the guilty requests. Returns their last deltas, and whether any was spared.

    Running a chunk twice writes the same rows to the same slots and draws the same noise, so the innocent notice
    nothing. If all run alone and only fail together (memory), all of the step are ended.
    """
    step = engine.scheduler.schedule()  # the step that was discarded comes again
    if step is None:
        return [], True
    guilty = [chunk for chunk in step.chunks if not runs_alone(engine, chunk)] or list(step.chunks)
    engine.scheduler.discard(step)
    deltas = [engine.fail(chunk.request, "the request could not be computed") for chunk in guilty]
    return deltas, len(guilty) < len(step.chunks)


def runs_alone(engine: Engine, chunk: Chunk) -> bool:
    try:
        engine.runner.run(Step((chunk,), chunk.start >= chunk.request.num_prompt, chunk.count, ()))
    except Exception:  # whatever it is, it is this request's
        log.exception("request %s failed", chunk.request.id)
        return False
    return True
