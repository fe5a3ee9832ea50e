"""Which request broke a step: each of its chunks is run alone, and those that fail again are ended."""

from __future__ import annotations

import logging

from moesaic.engine.engine import Engine
from moesaic.engine.output import Delta
from moesaic.engine.scheduler import Chunk, Step
from moesaic.errors import MoesaicError

log = logging.getLogger("moesaic.engine")
MAX_LOST_STEPS = 3
"""Consecutive steps of which no request survived: then it is the engine that is broken."""


def isolate(engine: Engine) -> tuple[list[Delta], bool]:
    """After `engine.step()` raised: ends the guilty requests. Returns their last deltas, and whether the engine is fit:
    it spared somebody, or each of the guilty asked for what cannot be done.

    Running a chunk twice writes the same rows to the same slots and draws the same noise, so the innocent notice
    nothing. If all run alone and only fail together (memory), all of the step are ended.
    """
    step = engine.scheduler.schedule()  # the step that was discarded comes again
    if step is None:
        return [], True
    failures = {chunk.request: error for chunk in step.chunks if (error := failure(engine, chunk)) is not None}
    fit = bool(failures) and all(isinstance(error, MoesaicError) for error in failures.values())
    guilty = [chunk.request for chunk in step.chunks if not failures or chunk.request in failures]
    engine.scheduler.discard(step)
    deltas = [engine.fail(request, *told(failures.get(request))) for request in guilty]
    return deltas, fit or len(guilty) < len(step.chunks)


def told(error: Exception | None) -> tuple[str, int]:
    """What its client is told: what it can do something about, and nothing of the rest."""
    if isinstance(error, MoesaicError):
        return error.one_line(), error.http_status
    return "the request could not be computed", 500


def failure(engine: Engine, chunk: Chunk) -> Exception | None:
    """What a chunk raises alone."""
    try:
        engine.runner.run(Step((chunk,), chunk.start >= chunk.request.num_prompt, chunk.count, ()))
    except MoesaicError as error:
        log.warning("request %s: %s", chunk.request.id, error.one_line())
        return error
    except Exception as error:  # whatever it is, it is this request's
        log.exception("request %s failed", chunk.request.id)
        return error
    return None
