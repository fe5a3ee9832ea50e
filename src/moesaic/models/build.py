"""From a checkpoint to a model ready to run: describe, choose kernels, allocate, load."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moesaic.assets import tuning_tables
from moesaic.config import cache_folder
from moesaic.contracts.contract import Contract
from moesaic.contracts.plan import ModelPlan, Refusal, Wishes
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import CheckpointError, OptionError, UnsupportedError
from moesaic.formats.checkpoint import Dialect, read_quantization
from moesaic.hardware import Hardware
from moesaic.kernels.registry import Kernels, local_catalogue
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder
from moesaic.models.dummy import fill_model
from moesaic.models.loading import LoadReport, load, match
from moesaic.models.weights import settle, slots_of
from moesaic.moe.dispatch import contracts as dispatch_contracts
from moesaic.planning.plan import plan
from moesaic.planning.tuning import Tuning

FREE = Wishes()


@dataclass(frozen=True)
class Built:
    """A loaded model, the plan that it was built from, and what loading it took."""

    model: Decoder
    plan: ModelPlan
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
    return with_schemes(described(config), config)


def described(config: Mapping[str, Any]) -> ModelSpec:
    """The spec by the architecture alone."""
    kind = config.get("model_type")
    known = architectures()
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedError(
            f"model_type {kind!r} is not implemented", where="config.json", remedy=f"Known: {', '.join(known)}."
        )
    spec: ModelSpec = import_module(f"moesaic.models.{kind}").describe(config)
    return spec


def with_schemes(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
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


def plan_here(spec: ModelSpec, hardware: Hardware, dtype: str, wishes: Wishes = FREE,
              catalogue: Sequence[Contract] | None = None) -> ModelPlan:  # fmt: skip
    """The plan of a model on this machine's own hardware, with kernels that were tried on it (or a given catalogue).

    Raises OptionError where the user's wishes stand in the way, else UnsupportedError.
    """
    known = local_catalogue() if catalogue is None else tuple(catalogue)
    made = plan(spec, hardware, (*known, *dispatch_contracts()), wishes, dtype, tuning_here(hardware, known))
    if isinstance(made, ModelPlan):
        return made
    raise refused(made, wishes)


def tuning_here(hardware: Hardware, known: Sequence[Contract]) -> Tuning:
    """What was measured on hardware like this with packages like those that are installed."""
    installed = {}
    for package in {contract.package for contract in known if contract.package}:
        with suppress(PackageNotFoundError):  # its contracts say so themselves
            installed[package] = version(package)
    return Tuning.of(tuning_tables(cache_folder() / "tuning"), hardware.name, installed)


def refused(refusal: Refusal, wishes: Wishes) -> OptionError | UnsupportedError:
    """A refusal as the error that a user sees: the nearest plan that works, or why each candidate does not."""
    reasons = "; ".join(f"{each.candidate}: {each.reason}" for each in refusal.reasons)
    remedy = f"Works here: {refusal.nearest}." if refusal.nearest else ""
    kind = OptionError if refusal.nearest or wishes != FREE else UnsupportedError
    return kind(f"{refusal.what} ({reasons})" if reasons else refusal.what, where=refusal.where, remedy=remedy or None)


def build(checkpoint: Checkpoint, spec: ModelSpec, plan: ModelPlan, length: int, *,
          kernels: Kernels | None = None, progress: bool = False) -> Built:  # fmt: skip
    """Allocates, loads and returns the model of a checkpoint. length: positions that it will be asked for.

    kernels: those of the plan, where they are wrapped to look at what they compute.
    """
    spec, (_, dialect) = without_absent_drafts(spec, checkpoint), stored_spec(checkpoint)
    kernels, need = kernels or Kernels(plan), plan.base
    dtype: torch.dtype = getattr(torch, need.dtype)
    like = torch.empty(0, dtype=dtype, device=need.device)
    ignored = [*spec.ignore, *(dialect.ignore if dialect else ())]
    ignored += [re.escape(f"{spec.head}.weight")] if spec.tied else []
    pattern = re.compile("|".join(f"(?:{each})" for each in ignored) or r"(?!)")

    def ignore(name: str) -> bool:
        return pattern.fullmatch(name) is not None

    if not checkpoint.files:
        return dummy(Decoder(spec, kernels, like, length, one_path=need.batch_invariant), plan)

    # First without memory: a config that does not fit its own checkpoint must not make us allocate what it dreams of.
    match(checkpoint, slots_of(Decoder(spec, kernels, like.to("meta"), 1).sources(), dialect), ignore)
    model = Decoder(spec, kernels, like, length, one_path=need.batch_invariant)
    report = load(checkpoint, slots_of(model.sources(), dialect), ignore=ignore, progress=progress)
    settle(model.sources())
    check_tied_head(checkpoint, model)
    return Built(model, plan, report, dtype)


def dummy(model: Decoder, plan: ModelPlan) -> Built:
    """A model of a checkpoint that was opened without weights: random ones, made where they are held."""
    began = time.perf_counter()
    nbytes, count = fill_model(model).nbytes(), sum(1 for _ in model.sources())
    return Built(model, plan, LoadReport(time.perf_counter() - began, nbytes, count), model.embed.weight_VD.dtype)


def stored_spec(checkpoint: Checkpoint) -> tuple[ModelSpec, Dialect | None]:
    """The spec of a checkpoint, by its config and its headers, and how it stores what is quantised."""
    dialect = read_quantization(checkpoint.config)
    spec = with_schemes(without_absent_drafts(described(checkpoint.config), checkpoint), checkpoint.config)
    if dialect is None or not checkpoint.files:
        return spec, None
    settled = dialect.settle(spec, {name: stored.info.dtype for name, stored in checkpoint.tensors().items()})
    return replace(settled.spec, notes=(*spec.notes, *settled.notes)), settled.dialect


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
