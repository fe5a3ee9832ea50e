"""What stands beside the weights of a quantised checkpoint: index, config, report, and all that is copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesaic.formats.checkpoint import SIDECAR
from moesaic.formats.safetensors_write import INDEX
from moesaic.models.checkpoint import CONFIG, Checkpoint, _inside
from moesaic.models.quantize_plan import COPIED, Plan
from moesaic.models.quantize_report import Row, totals
from moesaic.models.quantize_state import write_text

REPORT = "quantization_report.json"
_REWRITTEN = (CONFIG, INDEX, SIDECAR, REPORT)
_SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".py")
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_FOLDERS = ("additional_chat_templates",)


def write_side_files(source: Checkpoint, plan: Plan, rows: list[Row], directory: Path) -> None:
    """Everything but config.json. Writing it again gives the same bytes."""
    if len(plan.shards) > 1:
        weight_map = {entry.name: shard.name for shard in plan.shards for u in shard.units for entry in u.writes}
        index = {"metadata": {"total_size": plan.after}, "weight_map": weight_map}
        write_text(directory / INDEX, json.dumps(index, indent=1))
    for path in sorted(source.path.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            (directory / path.name).mkdir(exist_ok=True)
            for inner in sorted(path.glob("*.jinja")):
                copy(source, inner, directory / path.name / inner.name)
        elif is_kept(path):
            copy(source, path, directory / path.name)
    write_text(directory / REPORT, json.dumps(report(source, plan, rows), indent=1) + "\n")


def is_kept(path: Path) -> bool:
    """Tokenizer, chat template, generation_config, licence, card, and code that others may want; no weights."""
    named = path.suffix in _SUFFIXES or path.name.startswith(_NAMES)
    return path.is_file() and named and path.name not in _REWRITTEN and not path.name.startswith(".")


def copy(source: Checkpoint, path: Path, target: Path) -> None:
    """Raises CheckpointError for a link that leaves the source."""
    shutil.copyfile(_inside(source.path, str(path.relative_to(source.path))), target)


def config_of(source: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The source's config.json with the quantisation of the result in place of its own."""
    own = ("quantization_config", "compression_config")
    config = {name: value for name, value in source.config.items() if name not in own}
    return config if plan.quantization is None else {**config, "quantization_config": plan.quantization}


def report(source: Checkpoint, plan: Plan, rows: list[Row]) -> Mapping[str, Any]:
    count, nbytes = taken_over(plan)
    return {
        "source": source.path.resolve().name, "scheme": plan.scheme.name,
        "bytes": {"before": plan.before, "after": plan.after, "taken_over": nbytes}, "tensors_taken_over": count,
        "notes": plan.spec.notes, "totals": [asdict(each) for each in totals(rows)],
        "tensors": [row.as_json() for row in rows],
    }  # fmt: skip


def taken_over(plan: Plan) -> tuple[int, int]:
    """(tensors, bytes) of what was not converted."""
    copied = [unit.after for unit in plan.units if unit.kind == COPIED]
    return len(copied), sum(copied)
