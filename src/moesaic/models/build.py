"""From a checkpoint to a model ready to run: describe, choose kernels, allocate, load."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from moesaic.contracts.contract import Need
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.formats.checkpoint import read_quantization
from moesaic.hardware import Hardware
from moesaic.kernels.registry import Kernels
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder
from moesaic.models.loading import LoadReport, load, match
from moesaic.models.weights import settle, slots_of


@dataclass(frozen=True)
class Built:
    """A loaded model, the reasons for its kernels, and what loading it took."""

    model: Decoder
    kernels: Kernels
    report: LoadReport
    dtype: torch.dtype


def architectures() -> list[str]:
    """The model types that can be run: the files of this folder that define `describe`, or import it from another."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    describes = re.compile(r"^(def describe\(config|from moesaic\.models\.\w+ import describe$)", re.MULTILINE)
    return [f.stem for f in files if describes.search(f.read_text(encoding="utf-8"))]


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json, with the scheme in which each projection is stored.

    Raises UnsupportedError for a model type or a quantisation that is not known, CheckpointError for a malformed one.
    """
    kind = config.get("model_type")
    known = architectures()
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedError(
            f"model_type {kind!r} is not implemented", where="config.json", remedy=f"Known: {', '.join(known)}."
        )
    spec: ModelSpec = import_module(f"moesaic.models.{kind}").describe(config)
    dialect = read_quantization(config)
    if dialect is None:
        return spec
    spec, notes = dialect.apply(spec)
    return replace(spec, notes=notes)


def choose_dtype(wish: str, spec: ModelSpec, hardware: Hardware) -> str:
    """`auto`: BF16 where the hardware multiplies it natively (FP16 checkpoints too), else FP32, which holds both."""
    if wish != "auto":
        return wish
    half = spec.checkpoint_dtype in ("bfloat16", "float16") and hardware.native_bf16
    return "bfloat16" if half else "float32"


def build(checkpoint: Checkpoint, spec: ModelSpec, need: Need, length: int, *,
          wishes: Mapping[str, str] | None = None, progress: bool = False) -> Built:  # fmt: skip
    """Allocates, loads and returns the model of a checkpoint. length: positions that it will be asked for."""
    spec, dialect = without_absent_drafts(spec, checkpoint), read_quantization(checkpoint.config)
    kernels = Kernels(need, wishes)
    dtype: torch.dtype = getattr(torch, need.dtype)
    like = torch.empty(0, dtype=dtype, device=need.device)
    ignored = [*spec.ignore, *([re.escape(f"{spec.head}.weight")] if spec.tied else [])]
    pattern = re.compile("|".join(f"(?:{each})" for each in ignored) or r"(?!)")

    def ignore(name: str) -> bool:
        return pattern.fullmatch(name) is not None

    # First without memory: a config that does not fit its own checkpoint must not make us allocate what it dreams of.
    match(checkpoint, slots_of(Decoder(spec, kernels, like.to("meta"), 1).sources(), dialect), ignore)
    model = Decoder(spec, kernels, like, length, one_path=need.batch_invariant)
    report = load(checkpoint, slots_of(model.sources(), dialect), ignore=ignore, progress=progress)
    settle(model.sources())
    check_tied_head(checkpoint, model)
    return Built(model, kernels, report, dtype)


def without_absent_drafts(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """Checkpoints that were saved again often announce draft layers and hold none. One in part is an error later."""
    stored = checkpoint.tensors()
    held = tuple(d for d in spec.drafts if any(f"{name}.weight" in stored for name in (d.join.name, d.embed_norm)))
    return replace(spec, drafts=held)


def check_tied_head(checkpoint: Checkpoint, model: Decoder) -> None:
    """A tied checkpoint may store its head all the same. It must then equal the embedding, or something is wrong."""
    name = f"{model.spec.head}.weight"
    if not model.spec.tied or name not in checkpoint.tensors():
        return
    embedding = model.embed.weight_VD
    if not torch.equal(checkpoint.read(name).to(embedding), embedding):
        raise CheckpointError(
            "tie_word_embeddings is true, but the stored head differs from the embedding",
            where=name, remedy="Set tie_word_embeddings to false in config.json to use the stored head.",
        )  # fmt: skip
