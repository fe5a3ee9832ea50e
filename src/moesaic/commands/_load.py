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
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from moesaic.errors import OptionError, RequestError

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
LINE = 1 << 20


@dataclass
class Sample:
    """One request. Times in seconds: `sent` since the load began, `pieces` since it was sent. error: why it failed.

    streamed: whether the answer came in events; without, it has no first token to time.  tokens: as the server counts
    them, else one per piece.
    """

    sent: float
    pieces: list[float] = field(default_factory=list)
    took: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    streamed: bool = True
    error: str | None = None


@dataclass(frozen=True)
class Load:
    """What to send. rate: requests per second, None at once.  concurrency: streams at once, None any number.
    words, tokens: ranges.  chat: conversations, not plain prompts.  timeout: seconds for one request.
    extra: more fields of each body, instead of ours where they are the same.
    """

    url: str
    model: str
    requests: int
    rate: float | None
    concurrency: int | None
    words: tuple[int, int]
    tokens: tuple[int, int]
    seed: int
    key: str | None = None
    chat: bool = False
    timeout: float = 600.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, prompt: str, limit: int) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        return {"model": self.model, **asked, "max_tokens": limit, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}, **self.extra}  # fmt: skip


class Target:
    """Where a URL points to."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"{url!r} is no http URL", where="--url", remedy="Write http://HOST:PORT.")
        self.host, self.tls = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self.port = port or (443 if self.tls else 80)
        name = f"[{self.host}]" if ":" in self.host else self.host
        self.name = f"{name}:{self.port}"
        self.path = parts.path.rstrip("/").removesuffix("/v1")

    async def call(self, method: str, path: str, body: Any, key: str | None) -> AsyncGenerator[bytes, None]:
        """The lines of the answer's body as they come. Raises RequestError for any status but 200."""
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=LINE)
        try:
            raw = b"" if body is None else json.dumps(body).encode()
            head = [f"{method} {self.path}{path} HTTP/1.1", f"host: {self.name}", "connection: close",
                    "content-type: application/json", f"content-length: {len(raw)}"]  # fmt: skip
            head += [f"authorization: Bearer {key}"] if key else []
            writer.write("\r\n".join([*head, "", ""]).encode() + raw)
            status = (await reader.readline()).split(b" ")
            chunked = False
            while (line := (await reader.readline()).strip().lower()) != b"":
                chunked |= line.startswith(b"transfer-encoding:") and b"chunked" in line
            if len(status) < 2 or status[1] != b"200":
                text = " ".join((await reader.read(500)).decode("utf-8", "replace").split())
                what = b" ".join(status[1:]).decode(errors="replace").strip() or "no answer"
                raise RequestError(f"{what}: {text}", where=path)
            async for line in lines(reader, chunked=chunked):
                yield line
        finally:
            writer.close()


async def lines(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncIterator[bytes]:
    """Whole lines, then what is left. Raises IncompleteReadError where a chunked body is cut off."""
    held = b""
    while True:
        if chunked:
            size = int((await reader.readline()).split(b";")[0].strip() or b"-", 16)
            data = (await reader.readexactly(size + 2))[:-2]
        else:
            data = await reader.read(65536)
        *whole, held = (held + data).split(b"\n")
        for line in whole:
            yield line
        if not data:
            if held:
                yield held
            return


async def first_model(load: Load) -> str:
    """The first model that the server lists. Raises RequestError."""
    try:
        async with asyncio.timeout(load.timeout):
            text = b"".join([line async for line in Target(load.url).call("GET", "/v1/models", None, load.key)])
        return str(json.loads(text)["data"][0]["id"])
    except (*FAILURES, LookupError, TypeError) as error:
        raise RequestError(f"the server does not say which models it has ({told(error)})", where="--url",
                           remedy="Check that it runs, or name a --model.") from None  # fmt: skip


FAILURES = (OSError, RequestError, ValueError, asyncio.IncompleteReadError, TimeoutError)
"""What may happen to a request; any of them is one failed sample."""


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


async def one(target: Target, load: Load, prompt: str, limit: int, began: float) -> Sample:
    sample = Sample(time.perf_counter() - began)
    sent = time.perf_counter()
    path = "/v1/chat/completions" if load.chat else "/v1/completions"
    try:
        async with asyncio.timeout(load.timeout):
            async with aclosing(target.call("POST", path, load.body(prompt, limit), load.key)) as answer:
                await read(sample, answer, sent)
    except TimeoutError:
        sample.error = f"no end within {load.timeout:g} s"
    except (*FAILURES, LookupError, TypeError, AttributeError) as error:  # the last: JSON that is no OpenAI answer
        sample.error = told(error)
    sample.took = time.perf_counter() - sent
    return sample


async def read(sample: Sample, answer: AsyncIterator[bytes], sent: float) -> None:
    """Fills a sample from an answer's lines: events, or, from a server that does not stream, one JSON object."""
    plain: list[bytes] = []
    async for line in answer:
        now = time.perf_counter() - sent
        if not line.startswith(b"data:"):
            plain.append(line)
            continue
        if line[5:].strip() == b"[DONE]":
            sample.tokens = sample.tokens or len(sample.pieces)
            return
        event = json.loads(line[5:])
        if event.get("error"):
            raise RequestError(str(event["error"]), where="stream")
        if take(sample, event, "delta"):
            sample.pieces.append(now)
    whole = b"\n".join(plain).strip()
    if sample.pieces or not whole.startswith(b"{"):
        raise RequestError("ended before [DONE]", where="stream")
    sample.streamed = False
    take(sample, json.loads(whole), "message")


def take(sample: Sample, event: Any, part: str) -> bool:
    """Adds what an event or an answer says; whether it brought text."""
    if usage := event.get("usage"):
        sample.prompt_tokens = usage.get("prompt_tokens") or 0
        sample.tokens = usage.get("completion_tokens") or 0
    choice = (event.get("choices") or [{}])[0]
    message = choice.get(part) or {}
    said = choice.get("text") or message.get("content") or ""
    sample.text += said
    return bool(said or message.get("reasoning_content") or message.get("reasoning") or message.get("tool_calls"))


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
    target, began = Target(load.url), time.perf_counter()
    gate = asyncio.Semaphore(load.concurrency or load.requests)

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
        "requests": len(samples), "errors": len(samples) - len(good),
        "not_streamed": sum(not sample.streamed for sample in good), "seconds": round(seconds, 3),
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
