"""Grammars are compiled in a thread beside the engine's loop: a large schema must not hold up everybody's step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from moesaic.engine.grammar import Grammars, Guide

if TYPE_CHECKING:
    from moesaic.llm import LLM

Ids = list[list[Any]]
"""[request id, index] of each completion of one prompt."""
Guiding = Callable[[], Callable[[frozenset[int]], Guide]]
"""Gives what makes the guide of each completion, or raises why there is none."""


class Compiling:
    """Requests whose grammars are not compiled yet. `wake` can be read when one may be."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.grammars: Grammars | None = None
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self.wake, self._ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.pending: list[tuple[Ids, list[int], dict[str, Any], Future[Any]]] = []
        self.bells = 0  # that have rung, or will

    def start(self, ids: Ids, prompt: list[int], sampling: dict[str, Any], grammar: list[str]) -> None:
        future = self.pool.submit(self.compile, *grammar)
        self.bells += 1
        self.pending.append((ids, prompt, sampling, future))
        future.add_done_callback(lambda _: os.write(self._ring, b"!"))

    def compile(self, kind: str, text: str) -> Any:
        if self.grammars is None:
            self.grammars = Grammars(self.llm.tokenizer, self.llm.engine.vocab)
        return self.grammars.compile(kind, text)

    def ready(self) -> Iterable[tuple[Ids, list[int], dict[str, Any], Guiding]]:
        """Those that can be queued now, in the order of their arrival."""
        if not self.bells:
            return []
        try:
            self.bells -= len(os.read(self.wake, 4096))
        except BlockingIOError:
            return []
        done = [entry for entry in self.pending if entry[3].done()]
        self.pending = [entry for entry in self.pending if entry not in done]
        return [(ids, prompt, sampling, partial(self.guiding, future)) for ids, prompt, sampling, future in done]

    def guiding(self, future: Future[Any]) -> Callable[[frozenset[int]], Guide]:
        compiled = future.result()
        assert self.grammars is not None, "it has compiled something"
        return partial(self.grammars.guide, compiled)

    def forget(self, ids: Iterable[str]) -> None:
        gone = set(ids)
        for entry in self.pending:
            if entry[0][0][0] in gone:
                entry[3].cancel()
        self.pending = [entry for entry in self.pending if entry[0][0][0] not in gone]
