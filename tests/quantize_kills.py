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
        if event in TOUCHING and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(f"{output}"):
            count()

    def on_call(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is Writer.convert.__code__:
            count()

    if point.startswith("c"):
        sys.setprofile(on_call)
    else:
        sys.addaudithook(on_event)
    return lambda: seen[0]


def quantize(source: str, output: Path, shard: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return main(["quantize", source, str(output), "--scheme", "mxfp8", "--shard-size", shard])


def run(source: str, output: Path, shard: str, point: str) -> int:
    """The exit code, or minus the signal, of one run in a child."""
    child = os.fork()
    if child == 0:
        arm(point, output)
        os._exit(quantize(source, output, shard))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tell(**facts: Any) -> None:
    print(json.dumps({name: str(fact) if isinstance(fact, Path) else fact for name, fact in facts.items()}), flush=True)


if __name__ == "__main__":
    source, directory, shard = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    directory.mkdir(exist_ok=True)  # or the first run alone would make it
    whole = directory / "0"
    count = arm("0", whole)  # in this process: what is imported on the way is there in every child
    tell(point="0", output=whole, ended=quantize(source, whole, shard), events=(total := count()))
    for number, point in enumerate(sys.argv[4:], 1):
        point = str(total + 1 + int(point)) if point.startswith("-") else point
        output = directory / f"{number}-{point}"
        ended = run(source, output, shard, point)
        left = sorted(path.name for path in output.iterdir()) if output.exists() else []
        tell(point=point, output=output, ended=ended, left=left, again=run(source, output, shard, "0"))
