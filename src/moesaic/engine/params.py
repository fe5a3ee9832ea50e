"""What a user may ask of one request."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, NoneType

from moesaic.errors import RequestError

MAX_LOGPROBS = 20
MAX_N = 1024
LARGEST = sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. Immutable; checked when made.

    temperature: 0 is greedy.  top_k: 0 is off.  top_p, min_p: probabilities in (0, 1] and [0, 1].
    repetition_penalty: multiplicative, over prompt and output; presence / frequency: additive, over output only.
    logit_bias: token id -> addend.  seed: makes one request repeatable whatever runs beside it.
    logprobs, prompt_logprobs: how many alternatives to report per position (the chosen token is always included).
    stop: strings that end the text (not included in it unless include_stop).  stop_token_ids: extra end tokens.
    max_tokens: None means up to the model's length.  min_tokens: no end token or stop string before this many.
    n: how many independent completions of the prompt.
    Raises RequestError naming the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = 1

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", MappingProxyType({int(k): float(v) for k, v in self.logit_bias.items()}))
        self._check_ranges()
        self._check_counts()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def _check_types(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(type(value) in (int, float) and abs(value) <= LARGEST, name, "a finite number")
        for name in ("top_k", "min_tokens", "n"):
            require(type(getattr(self, name)) is int, name, "an integer")
        for name in ("seed", "logprobs", "prompt_logprobs", "max_tokens"):
            require(type(getattr(self, name)) in (int, NoneType), name, "an integer or None")
        for name in ("include_stop", "ignore_eos", "skip_special_tokens"):
            require(type(getattr(self, name)) is bool, name, "True or False")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        require(all(isinstance(text, str) for text in stops), "stop", "made of strings")
        require(all(type(token) is int for token in self.stop_token_ids), "stop_token_ids", "made of integers")
        biases = self.logit_bias.items()
        legal = all(isinstance(k, (int, str)) and type(v) in (int, float) and abs(v) <= 100 for k, v in biases)
        require(legal, "logit_bias", "from token ids to values in [-100, 100]")

    def _check_ranges(self) -> None:
        require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a finite number >= 0")
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        require(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        require(math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty", "> 0")
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2 <= getattr(self, name) <= 2, name, "in [-2, 2]")

    def _check_counts(self) -> None:
        require(self.top_k >= 0, "top_k", ">= 0 (0 is off)")
        require(1 <= self.n <= MAX_N, "n", f"in [1, {MAX_N}]")
        require(self.min_tokens >= 0, "min_tokens", ">= 0")
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", ">= 1 or None")
        require(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "<= max_tokens")
        require(self.seed is None or 0 <= self.seed < 2**63, "seed", "in [0, 2**63)")
        require(all(self.stop), "stop", "made of non-empty strings")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= MAX_LOGPROBS, name, f"in [0, {MAX_LOGPROBS}] or None")


def require(condition: bool, name: str, expected: str) -> None:
    """Raise a RequestError about the sampling parameter `name` unless the condition holds."""
    if not condition:
        raise RequestError(f"must be {expected}", where=name, remedy="Correct the sampling parameter.")
