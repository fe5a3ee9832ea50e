"""One request on its way through the engine: its tokens, its blocks, how far it has come.

Torch-free. The scheduler owns the mutable part (`tokens`, `computed`, `blocks`, `status` ...); everybody else reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, StrEnum, auto
from typing import TYPE_CHECKING

from moesaic.engine.params import SamplingParams

if TYPE_CHECKING:
    from moesaic.engine.grammar import Guide


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Request:
    """A prompt, what was asked of it, and its progress.

    tokens: prompt followed by output; only ever grows, so positions are stable, also across preemption.
    computed: the first `computed` tokens have their keys and values in the cache; always < len(tokens) while alive.
    blocks: block i holds positions [i * block_size, (i + 1) * block_size). The list object is replaced, not cleared,
        when the request leaves the cache: a step in flight may still hold the old one.
    arrival: the scheduler's sequence number; earlier arrival is higher priority.  seed: the effective one.
    stops: the ids that end the output; eos ids are in it unless ignored.
    max_total: most tokens (prompt and output) the request may reach; 0 until the scheduler has accepted it.
    cached_prompt_tokens: prompt tokens found in the prefix cache on first admission.
    guide: holds the output to a grammar; None where there is none.
    stop_reason: the id or string that ended it; None for an eos token or a length.
    Equality is identity: two requests may carry the same id at different times.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cached_prompt_tokens",
        "computed",
        "eos_token_ids",
        "finish_reason",
        "guide",
        "id",
        "max_total",
        "min_total",
        "num_prompt",
        "params",
        "preemptions",
        "prompt",
        "seed",
        "status",
        "stop_reason",
        "stops",
        "tokens",
    )

    def __init__(
        self,
        id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_token_ids: frozenset[int] = frozenset(),
        seed: int = 0,
    ) -> None:
        self.id = id
        self.prompt = tuple(prompt)
        self.params = params
        self.eos_token_ids = eos_token_ids
        self.seed = seed
        self.tokens = list(self.prompt)
        self.num_prompt = len(self.prompt)
        self.stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.min_total = self.num_prompt + params.min_tokens
        self.max_total = 0
        self.arrival = -1
        self.computed = 0
        self.blocks: list[int] = []
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.cached_prompt_tokens = 0
        self.preemptions = 0
        self.guide: Guide | None = None

    @property
    def output(self) -> list[int]:
        """The generated tokens (a copy)."""
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def decoding(self) -> bool:
        """Whether all that is left to compute is the newest generated token."""
        return self.num_prompt <= self.computed == len(self.tokens) - 1

    def judge(self) -> bool:
        """Whether the newest token ends the request; sets `finish_reason` and `stop_reason` if it does.

        An end token counts once the output, this token included, has min_tokens; it stays part of the output.
        """
        token, total = self.tokens[-1], len(self.tokens)
        if token in self.stops and total >= self.min_total:
            self.finish_reason = FinishReason.STOP
            is_eos = token in self.eos_token_ids and not self.params.ignore_eos
            self.stop_reason = None if is_eos else token
            return True
        if total >= self.max_total:
            self.finish_reason = FinishReason.LENGTH
            return True
        return False

    def __repr__(self) -> str:
        state = f"{self.status.name.lower()} {self.computed}/{len(self.tokens)}"
        return f"Request({self.id!r}, arrival {self.arrival}, {state}, {len(self.blocks)} blocks)"
