"""The options of the server, beside those of the engine; and how flags, environment and a YAML file become one set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moesaic.config import EngineConfig, flag
from moesaic.errors import OptionError

SOURCES = ("flag", "environment", "file")
"""Where an option may come from; an earlier one wins. What none of them sets has its default."""
HIDDEN = "<hidden>"
"""What `--print-config` shows of a key, and what is therefore none."""
LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How the server meets its clients. Times in seconds, sizes in bytes.

    served_model_name: what clients may call the model; none: its path or hub id.  api_key, api_key_file: keys that are
        let in (the file has one per line); none: everybody.  cors_origin: web pages that may call; none: none.
    max_queue: completions waiting beside the running ones before new ones get 429.
    request_timeout: of one request, from its arrival to its last byte.  header_timeout: to receive one.
    drain_timeout: after SIGTERM, for running requests to end by themselves.
    engine_timeout: for the engine to say anything, before it counts as dead; a step may compile kernels.
    max_*: what one request may ask; max_prompt_tokens None: what fits the model.
    tool_parser, reasoning_parser: `auto` chooses by the chat template, `none` is off.
    expert_load: sample how evenly experts are used.  expert_series: one metric per expert, not only per layer.
    log_prompts: write prompts to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    api_key_file: str | None = None
    cors_origin: tuple[str, ...] = ()
    max_queue: int = 256
    request_timeout: float = 600.0
    header_timeout: float = 20.0
    drain_timeout: float = 30.0
    engine_timeout: float = 600.0
    max_connections: int = 4096
    max_body: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_n: int = 16
    max_top_logprobs: int = 20
    max_schema: int = 64 << 10
    max_schema_depth: int = 16
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    expert_load: bool = True
    expert_series: bool = True
    log_json: bool = False
    log_file: str | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("served_model_name", "api_key", "cors_origin"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 <= self.port <= 65535:
            raise wrong("port", "must be in [0, 65535] (0: any free one)")
        for name in ("max_connections", "max_body", "max_n", "max_schema", "max_schema_depth"):
            if getattr(self, name) < 1:
                raise wrong(name, "must be positive")
        if self.max_queue < 0 or not 0 <= self.max_top_logprobs <= 20:
            raise wrong("max_queue" if self.max_queue < 0 else "max_top_logprobs", "is out of range")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise wrong("max_prompt_tokens", "must be positive")
        for name in ("request_timeout", "header_timeout", "engine_timeout"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise wrong(name, "must be a positive number of seconds")
        if not (math.isfinite(self.drain_timeout) and self.drain_timeout >= 0):
            raise wrong("drain_timeout", "must be a number of seconds")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_key):
            raise wrong("api_key", "must be printable ASCII without spaces")
        if HIDDEN in self.api_key:
            raise wrong("api_key", f"{HIDDEN} is what --print-config shows instead of a key")

    def keys(self) -> tuple[str, ...]:
        """All keys that are let in. Raises OptionError for a file that cannot be read, or holds none."""
        if self.api_key_file is None:
            return self.api_key
        try:
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8"
            raise wrong("api_key_file", f"{self.api_key_file} cannot be read ({reason})") from None
        found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
        if not found:
            raise wrong("api_key_file", f"{self.api_key_file} holds no key")
        return (*self.api_key, *ServeConfig(api_key=found).api_key)

    @property
    def exposed(self) -> bool:
        """Whether others than this machine can reach it."""
        return self.host not in LOCAL


def wrong(name: str, what: str) -> OptionError:
    return OptionError(what, where=flag(name), remedy="Correct the value.")


@dataclass(frozen=True)
class Resolved:
    """All options, and where each that is not at its default came from."""

    model: str | None
    serve: ServeConfig
    engine: EngineConfig
    sources: Mapping[str, str]

    def shown(self) -> dict[str, Any]:
        """Every option as plain data for `--print-config`; keys are counted, never shown."""
        found: dict[str, Any] = {"model": self.model}
        for part in (self.serve, self.engine):
            for field in fields(part):
                value = getattr(part, field.name)
                found[field.name] = list(value) if isinstance(value, tuple) else value
        found["api_key"] = [HIDDEN] * len(self.serve.api_key)
        return found


def resolve(layers: Mapping[str, Mapping[str, Any]]) -> Resolved:
    """layers: for each of SOURCES, option -> value of the right type. Raises OptionError for one that is unknown."""
    serve_names = {field.name for field in fields(ServeConfig)}
    engine_names = {field.name for field in fields(EngineConfig)}
    chosen: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source in SOURCES:
        for name, value in layers.get(source, {}).items():
            if name not in serve_names | engine_names | {"model"}:
                known = ", ".join(sorted(serve_names | engine_names | {"model"}))
                raise OptionError(f"unknown option (from the {source})", where=name, remedy=f"Known: {known}.")
            if name not in chosen:
                chosen[name], sources[name] = value, source
    serve = ServeConfig(**{name: value for name, value in chosen.items() if name in serve_names})
    engine = EngineConfig.of({name: value for name, value in chosen.items() if name in engine_names})
    return Resolved(chosen.get("model"), serve, engine, sources)
