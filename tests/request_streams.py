"""Random requests that come over time, and what is to be compared of their answers: on a CPU, and on a GPU."""

from __future__ import annotations

import random
from typing import Any

from moesaic.engine.engine import Engine
from moesaic.engine.output import Delta
from moesaic.engine.params import SamplingParams


def kinds() -> list[SamplingParams]:
    """Every way of choosing, and every reason to stop; rows that can be run ahead of and rows that cannot."""
    each: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0, "logprobs": 3}, {"seed": 1}, {"seed": 2, "top_k": 5, "logprobs": 2},
        {"seed": 3, "top_p": 0.9, "logprobs": 1}, {"seed": 4, "min_p": 0.1, "temperature": 0.7},
        {"seed": 5, "repetition_penalty": 1.2}, {"temperature": 0, "logit_bias": {5: 3.0}, "min_tokens": 3},
        {"temperature": 0, "stop_token_ids": tuple(range(0, 256, 7)), "prompt_logprobs": 1}, {"seed": 9, "top_p": 0.99},
    ]  # fmt: skip
    return [SamplingParams(max_tokens=3 + 5 * (i % 4), ignore_eos=True, **kind) for i, kind in enumerate(each)]


def answers(engine: Engine, rng: random.Random, count: int = 40, aborts: bool = False) -> dict[str, list[Delta]]:
    """Requests that come over time; with aborts, some are ended from outside."""
    found: dict[str, list[Delta]] = {}
    every, waiting = kinds(), [f"{i}" for i in range(count)]
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.6:
            name = waiting.pop(0)
            number = int(name)
            prompt = [3 + (number * 7 + k) % 200 for k in range(1 + number * 5 % 60)]
            engine.add(name, prompt, every[number % len(every)])
            found[name] = []
        for delta in engine.step():
            found[delta.request_id].append(delta)
        engine.check()
        if aborts and engine.states and rng.random() < 0.1:
            engine.abort(rng.choice(sorted(engine.states)))
    return found


def summary(found: dict[str, list[Delta]]) -> dict[str, Any]:
    return {
        name: (
            [t for d in deltas for t in d.tokens], [e for d in deltas for e in d.logprobs],
            next((d.prompt_logprobs for d in deltas if d.prompt_logprobs), None), deltas[-1].finish_reason,
            deltas[-1].stop_reason,
        )
        for name, deltas in found.items()
    }  # fmt: skip
