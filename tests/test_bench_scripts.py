"""`moesaic bench` before the scripts of benchmarks/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moesaic
from benchmarks import gpu, throughput
from benchmarks.models import MODELS
from moesaic.commands._scripts import SCRIPTS
from moesaic.contracts.scheme import SCHEMES
from moesaic.formats.dialects.modules import linears
from moesaic.models.build import spec_of
from moesaic.models.hold import hold
from tests.cli_support import call

ROOT = Path(__file__).resolve().parent.parent


def test_help_names_them_all() -> None:
    done = call("bench", "--help")
    assert done.code == 0
    assert all(name in done.out for name in ("serve", *SCRIPTS))
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in SCRIPTS)


def test_arguments_are_the_scripts_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("bench", "throughput", "--help").code == 0
    assert "--prompts" in capfd.readouterr().out
    assert call("bench", "experts", "--tokens", "many").code == 2
    assert "invalid int value: 'many'" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["nvfp4", "fp8_tensor_static", "fp8", "bf16"])
def test_throughput_of_static_scales(name: str) -> None:
    """They are a checkpoint's: its configuration says so, of all projections; other schemes are made at load."""
    for model in MODELS:
        plain = spec_of(MODELS[model])
        wanted = hold(plain, SCHEMES[name]) if SCHEMES[name].activation.static else plain
        found = spec_of(throughput.described(model, SCHEMES[name]))
        assert [part.scheme for part, _ in linears(found)] == [part.runs for part, _ in linears(wanted)], model


def test_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moesaic, "__file__", str(tmp_path / "lib" / "site" / "moesaic" / "__init__.py"))
    done = call("bench", "route")
    assert done.code == 4, done
    assert "Clone the repository" in done.err


def test_something_must_be_named() -> None:
    assert call("bench").code == 2
    assert call("bench", "nothing").code == 2


@pytest.mark.parametrize(("name", "read"), [
    ("NVIDIA H100 80GB HBM3", 3.07e12), ("NVIDIA H200", 4.38e12), ("NVIDIA GH200 480GB", 1.0), ("NVIDIA B200", 1.0),
])  # fmt: skip
def test_floors_are_counted_with_what_the_card_reaches(monkeypatch: pytest.MonkeyPatch, name: str, read: float) -> None:
    """Whose limits are not known is measured."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(gpu, "ceilings", lambda: {"read": 1.0, "bf16": 2.0, "fp8": 3.0})
    gpu.limits.cache_clear()
    assert gpu.limits().read == read
    gpu.limits.cache_clear()
