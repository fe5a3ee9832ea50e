"""A checkpoint in, a checkpoint in another scheme out: plan, calibrated scales, shards one by one, and a last look.

Peak memory is that of the largest projection, in a few copies; nothing grows with the model. A run that was killed is
taken up where its last whole shard ended, and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesaic.contracts.scheme import UNQUANTIZED, Scheme
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import CapacityError, CheckpointError, MoesaicError, OptionError
from moesaic.formats import nv
from moesaic.formats.checkpoint import Dialect
from moesaic.formats.dialects.modules import change_linears
from moesaic.hardware import local_cpu
from moesaic.kernels.registry import Kernels
from moesaic.models.build import plan_here, stored_spec
from moesaic.models.checkpoint import CONFIG, Checkpoint
from moesaic.models.decoder import Decoder
from moesaic.models.hold import hold
from moesaic.models.loading import match
from moesaic.models.quantize_files import config_of, write_side_files
from moesaic.models.quantize_plan import Plan, fingerprint, make_plan
from moesaic.models.quantize_report import Row
from moesaic.models.quantize_state import Workspace, write_text
from moesaic.models.quantize_write import Writer
from moesaic.models.weights import slots_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PEAK = {"fp8_tensor": 448.0, "nvfp4": nv.PEAK}
"""The largest magnitude of an encoding at scale 1: a static input scale is the calibrated amax over it."""

Calibrate = Callable[[], Mapping[str, float]]
"""Largest magnitude of each projection's input, by module name, from running the source model."""


@dataclass(frozen=True)
class Recipe:
    """keep, experts_only: see `hold`.  shard_bytes: most bytes of one file.  calibration: digest of the prompts."""

    scheme: Scheme
    keep: tuple[str, ...] = ()
    experts_only: bool = False
    shard_bytes: int = 4 << 30
    calibration: str | None = None

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise OptionError("must be at least one byte", where="--shard-size", remedy="4GiB is usual.")
        if self.scheme.activation.static and self.calibration is None:
            raise OptionError(
                f"{self.scheme.name} has calibrated scales of activations", where="--scheme",
                remedy="Give prompts with --calibrate FILE, or take a scheme without them (see docs/quantize.md).",
            )  # fmt: skip
        if self.calibration is not None and not self.scheme.activation.static:
            raise OptionError(
                f"{self.scheme.name} has nothing to calibrate", where="--calibrate", remedy="Leave it out."
            )

    def options(self, source: Checkpoint) -> dict[str, Any]:
        """What decides about the bytes of the result, for `Workspace`."""
        return {**asdict(self), "scheme": self.scheme.name, "keep": list(self.keep), "source": fingerprint(source)}


def quantize(source: Checkpoint, plan: Plan, work: Workspace, calibrate: Calibrate,
             advance: Callable[[int], None]) -> list[Row]:  # fmt: skip
    """Writes what is not there yet, and returns the reports of all converted weights.

    advance: told the bytes of the source that are done with. Raises CapacityError where the disk is full,
    CheckpointError for a source, or a disk, that is not sound.
    """
    with typed(work.directory):
        if plan.scheme.activation.static and not work.scales:
            work.scales = input_scales(plan, calibrate())
            work.save()
        check_space(plan, work)
        writer = Writer(source, plan, work.scales, advance)
        for shard in plan.shards:
            if work.finished(shard):
                advance(sum(unit.before for unit in shard.units))
            else:
                work.finish(shard, writer.write(shard, work.directory))
        rows = [row for shard in plan.shards for row in work.done[shard.name]]
        write_side_files(source, plan, rows, work.directory)
        write_text(work.directory / CONFIG, json.dumps(config_of(source, plan), indent=2) + "\n")
        check_result(work.directory)
        work.close()
    return rows


def check_space(plan: Plan, work: Workspace) -> None:
    """Raises CapacityError where the disk has no room for what is still to be written."""
    wanted = sum(shard.nbytes for shard in plan.shards if not work.finished(shard))
    free = shutil.disk_usage(work.directory).free
    if free < wanted:
        raise CapacityError(
            f"{wanted / 2**20:.1f} MiB are still to be written, and the disk has {free / 2**20:.1f} MiB left",
            where=str(work.directory), remedy="Make room and run the same command again, or choose another disk.",
        )  # fmt: skip


@contextmanager
def typed(directory: Path) -> Iterator[None]:
    """Turns what the disk says into errors for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CapacityError(
                f"the disk is full ({error.strerror})", where=str(directory),
                remedy="Make room and run the same command again: finished files are kept.",
            ) from None  # fmt: skip
        raise OptionError(f"cannot be written ({error})", where=str(directory), remedy="Check the place.") from None


def input_scales(plan: Plan, amax: Mapping[str, float]) -> dict[str, float]:
    """Of every projection with a static scale. An expert that no prompt reached gets the largest scale of its layer's.

    Raises OptionError where nothing reached a projection.
    """
    largest: dict[str, float] = {}
    wanted = [unit for unit in plan.units if unit.calibrated]
    for unit in wanted:
        largest[unit.group] = max(largest.get(unit.group, 0.0), amax.get(unit.name, 0.0))
    scales = {}
    for unit in wanted:
        value = amax.get(unit.name, 0.0) or largest[unit.group]
        if not value > 0:
            raise OptionError(
                f"nothing but zeros reached {unit.name} while calibrating", where="--calibrate",
                remedy="Give more, or longer, prompts.",
            )  # fmt: skip
        scales[unit.name] = value / _PEAK[unit.written.scheme.activation.name]
    return scales


def prepare(source: Checkpoint, recipe: Recipe) -> Plan:
    """What will be written. Raises the typed errors of a loader, from headers alone, and those of `hold`."""
    spec, dialect = stored_spec(source)
    check_fit(source, spec, dialect)
    held = hold(spec, recipe.scheme, recipe.keep, recipe.experts_only)
    return make_plan(source, held, dialect, recipe.scheme, recipe.shard_bytes)


def check_result(directory: Path) -> None:
    """Opens what was written as a loader does, up to the data. Raises CheckpointError, and takes config.json away."""
    try:
        with Checkpoint.open(directory) as result:
            check_fit(result, *stored_spec(result))
    except MoesaicError as error:
        (directory / CONFIG).unlink()
        raise CheckpointError(
            f"what was written cannot be loaded: {error.one_line()}", where=str(directory),
            remedy="This is a defect of `moesaic quantize`: please report it.",
        ) from error  # fmt: skip


def check_fit(checkpoint: Checkpoint, spec: ModelSpec, dialect: Dialect | None) -> None:
    """Holds the checkpoint's headers against the model, as loading does before it takes memory."""
    plain = change_linears(spec, lambda part, _: replace(part, held=UNQUANTIZED))
    kernels = Kernels(plan_here(plain, local_cpu(), "float32"))
    model = Decoder(plain, kernels, torch.empty(0, device="meta"), 1)
    ignored = [*spec.ignore, *(dialect.ignore if dialect else ()), *([re.escape(f"{spec.head}.weight")] * spec.tied)]
    pattern = re.compile("|".join(f"(?:{each})" for each in ignored) or r"(?!)")
    match(checkpoint, slots_of(model.sources(), dialect), lambda name: pattern.fullmatch(name) is not None)
