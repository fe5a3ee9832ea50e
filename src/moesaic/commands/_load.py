"""Load on an OpenAI-compatible server: requests at a rate, each a stream whose every piece is timed.

A small HTTP/1.1 client of its own: nothing to install, and little of the machine taken from the server beside it.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from moesaic.errors import OptionError, RequestError

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
LINE = 1 << 20


@dataclass
class Sample:
    """One request. Times in seconds: `sent` since the load began, `pieces` since it was sent. error: why it failed."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    took: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Load:
    """What to send. rate: requests per second, None at once.  concurrency: streams at once.  words, tokens: ranges."""

    url: str
    model: str
    requests: int
    rate: float | None
    concurrency: int
    words: tuple[int, int]
    tokens: tuple[int, int]
    seed: int
    key: str | None = None


class Target:
    """Where a URL points to."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"{url!r} is no http URL", where="--url", remedy="Write http://HOST:PORT.")
        self.host, self.tls = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/").removesuffix("/v1")

    async def post(self, path: str, body: Any, key: str | None) -> AsyncIterator[bytes]:
        """The lines of the answer's body as they come. Raises RequestError for any status but 200."""
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=LINE)
        try:
            raw = json.dumps(body).encode()
            head = [f"POST {self.path}{path} HTTP/1.1", f"host: {self.host}:{self.port}", "connection: close",
                    "content-type: application/json", f"content-length: {len(raw)}"]  # fmt: skip
            head += [f"authorization: Bearer {key}"] if key else []
            writer.write("\r\n".join([*head, "", ""]).encode() + raw)
            status = (await reader.readline()).split(b" ")
            chunked = False
            while (line := (await reader.readline()).strip().lower()) != b"":
                chunked |= line.startswith(b"transfer-encoding:") and b"chunked" in line
            if len(status) < 2 or status[1] != b"200":
                text = (await reader.read(2000)).decode("utf-8", "replace")
                raise RequestError(f"{b' '.join(status).decode(errors='replace').strip()}: {text}", where=path)
            async for line in lines(reader, chunked=chunked):
                yield line
        finally:
            writer.close()


async def lines(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncIterator[bytes]:
    held = b""
    while True:
        if chunked:
            size = int((await reader.readline()).split(b";")[0] or b"0", 16)
            data = (await reader.readexactly(size + 2))[:-2]
        else:
            data = await reader.read(65536)
        *whole, held = (held + data).split(b"\n")
        for line in whole:
            yield line
        if not data:
            return


async def one(target: Target, load: Load, prompt: str, limit: int, began: float) -> Sample:
    sample = Sample(time.perf_counter() - began)
    sent = time.perf_counter()
    body = {"model": load.model, "prompt": prompt, "max_tokens": limit, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    done = False
    try:
        async for line in target.post("/v1/completions", body, load.key):
            now = time.perf_counter() - sent
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                done = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise RequestError(str(event["error"].get("message")), where="stream")
            if usage := event.get("usage"):
                sample.prompt_tokens, sample.tokens = usage["prompt_tokens"], usage["completion_tokens"]
            if event["choices"] and event["choices"][0].get("text"):
                sample.pieces.append(now)
                sample.text += event["choices"][0]["text"]
        if not done:
            sample.error = "the stream ended before [DONE]"
    except (OSError, RequestError, ValueError, asyncio.IncompleteReadError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.took = time.perf_counter() - sent
    return sample


def plans(load: Load) -> list[tuple[float, str, int]]:
    """(when, prompt, most tokens) of each request: Poisson arrivals, uniform lengths; by the seed alone."""
    dice, at, found = random.Random(load.seed), 0.0, []
    for _ in range(load.requests):
        prompt = " ".join(dice.choices(WORDS, k=dice.randint(*load.words)))
        found.append((at, prompt, dice.randint(*load.tokens)))
        at += dice.expovariate(load.rate) if load.rate else 0.0
    return found


async def run(load: Load) -> tuple[list[Sample], float]:
    """Every request's sample, and the seconds that all took."""
    target, gate, began = Target(load.url), asyncio.Semaphore(load.concurrency), time.perf_counter()

    async def later(when: float, prompt: str, limit: int) -> Sample:
        await asyncio.sleep(max(0.0, when - (time.perf_counter() - began)))
        async with gate:
            return await one(target, load, prompt, limit, began)

    samples = await asyncio.gather(*(later(*each) for each in plans(load)))
    return list(samples), time.perf_counter() - began


def summary(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Counts, throughput and percentiles (milliseconds) of what succeeded."""
    good = [sample for sample in samples if sample.error is None]
    gaps = [b - a for sample in good for a, b in zip(sample.pieces, sample.pieces[1:], strict=False)]
    tokens = sum(sample.tokens for sample in good)
    return {
        "requests": len(samples), "errors": len(samples) - len(good), "seconds": round(seconds, 3),
        "requests_per_s": round(len(good) / seconds, 2), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1),
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "ttft_ms": percentiles([sample.pieces[0] for sample in good if sample.pieces]),
        "itl_ms": percentiles(gaps),
        "e2e_ms": percentiles([sample.took for sample in good]),
    }  # fmt: skip


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """By nearest rank, in milliseconds."""
    ordered = sorted(values)
    if not ordered:
        return {}
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(1e3 * ordered[math.ceil(part * len(ordered)) - 1], 3) for name, part in places.items()}
