"""Decoding on a CPU with every choice of kernels: tapes are made where they hold the whole step, and nobody notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.assets import embedded_model
from moesaic.config import EngineConfig
from moesaic.engine.engine import Engine
from moesaic.engine.launch import launch
from moesaic.engine.params import SamplingParams
from moesaic.engine.tapes import DecodeTapes
from moesaic.kernels.registry import Kernels, catalogue
from moesaic.models.checkpoint import Checkpoint
from tests.checkpoints import random_model, save
from tests.native_support import HAS_COMPILER, needs_compiler

NOISE = 1e-4
"""In log-probs, of FP32 sums in different orders."""
Answers = dict[str, list[tuple[int, float]]]
"""(token, log-prob) of each request."""


def backends_of(op: str) -> list[str]:
    """Those that compute it on a CPU in FP32 with weights as they are."""
    fitting = (c for c in catalogue() if c.op == op and "cpu" in c.devices and "float32" in c.dtypes)
    names = {c.backend for c in fitting if "bf16" in c.formats}
    return sorted(names if HAS_COMPILER else names - {"cpu_native"})


CHOICES: list[dict[str, str]] = [
    {},
    *({"attention": each} for each in backends_of("attend_paged")),
    *({"experts": each} for each in backends_of("experts")),
    {"attention": "reference", "experts": "cpu"},
    {"kv": "fp8"},
]


@pytest.fixture(scope="module", params=["tiny", "heads"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tiny":
        return embedded_model()
    return save(random_model("qwen3_moe"), tmp_path_factory.mktemp("heads"))


def engine_of(folder: Path, **options: Any) -> Engine:
    usual = {"dtype": "float32", "device": "cpu", "max_model_len": 64, "prefix_cache": False, "progress": False}
    with Checkpoint.open(folder) as checkpoint:
        return launch(checkpoint, EngineConfig(**(usual | options)), None).engine


def answers(engine: Engine) -> Answers:
    """Greedy tokens and their log-probs, of a batch that shrinks from three rows to one."""
    found: Answers = {}
    for n in range(3):
        params = SamplingParams(temperature=0, max_tokens=5 + 4 * n, ignore_eos=True, logprobs=0)
        engine.add(str(n), [5 + (7 * at + n) % 50 for at in range(9 + 2 * n)], params)
        found[str(n)] = []
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += [(entry.token, entry.logprob) for entry in delta.logprobs]
    return found


def assert_same(some: Answers, others: Answers) -> None:
    for name, mine in some.items():
        (tokens, logprobs), (expected, exact) = (zip(*each, strict=True) for each in (mine, others[name]))
        assert tokens == expected
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(exact), rtol=0, atol=NOISE)


def assert_steady(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """The first answers are those of the second time, and those of steps that run as usual; returns them."""
    first = answers(engine)
    assert_same(first, answers(engine))
    monkeypatch.setattr(engine.runner, "graphs", None)
    assert_same(first, answers(engine))
    return first


@pytest.fixture(scope="module")
def plain(folder: Path) -> Answers:
    """By the twins in plain torch."""
    engine = engine_of(folder, attention="reference", experts="reference")
    engine.runner.graphs = None
    return answers(engine)


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_first_answers_are_right(
    folder: Path, plain: Answers, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(folder, **options)
    graphs = engine.runner.graphs
    first = assert_steady(engine, monkeypatch)
    if "kv" not in options:
        assert_same(first, plain)
    native = HAS_COMPILER and all(name == "cpu_native" for name in options.values())
    assert isinstance(graphs, DecodeTapes) == native
    if isinstance(graphs, DecodeTapes) and folder == embedded_model():
        assert sum(frame.tape.count > 0 for frame in graphs.frames.values()) == 3, "a tape for each number of rows"


@needs_compiler
@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_a_step_that_cannot_be_recorded_runs_as_usual(
    folder: Path, plain: Answers, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where backends promise too much."""
    monkeypatch.setattr(Kernels, "taped", True)
    engine = engine_of(folder, attention=attention)
    graphs = engine.runner.graphs
    assert isinstance(graphs, DecodeTapes)
    assert_same(assert_steady(engine, monkeypatch), plain)
    assert graphs.most == 0
    assert not graphs.frames
