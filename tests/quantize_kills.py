"""Run by tests/test_quantize_resume.py in a process of its own: `moesaic quantize` again and again, killed on the way.

    python -m tests.quantize_kills SRC DIRECTORY SHARD_SIZE POINT...

A point is `N`, the Nth time that the run opens, renames, removes or creates something in its output; `-N`, the Nth such
time from the end; or `cN`, the Nth projection that it converts. There the process sends itself SIGKILL. Each point has
an output of its own, which a second run then completes. A line of JSON per point says how the first run ended and what
it left. Point 0, which is never reached, comes first: a whole run, whose events are counted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import moesaic.models.quantize  # imported once, before the forks
from moesaic.cli import main
from moesaic.models.quantize_write import Writer

TOUCHING = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, output: Path) -> Callable[[], int]:
    """Sets the trap; what it returns says how many events there were."""
    seen, at = [0], int(point.removeprefix("c"))

    def count() -> None:
        seen[0] += 1
        if seen[0] == at:
            die()

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        if event in TOUCHING and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(str(output)):
            count()

    def on_call(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is Writer.convert.__code__:
            count()

    if point.startswith("c"):
        sys.setprofile(on_call)
    else:
        sys.addaudithook(on_event)
    return lambda: seen[0]


def run(source: str, output: Path, shard: str, point: str) -> tuple[int, int]:
    """(exit code, or minus the signal; events) of one run in a child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        seen = arm(point, output)
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(["quantize", source, str(output), "--scheme", "mxfp8", "--shard-size", shard])
        os.write(write, str(seen()).encode())
        os._exit(code)
    os.close(write)
    events = os.read(read, 100)
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(events or 0)


if __name__ == "__main__":
    assert moesaic.models.quantize
    total = 0
    for number, point in enumerate(["0", *sys.argv[4:]]):
        point = str(total + 1 + int(point)) if point.startswith("-") else point
        output = Path(sys.argv[2]) / f"{number}-{point}"
        ended, events = run(sys.argv[1], output, sys.argv[3], point)
        total = total or events
        left = sorted(path.name for path in output.iterdir()) if output.exists() else []
        again = run(sys.argv[1], output, sys.argv[3], "0") if ended else (0, 0)
        told = {"point": point, "output": str(output), "ended": ended, "events": events, "left": left}
        print(json.dumps(told | {"again": again[0]}), flush=True)
