"""The server's log: one line per request, as text or as JSON. No keys are in it, and prompts only if asked."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesaic.errors import OptionError
from moesaic.serving.options import ServeConfig

log = logging.getLogger("moesaic.serve")


class Lines(logging.Formatter):
    """`extra={"fields": {...}}` of a record becomes JSON members, or ` name=value` at the end of a line."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        fields: dict[str, Any] = getattr(record, "fields", {})
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if self.as_json:
            return json.dumps({"time": when, "level": record.levelname.lower(), "message": text, **fields})
        tail = "".join(f" {name}={shown(value)}" for name, value in fields.items() if value is not None)
        return f"{when} {record.levelname.lower()} {text}{tail}"


def shown(value: Any) -> str:
    """A value on one line: text that holds white space or control characters is quoted as JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)


class Handler(logging.StreamHandler[Any]):
    """Never fails: a record that cannot be written (a full disk, a closed pipe) is counted and dropped."""

    def __init__(self, stream: Any, lost: Callable[[], None]) -> None:
        super().__init__(stream)
        self.lost = lost

    def handleError(self, record: logging.LogRecord) -> None:
        self.lost()


def set_up(config: ServeConfig, lost: Callable[[], None]) -> Handler:
    """Directs our log, and uvicorn's errors, to stderr or --log-file. Raises OptionError if that cannot be opened."""
    stream: Any = sys.stderr
    if config.log_file is not None:
        try:
            path = Path(config.log_file)  # open as long as the process lives
            stream = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            raise OptionError(f"cannot be opened ({error.strerror})", where="--log-file",
                              remedy="Name a file that can be written.") from None  # fmt: skip
    handler = Handler(stream, lost)
    handler.setFormatter(Lines(as_json=config.log_json))
    for name, level in (("moesaic", logging.INFO), ("uvicorn", logging.ERROR), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    return handler
