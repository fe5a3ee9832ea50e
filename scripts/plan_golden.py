"""The plans of published checkpoints as text: `tests/plan_fixtures/golden/<name>.txt`, which a test compares.

    python -m scripts.plan_golden        write them anew, after a change of the planner, of contracts or of the tables
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from moesaic.commands._plan_view import show
from moesaic.commands.plan import Asked
from moesaic.contracts.plan import Wishes
from moesaic.contracts.spec import ModelSpec
from moesaic.formats.safetensors_file import DTYPES
from moesaic.hardware import GPUS
from moesaic.kernels.registry import catalogue
from moesaic.models.build import stored_spec
from moesaic.models.checkpoint import Checkpoint
from moesaic.moe.dispatch import contracts
from scripts.plan_fixtures import CPU, FOLDER, ITEMSIZE, Fixture, names, read

GOLDEN = FOLDER / "golden"


@dataclass(frozen=True)
class Run:
    gpu: str
    ranks: int = 1
    hypothetical: bool = False

    @property
    def options(self) -> str:
        parts = [f"--gpu {self.gpu}", f"--tp {self.ranks} --ep {self.ranks}" if self.ranks > 1 else "",
                 "--hypothetical" if self.hypothetical else ""]  # fmt: skip
        return " ".join(part for part in parts if part)


RUNS = (
    Run("cpu"), Run("cpu", hypothetical=True), Run("h100"), Run("h100", hypothetical=True), Run("h100", 8),
    Run("h100", 8, True), Run("h200", 8, True), Run("b200", 8, True),
)  # fmt: skip


def spec_of(fixture: Fixture) -> ModelSpec:
    """As the loader would have it of the written directory; that needs only the config and each tensor's dtype."""
    of = {dtype: SimpleNamespace(info=SimpleNamespace(dtype=DTYPES[dtype])) for dtype in ITEMSIZE}
    stored = {name: of[dtype] for name, (dtype, _) in fixture.tensors.items()}
    config: Mapping[str, Any] = fixture.config
    if fixture.sidecar is not None:
        config = {**config, "quantization_config": {"quant_method": "modelopt", **fixture.sidecar}}
    checkpoint = SimpleNamespace(config=config, files=fixture.tensors, tensors=lambda: stored)
    return stored_spec(cast(Checkpoint, checkpoint))[0]


def golden(name: str) -> str:
    """Every run of a fixture. One that says what the run before it said is not repeated."""
    spec, known = spec_of(read(name)), (*catalogue(), *contracts())
    written, before = [], ""
    for run in RUNS:
        hardware = CPU if run.gpu == "cpu" else GPUS[run.gpu]
        report = Asked(name, spec, hardware, known, "bfloat16", 4096).report(
            Wishes(tp=run.ranks, ep=run.ranks, hypothetical=run.hypothetical)
        )
        with contextlib.redirect_stdout(io.StringIO()) as out:
            show(report)
        text = out.getvalue()
        written.append(f"$ moesaic plan {name} {run.options}\n" + ("the same\n" if text == before else text))
        before = text
    return "\n".join(written)


def main() -> int:
    GOLDEN.mkdir(exist_ok=True)
    for name in names():
        (GOLDEN / f"{name}.txt").write_text(golden(name), encoding="utf-8")
        print(GOLDEN / f"{name}.txt")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
