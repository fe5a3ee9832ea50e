"""Published checkpoints by their headers: our name maps fit every tensor; the plans are those that were reviewed."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moesaic.contracts.plan import ModelPlan
from moesaic.errors import CheckpointError
from moesaic.formats.dialects.modules import linears
from moesaic.kernels.registry import Kernels
from moesaic.models.build import stored_spec
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder
from moesaic.models.loading import match
from moesaic.models.metadata import read_metadata
from moesaic.models.weights import slots_of
from moesaic.planning.plan import plan
from scripts import plan_fixtures, plan_golden
from tests.planning_support import CATALOGUE

NAMES = plan_fixtures.names()


def test_every_family_and_format_is_there() -> None:
    sources = {name: plan_fixtures.read(name).source for name in NAMES}
    assert {source.split(",")[0] for source in sources.values()} == {
        "deepseek-ai/DeepSeek-V3", "nvidia/DeepSeek-R1-FP4", "Barrrrry/DeepSeek-R1-W4AFP8",
        "deepseek-ai/DeepSeek-V2-Lite", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-235B-A22B-FP8",
        "moonshotai/Kimi-K2-Thinking",
        "zai-org/GLM-4.5-Air", "mistralai/Mixtral-8x7B-Instruct-v0.1", "openai/gpt-oss-120b",
    }  # fmt: skip
    assert {"deepseek-v3-fp8", "deepseek-v3-mxfp8"} <= set(sources)


@pytest.mark.parametrize("name", [name for name in NAMES if plan_fixtures.read(name).parameters])
def test_the_parameters_are_as_many_as_the_repository_counts(name: str) -> None:
    fixture = plan_fixtures.read(name)
    assert sum(math.prod(shape) for _, shape in fixture.tensors.values()) == fixture.parameters


def test_what_the_page_of_a_quantised_release_counts() -> None:
    """DeepSeek-V3: 671,026,419,200 parameters without draft and scales; Kimi K2: 1.026 T; R1-FP4: 397 B elements."""

    def count(name: str, skip: str = "$^", packed: tuple[str, ...] = ()) -> int:
        kept = {n: t for n, t in plan_fixtures.read(name).tensors.items() if not re.search(skip, n)}
        return sum(math.prod(shape) * (8 if dtype in packed else 1) for dtype, shape in kept.values())

    assert count("deepseek-v3-fp8", r"layers\.61\.|scale_inv") == 671_026_419_200
    assert count("kimi-k2-int4", "weight_scale|weight_shape", ("I32",)) == 1_026_408_232_448
    assert round(count("deepseek-r1-nvfp4") / 1e9) == 397
    assert plan_fixtures.read("gpt-oss-120b").nbytes / 2**30 == pytest.approx(60.8, abs=0.05)
    assert plan_fixtures.read("kimi-k2-int4").nbytes / 1e9 == pytest.approx(594, abs=0.5)


def test_a_written_fixture_is_a_safetensors_checkpoint_and_takes_no_space(tmp_path: Path) -> None:
    """Held against the safetensors library: it reads the same names, shapes and dtypes."""
    fixture = plan_fixtures.shortened(plan_fixtures.read("deepseek-v2-lite"), 3)
    plan_fixtures.write(fixture, tmp_path)
    found = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {n: (s.get_dtype(), tuple(s.get_shape())) for n in file.keys() for s in [file.get_slice(n)]}  # noqa: SIM118
    assert found == fixture.tensors
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > fixture.nbytes > 10**9
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 10**6
    assert read_metadata(str(tmp_path)).nbytes == fixture.nbytes


def matched(directory: Path) -> Counter[str]:
    """How many tensors fill the model and are left out on purpose. Raises CheckpointError for any other, or a lack."""
    with Checkpoint.open(directory) as checkpoint:
        spec, dialect = stored_spec(checkpoint)
        made = plan(spec, plan_fixtures.CPU, CATALOGUE, plan_golden.Wishes())
        assert isinstance(made, ModelPlan), made
        model = Decoder(spec, Kernels(made), torch.empty(0, dtype=torch.bfloat16, device="meta"), 1)
        ignored = re.compile("|".join(f"(?:{each})" for each in (*spec.ignore, *(dialect.ignore if dialect else ()))))
        jobs = match(checkpoint, slots_of(model.sources(), dialect), lambda name: bool(ignored.fullmatch(name)))
        used = {stored.info.name for stored, _ in jobs}
        return Counter(filled=len(used), left_out=len(checkpoint.tensors()) - len(used))


LAYERS = {"deepseek-v3-fp8": 4, "deepseek-v3-mxfp8": 4, "deepseek-r1-nvfp4": 4, "deepseek-r1-w4afp8": 4,
          "kimi-k2-int4": 2}  # fmt: skip
"""The rest are matched with five layers."""


@pytest.mark.parametrize("name", NAMES)
def test_the_model_takes_every_tensor_and_lacks_none(name: str, tmp_path: Path) -> None:
    fixture = plan_fixtures.shortened(plan_fixtures.read(name), LAYERS.get(name, 5))
    plan_fixtures.write(fixture, tmp_path)
    drafts = 2 if any("shared_head.head" in tensor for tensor in fixture.tensors) else 0
    assert matched(tmp_path) == Counter(filled=len(fixture.tensors) - drafts, left_out=drafts)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_the_same_of_the_whole_checkpoint(name: str, tmp_path: Path) -> None:
    fixture = plan_fixtures.read(name)
    plan_fixtures.write(fixture, tmp_path)
    drafts = 2 if any("shared_head.head" in tensor for tensor in fixture.tensors) else 0
    assert matched(tmp_path) == Counter(filled=len(fixture.tensors) - drafts, left_out=drafts)


@pytest.mark.parametrize("change", ["lacks", "more", "shape", "dtype"])
def test_a_tensor_that_differs_is_found(change: str, tmp_path: Path) -> None:
    """The matching above is able to fail."""
    fixture = plan_fixtures.shortened(plan_fixtures.read("mixtral-8x7b"), 1)
    tensors, name = dict(fixture.tensors), "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    dtype, shape = tensors.pop(name)
    if change == "more":
        tensors |= {name: (dtype, shape), "model.layers.0.block_sparse_moe.experts.8.w3.weight": (dtype, shape)}
    elif change != "lacks":
        tensors[name] = (dtype, shape[::-1]) if change == "shape" else ("F8_E4M3", shape)
    plan_fixtures.write(plan_fixtures.replace(fixture, tensors=tensors), tmp_path)
    with pytest.raises(CheckpointError, match=r"experts\.[38]\.w3\.weight"):
        matched(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_by_headers_alone_is_the_one_by_files(name: str, tmp_path: Path) -> None:
    fixture = plan_fixtures.shortened(plan_fixtures.read(name), 4)
    plan_fixtures.write(fixture, tmp_path)
    assert plan_golden.spec_of(fixture) == read_metadata(str(tmp_path)).spec
    assert linears(plan_golden.spec_of(fixture))


@pytest.mark.parametrize("name", NAMES)
def test_the_plans_are_those_that_were_reviewed(name: str) -> None:
    """`python -m scripts.plan_golden` writes them anew: read the difference before you commit it."""
    text = plan_golden.golden(name)
    assert max(map(len, text.splitlines())) <= 100
    assert text == (plan_golden.GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_there_is_no_plan_of_what_is_not_there() -> None:
    assert sorted(path.stem for path in plan_golden.GOLDEN.iterdir()) == NAMES
