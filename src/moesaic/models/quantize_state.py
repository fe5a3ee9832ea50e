"""The state of an unfinished `moesaic quantize`, in the directory that it writes: what a later run needs to go on.

One file, replaced as a whole after each shard, says what was asked for and which shards are done, with their reports.
As long as it is there, the directory belongs to the run that began it, and to the same run begun again. config.json is
written last: before that, no one takes the directory for a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moesaic.errors import OptionError
from moesaic.models.quantize_plan import Shard
from moesaic.models.quantize_report import Row
from moesaic.models.quantize_write import PARTIAL, flush, replace_durably

STATE = ".quantize.json"
_OURS = re.compile(rf"({re.escape(STATE)}|model(-\d+-of-\d+)?\.safetensors){re.escape(PARTIAL)}")
"""What a run that ended early may leave besides: files that were being written."""
VERSION = 1
"""To be raised when the same options give other bytes than before: half of a checkpoint must not be of another kind."""


class Workspace:
    """The directory of a result, locked against a second run. A context manager.

    options: whatever decides about the bytes of the result, as JSON.
    """

    def __init__(self, directory: Path, options: Mapping[str, Any]) -> None:
        """Creates the directory, or takes up what was begun there.

        Raises OptionError where it holds anything else, was begun with other options, or another process is at work.
        """
        self.directory, self.options = directory, {"version": VERSION, **options}
        self.scales: dict[str, float] = {}
        self.done: dict[str, list[Row]] = {}
        if directory.exists() and not directory.is_dir():
            raise OptionError("is not a directory", where=str(directory), remedy="Choose another DST.")
        directory.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.take()
        except BaseException:
            os.close(self.lock)
            raise

    def take(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(
                "another process is writing there", where=str(self.directory), remedy="Wait for it, or stop it."
            ) from None
        path = self.directory / STATE
        if path.exists():
            state = read_state(path)
            if state["options"] == self.options or any(self.directory.glob("*.safetensors")):
                self.check_options(state["options"])
                self.scales = state["scales"]
                self.done = {name: [Row.of(row) for row in rows] for name, rows in state["done"].items()}
                return
            path.unlink()  # nothing was written yet: begin with the new options
        foreign = [entry.name for entry in self.directory.iterdir() if not _OURS.fullmatch(entry.name)]
        if foreign:
            what = f"is not empty (it holds {sorted(foreign)[0]!r})"
            raise OptionError(what, where=str(self.directory), remedy="Choose another DST.")
        self.save()

    def check_options(self, begun: Mapping[str, Any]) -> None:
        names = [name for name in {**begun, **self.options} if begun.get(name) != self.options.get(name)]
        if "source" in names:
            raise OptionError(
                "was begun from another source, or the source has changed since", where=str(self.directory),
                remedy="Remove it and begin again, or choose another DST.",
            )  # fmt: skip
        if names:
            said = ", ".join(f"{name} {begun.get(name)!r}, now {self.options.get(name)!r}" for name in names)
            raise OptionError(
                f"was begun with other options: {said}", where=str(self.directory),
                remedy="Use those to go on, or remove it and begin again.",
            )  # fmt: skip

    def finished(self, shard: Shard) -> bool:
        return shard.name in self.done and (self.directory / shard.name).is_file()

    def finish(self, shard: Shard, rows: list[Row]) -> None:
        self.done[shard.name] = rows
        self.save()

    def save(self) -> None:
        done = {name: [row.as_json() for row in rows] for name, rows in self.done.items()}
        write_text(self.directory / STATE, json.dumps({"options": self.options, "scales": self.scales, "done": done}))

    def close(self) -> None:
        """All is done: removes what only an unfinished run needs. The state goes last."""
        for left in self.directory.iterdir():
            if _OURS.fullmatch(left.name):
                left.unlink()
        (self.directory / STATE).unlink()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.lock)


def read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {name: state[name] for name in ("options", "scales", "done")}
    except (OSError, ValueError, KeyError, TypeError):
        raise OptionError(
            "is not what an unfinished run leaves behind", where=str(path), remedy="Remove the directory, begin again."
        ) from None


def write_text(path: Path, text: str) -> None:
    """The whole file or none, durably."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    replace_durably(partial, path)
