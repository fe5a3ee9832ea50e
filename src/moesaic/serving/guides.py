"""Structured answers, the engine's side: grammars are compiled and walked in a process beside it (`guide_worker.py`).

xgrammar is fast for what people write, and has no bound for what they can write: three thousand characters of nested
repetitions keep one call busy for seconds, the next for longer, and no call can be cut short. In a process of its own
such a call costs the request that brought it, at worst the other answers held to a grammar, and of everybody else the
patience of one mask. Masks are made while the model runs: the helper hears of a token as soon as it is chosen.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.config import helper_environment
from moesaic.engine.grammar import Guide, available, field_of
from moesaic.errors import CapacityError, MoesaicError, RequestError, UnsupportedError
from moesaic.serving.frames import Channel, Message

log = logging.getLogger("moesaic.engine")

Ids = list[list[Any]]
"""[request id, index] of each completion of one prompt."""
Guiding = Callable[[], Callable[[frozenset[int]], Guide]]
"""Gives what makes the guide of each completion, or raises why there is none."""

START_PATIENCE = 120.0
"""Seconds for a helper to import what it needs."""
COMPILE_PATIENCE = 60.0
"""Seconds for one grammar; a schema that people use takes some seconds with a vocabulary of 128k."""
MASK_PATIENCE = 2.0
"""Seconds for one token; people's grammars take some milliseconds."""
ALLOWANCE, ALLOWANCE_EACH = 10.0, 0.05
"""Seconds that one answer may hold up the steps that it is in, and more per token."""
MOST_HELPERS = 3
"""Processes at once: one takes new grammars, the others end when their last answer does."""
REMEMBERED = 1024
"""Grammars that took too long, refused at once when they come again."""


def too_slow(kind: str) -> RequestError:
    return RequestError("takes too long to be followed", where=field_of(kind),
                        remedy="Simplify it: fewer repetitions inside repetitions, fewer alternatives.")  # fmt: skip


def lost() -> CapacityError:
    return CapacityError("the process that holds answers to grammars was restarted", remedy="Send the request again.")


class Helper:
    """One process that knows grammars. blame: told the digest of a grammar that was not followed in time."""

    def __init__(self, path: Path, vocab: int, blame: Callable[[str], None]) -> None:
        ours, theirs = socket.socketpair()
        argv = [sys.executable, "-m", "moesaic.serving.guide_worker", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                                            start_new_session=True, env=helper_environment())  # fmt: skip
        self.channel, self.blame, self.began = Channel(ours), blame, time.monotonic()
        self.ready = self.dead = self.retired = False
        self.guilty = ""  # digest of the grammar that this process had to be ended for
        self.compiled: dict[int, dict[str, Any] | None] = {}
        self.walks: dict[int, str] = {}  # guide -> digest of its grammar
        self.masks: dict[int, npt.NDArray[np.int32]] = {}
        self.asked: OrderedDict[int, None] = OrderedDict()  # guides whose mask is being made, as they were asked for
        self.send(["start", str(path), vocab])

    def send(self, message: Message) -> None:
        if not self.dead:
            try:
                self.channel.send(message)
            except OSError:
                self.kill()

    def pump(self, seconds: float = 0.0) -> None:
        """Takes what has arrived; waits for something, at most so long."""
        try:
            for message in self.channel.receive(wait=seconds > 0, seconds=seconds) if not self.dead else ():
                self.take(*message)
        except (EOFError, OSError):
            log.error("the process that holds answers to grammars has ended")
            self.kill()

    def take(self, kind: str, *rest: Any) -> None:
        if kind == "ready":
            self.ready = True
        elif kind == "compiled":
            self.compiled[rest[0]] = rest[1]
        elif kind in ("mask", "broken") and rest[0] in self.asked:
            del self.asked[rest[0]]
            if kind == "mask":
                self.masks[rest[0]] = np.frombuffer(rest[1], np.int32)
            else:
                log.error("an answer left its grammar: %s", rest[1])

    def kill(self) -> None:
        """No answer is held any more by this process."""
        if not self.dead:
            self.dead = True
            self.process.kill()
            self.process.wait()
            self.channel.sock.close()

    # --- guides -------------------------------------------------------------------------------------------------------

    def ask(self, message: Message, guide: int) -> None:
        self.masks.pop(guide, None)
        self.asked[guide] = None
        self.send(message)

    def mask(self, guide: int) -> npt.NDArray[np.int32]:
        """What may come next. Raises RequestError or CapacityError: this answer, or all, can no longer be followed."""
        deadline = time.monotonic() + MASK_PATIENCE
        while guide not in self.masks:
            if self.dead or guide not in self.asked:
                raise too_slow("response_format") if self.walks.get(guide) == self.guilty else lost()
            left = deadline - time.monotonic()
            if left <= 0:
                log.warning("a grammar was not followed within %g s: its process is restarted", MASK_PATIENCE)
                self.guilty = self.walks.get(next(iter(self.asked)), "")
                self.blame(self.guilty)
                self.kill()
            else:
                self.pump(left)
        return self.masks[guide]

    def close(self, guide: int) -> None:
        """Its answer has ended."""
        self.walks.pop(guide, None)
        self.masks.pop(guide, None)
        self.asked.pop(guide, None)
        self.send(["close", guide])
        if self.retired and not self.walks:
            self.kill()


class Walk:
    """The guide of one answer. field: of the request, that the grammar came from."""

    def __init__(self, helper: Helper, number: int, field: str) -> None:
        self.helper, self.number, self.field, self.waited, self.tokens = helper, number, field, 0.0, 0
        weakref.finalize(self, helper.close, number).atexit = False

    def allowed_W(self) -> npt.NDArray[np.int32]:
        began = time.monotonic()
        found = self.helper.mask(self.number)
        self.waited += time.monotonic() - began
        if not found.any():
            raise RequestError("leads to where nothing may follow", where=self.field,
                               remedy="Correct it: what it asks for cannot be written.")  # fmt: skip
        if self.waited > ALLOWANCE + ALLOWANCE_EACH * self.tokens:
            self.helper.blame(self.helper.walks.get(self.number, ""))
            raise too_slow(self.field)
        return found

    def accept(self, token: int) -> None:
        self.tokens += 1
        self.helper.ask(["accept", self.number, token], self.number)


@dataclass
class Pending:
    """A prompt whose grammar is being compiled. since: when its turn came."""

    ids: Ids
    prompt: list[int]
    sampling: dict[str, Any]
    grammar: Sequence[str]
    helper: Helper | None
    problem: MoesaicError | None = None
    since: float | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.grammar).encode("utf-8", "surrogatepass")).hexdigest()


class Guides:
    """Requests that wait for their grammars, and the helpers that compile them. path: where the tokenizer lies."""

    def __init__(self, path: Path, vocab: int) -> None:
        self.path, self.vocab, self.numbers = path, vocab, iter(range(2**62))
        self.helpers: list[Helper] = []
        self.pending: dict[int, Pending] = {}
        self.refused: OrderedDict[str, None] = OrderedDict()

    @property
    def sources(self) -> list[socket.socket]:
        """Can be read when a helper has said something."""
        return [helper.channel.sock for helper in self.helpers if not helper.dead]

    def start(self, ids: Ids, prompt: list[int], sampling: dict[str, Any], grammar: Sequence[str]) -> None:
        number, entry = next(self.numbers), Pending(ids, prompt, sampling, grammar, None)
        self.pending[number] = entry
        self.submit(number, entry)

    def submit(self, number: int, entry: Pending) -> None:
        entry.since = entry.problem = entry.helper = None
        if entry.digest in self.refused:
            entry.problem = too_slow(entry.grammar[0])
            return
        try:
            entry.helper = self.helper()
            entry.helper.send(["compile", number, *entry.grammar])
        except MoesaicError as error:
            entry.problem = error

    def helper(self) -> Helper:
        """The one that takes new grammars. Raises where there is no package, or too many are busy with old ones."""
        if not available():
            raise UnsupportedError(
                "structured answers need the package xgrammar", where="response_format",
                remedy="Ask the operator for: pip install 'moesaic[grammar]'.",
            )  # fmt: skip
        self.helpers = [helper for helper in self.helpers if not helper.dead]
        open_ones = [helper for helper in self.helpers if not helper.retired]
        if open_ones:
            return open_ones[0]
        if len(self.helpers) >= MOST_HELPERS:
            raise CapacityError("too many grammars are being followed", remedy="Send the request again later.")
        self.helpers.append(Helper(self.path, self.vocab, self.refuse))
        return self.helpers[-1]

    def refuse(self, digest: str) -> None:
        self.refused[digest] = None
        if len(self.refused) > REMEMBERED:
            self.refused.popitem(last=False)

    def ready(self) -> Iterator[tuple[Ids, list[int], dict[str, Any], Guiding]]:
        """Those that can be queued, or refused, now."""
        for helper in list(self.helpers):
            helper.pump()
            self.watch(helper)
        for number, entry in list(self.pending.items()):
            helper = entry.helper  # type: ignore[assignment]  # None with a problem
            if entry.problem is None and not (helper and number in helper.compiled):
                continue
            del self.pending[number]
            if entry.ids:
                yield entry.ids, entry.prompt, entry.sampling, partial(self.guiding, number, entry)
            if helper is not None:
                helper.compiled.pop(number, None)
                helper.send(["forget", number])

    def watch(self, helper: Helper) -> None:
        """A helper that takes too long with its oldest grammar gets no more; the others that wait get another one."""
        mine = [(number, entry) for number, entry in self.pending.items() if entry.helper is helper]
        waiting = [(number, entry) for number, entry in mine if number not in helper.compiled]
        if not waiting:
            return
        now, (_, oldest) = time.monotonic(), waiting[0]
        if not helper.ready:
            late = now - helper.began > START_PATIENCE
        else:
            oldest.since = oldest.since or now
            late = now - oldest.since > COMPILE_PATIENCE
        if not late and not helper.dead:
            return
        oldest.problem, oldest.helper = lost(), None
        if helper.ready and not helper.dead:
            log.warning("a grammar was not compiled within %g s", COMPILE_PATIENCE)
            self.refuse(oldest.digest)
            oldest.problem = too_slow(oldest.grammar[0])
        helper.retired = True
        if not helper.walks:
            helper.kill()
        for number, entry in waiting[1:]:
            self.submit(number, entry)

    def guiding(self, number: int, entry: Pending) -> Callable[[frozenset[int]], Guide]:
        if entry.problem is not None:
            raise entry.problem
        helper = entry.helper
        assert helper is not None, "it has compiled this"
        problem = helper.compiled[number]
        if problem is not None:
            raise RequestError(problem["what"], where=problem["where"], remedy=problem["remedy"])

        def make(stops: frozenset[int]) -> Guide:
            guide = next(self.numbers)
            helper.walks[guide] = entry.digest
            helper.ask(["open", guide, number, sorted(stops)], guide)
            return Walk(helper, guide, field_of(entry.grammar[0]))

        return make

    def forget(self, ids: Iterable[str]) -> None:
        """Their client has left. What is being compiled goes on: its successor needs the helper anyway."""
        gone = set(ids)
        for entry in self.pending.values():
            if entry.ids and entry.ids[0][0] in gone:
                entry.ids = []
