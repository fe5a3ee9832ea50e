"""The options of an engine: one frozen tree, checked when made. The only module that may read the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moesaic.errors import OptionError

DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")
KV_FORMATS = ("bf16", "fp8")
LOAD_FORMATS = ("safetensors", "dummy")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is run. Sizes in tokens unless said; memory in bytes.

    dtype: what is computed in; `auto` is the checkpoint's own where the hardware multiplies it, else float32.
    max_model_len: most tokens of one request, prompt included; None is the model's own limit, less where the KV pool
        cannot hold it.  block_size: tokens per KV block.
    kv_memory: bytes of KV pool.  gpu_memory_utilization: where that is None, the part of the memory free before loading
        that weights and pool together may take. Both None: 1 GiB of pool on a CPU, or what one longest request needs.
    max_num_seqs: requests running at once.  max_num_batched_tokens: tokens per step, hence the prefill chunk.
    prefix_cache: reuse the KV of shared prompt beginnings.
    deterministic: a request's tokens do not depend on what runs beside it, on chunking, preemption or prefix hits.
    kv: format of the KV cache: `bf16` is the dtype that is computed in, `fp8` half the bytes.
    load_format: `safetensors`, or `dummy`: random weights for the architecture that config.json describes.
    quantization: a scheme in which weights are held, quantised while they are loaded; None or "none": as stored.
    seed: of requests that bring none.
    experts: backend of the expert product, or `auto`; `decode=A,prefill=B` for each phase its own.
    attention: backend of attention over the KV cache, or `auto`.
    router_dtype: that the routers compute in; `auto` is what the planner prefers, float32.
    graphs: on a GPU, decode in CUDA graphs where every kernel can stand in one.
    revision: of a hub model.  progress: show progress bars.
    """

    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    kv_memory: int | None = None
    gpu_memory_utilization: float | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    prefix_cache: bool = True
    deterministic: bool = False
    kv: str = "bf16"
    load_format: str = "safetensors"
    quantization: str | None = None
    seed: int = 0
    experts: str = "auto"
    attention: str = "auto"
    router_dtype: str = "auto"
    graphs: bool = True
    revision: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("device", self.device, DEVICES)
        one_of("router_dtype", self.router_dtype, DTYPES)
        one_of("kv", self.kv, KV_FORMATS)
        one_of("load_format", self.load_format, LOAD_FORMATS)
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            positive(name, getattr(self, name))
        for name in ("max_model_len", "kv_memory"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        for name in ("prefix_cache", "deterministic", "graphs", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError("must be True or False", where=flag(name), remedy="Correct the value.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(f"must be an integer, not {self.seed!r:.40}", where="--seed", remedy="Correct the value.")
        part = self.gpu_memory_utilization
        if part is not None and not (isinstance(part, (int, float)) and 0 < part <= 1):
            raise OptionError("must be in (0, 1]", where=flag("gpu_memory_utilization"), remedy="0.9 is usual.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EngineConfig:
        """From keyword options. Raises OptionError for one that does not exist, with the nearest that does."""
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise OptionError("unknown option", where=name, remedy=f"Known: {', '.join(sorted(known))}.")
        return cls(**options)


OWN_VARIABLES = ("MOESAIC_CACHE",)
"""Variables that begin like an option's and are none."""


def environment_options() -> dict[str, str]:
    """The options that the environment sets: `MOESAIC_MAX_NUM_SEQS=8` is {"max_num_seqs": "8"}, as text."""
    names = [name for name in os.environ if name.startswith("MOESAIC_") and name not in OWN_VARIABLES]
    return {name.removeprefix("MOESAIC_").lower(): os.environ[name] for name in sorted(names)}


def engine_environment() -> dict[str, str]:
    """For a process that serves for weeks. oneDNN keeps 1,024 compiled products by shape, torch's layer over it as many
    more, and prompts are of every length: half a gigabyte that comes slowly and looks like a leak. Whoever sets the
    variables knows better.
    """
    return {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32", **os.environ}


def helper_environment() -> dict[str, str]:
    """For a process beside the engine, which leaves it the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def cache_folder() -> Path:
    """Where things that can be made again are kept: MOESAIC_CACHE, else `moesaic` in the user's cache folder."""
    if own := os.environ.get("MOESAIC_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path(os.path.expanduser("~")) / ".cache") / "moesaic"


def flag(name: str) -> str:
    """The command-line spelling of an option."""
    return "--" + name.replace("_", "-")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{value!r} is not one of {', '.join(allowed)}", where=flag(name), remedy="Choose one.")


def positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"must be a positive integer, not {value!r}", where=flag(name), remedy="Correct the value.")


def parse_bytes(text: str) -> int:
    """`4GiB`, `512M`, `1e9`, `123456` -> bytes (binary units: K is 1,024). Raises OptionError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) > 2**63:
        raise OptionError(f"{text!r} is not a size in bytes", remedy="Write for example 4GiB, 512M or 1000000.")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
