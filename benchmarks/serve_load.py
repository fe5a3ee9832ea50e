"""512 streams at once for a minute, `--deterministic`: is every stream complete, and equal to what it is alone?

First every request is made by a single client, one after another. Then as many clients as there are streams make the
same requests over and over until the time is up; each answer is compared with the one it had alone.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.machine import describe, save
from benchmarks.serving import Serving, engine_threads
from moesaic.commands._load import Load, Sample, Target, one, plans, run, summary

WORDS, TOKENS = (3, 40), (8, 48)
FLAGS = ("--deterministic", "--max-num-seqs", "256", "--kv-memory", "256MiB")


async def keep_open(load: Load, seconds: float) -> tuple[list[tuple[int, Sample]], float]:
    """As many streams as the load has requests, each followed by another until the time is up: (which plan, sample)."""
    target, planned, began = Target(load.url), plans(load), time.perf_counter()
    found: list[tuple[int, Sample]] = []

    async def client(first: int) -> None:
        number = first
        while time.perf_counter() - began < seconds:
            _, prompt, limit = planned[number % len(planned)]
            found.append((number % len(planned), await one(target, load, prompt, limit, began)))
            number += 7  # other neighbours each time

    await asyncio.gather(*(client(i) for i in range(load.requests)))
    return found, time.perf_counter() - began


def measure(streams: int, seconds: float) -> dict[str, Any]:
    with Serving(*FLAGS, "--max-queue", str(streams)) as it:
        load = Load(it.url, "tiny", streams, None, 1, WORDS, TOKENS, 0)
        alone, _ = asyncio.run(run(load))
        found, took = asyncio.run(keep_open(load, seconds))
        it.until_idle()
    answers = [sample.text for sample in alone]
    samples = [sample for _, sample in found]
    wrong = sum(sample.text != answers[number] for number, sample in found if sample.error is None)
    incomplete = sum(sample.tokens != alone[number].tokens for number, sample in found if sample.error is None)
    return {"streams": streams, "asked_seconds": seconds, "alone_errors": sum(each.error is not None for each in alone),
            "different": wrong, "incomplete": incomplete, **summary(samples, took)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    found = measure(args.streams, args.seconds)
    print(f"{found['requests']} streams in {found['seconds']:.0f} s, {args.streams} at once: {found['errors']} errors, "
          f"{found['different']} differ from their answers alone, {found['incomplete']} incomplete")  # fmt: skip
    result = {"what": "many streams at once, each compared with its answer alone", "model": "tiny",
              "threads": engine_threads(), "flags": " ".join(FLAGS), "words": WORDS, "tokens_asked": TOKENS, **found,
              "source": describe("torch", "uvicorn", "uvloop")}  # fmt: skip
    save("serve-load", result)


if __name__ == "__main__":
    main()
