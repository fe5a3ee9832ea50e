"""INT4 codes as the Hopper kernels of `--deterministic` want them: which, by whom, and back. No GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moesaic.contracts.plan import ModelPlan, Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import SILU
from moesaic.formats.base import QuantTensor
from moesaic.formats.dummy import fill
from moesaic.hardware import GPUS
from moesaic.kernels import hopper, hopper_invariant
from moesaic.kernels._hopper.pack import NAME, pack, unpack, unzigzag, zigzag
from moesaic.kernels.ops import ExpertWeights
from moesaic.models.build import spec_of
from moesaic.models.hold import hold
from moesaic.planning.plan import plan
from scripts import plan_fixtures
from tests.planning_support import CATALOGUE

LIKE = torch.empty(0, dtype=torch.bfloat16)
RECODED = ("w4afp8", "w4afp8_static", "w4afp8_token")


def weights_of(name: str) -> ExpertWeights:
    scheme, (experts, hidden, width) = SCHEMES[name], (3, 256, 128)
    w13 = fill(QuantTensor.empty(scheme.weight, (width, width), hidden, LIKE, (experts,)))
    w2 = fill(QuantTensor.empty(scheme.weight, (hidden,), width, LIKE, (experts,)))
    return ExpertWeights(w13, w2, SILU, scheme.activation)


def raw(w: ExpertWeights) -> list[Tensor]:
    return [part.view(torch.uint8).clone() for each in (w.w13, w.w2) for part in each.parts.values()]


def test_every_byte_becomes_two_zigzag_codes_and_comes_back() -> None:
    """Against the definition: 0, -1, 1, -2, 2 .. are 0, 1, 2, 3, 4 .. ."""
    order = sorted(range(-8, 8), key=lambda v: (abs(v + 0.5), -v))  # 0, -1, 1, -2 ..
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = [order.index((byte & 15) - 8) | order.index((byte >> 4) - 8) << 4 for byte in range(256)]
    assert zigzag(codes).tolist() == wanted
    assert torch.equal(unzigzag(zigzag(codes)), codes)


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_recoded_within_their_storage_and_back(name: str) -> None:
    """Of INT4 beside E4M3 rows; all else stays as it is."""
    w = weights_of(name)
    before, values = raw(w), (w.w13.dequantize(), w.w2.dequantize())
    there = pack(w)
    assert there.packing == (NAME if name in RECODED else "plain")
    assert any(not torch.equal(a, b) for a, b in zip(before, raw(w), strict=True)) == (name in RECODED)
    once = raw(w)
    assert all(torch.equal(a, b) for a, b in zip(once, raw(pack(there, there)), strict=True)), "packed twice"
    back = unpack(there)
    assert back.packing == "plain"
    assert all(torch.equal(a, b) for a, b in zip(before, raw(back), strict=True))
    for value, weight in zip(values, (back.w13, back.w2), strict=True):
        assert torch.equal(value, weight.dequantize())


@pytest.mark.parametrize(("kernels", "packing"), [(hopper, NAME), (hopper_invariant, "plain")])
def test_codes_of_the_other_kind_are_not_multiplied(kernels: ModuleType, packing: str) -> None:
    w = replace(weights_of("w4afp8"), packing=packing)
    rows = hopper.encode_later(torch.zeros(2, 256, dtype=torch.bfloat16), SCHEMES["w4afp8"].activation)
    with pytest.raises(ValueError, match=f"packed as '{packing}'"):
        kernels.experts(rows, w, torch.zeros(2, 1).int(), torch.ones(2, 1))


@pytest.mark.parametrize(
    ("name", "deterministic"), [("w4afp8_static", True), ("w4afp8_token", True), ("w4afp8", False), ("fp8", True)]
)
def test_plans_say_how_experts_are_packed(name: str, deterministic: bool) -> None:
    """All cells of a layer in one way."""
    wishes = Wishes(deterministic=deterministic, experts="hopper_invariant" if deterministic else "hopper")
    spec = hold(spec_of(plan_fixtures.read("qwen3-30b-a3b").config), SCHEMES[name])
    made = plan(spec, GPUS["h100"], CATALOGUE, wishes, "bfloat16")
    assert isinstance(made, ModelPlan)
    cells = [cell for layer in made.layers for cell in layer.cells]
    packings = {cell.packed.packing for cell in cells}
    for cell in cells:
        assert cell.path.stage("experts").kernel not in [each.candidate for each in cell.rejected]
    assert packings == {NAME if name in RECODED and deterministic else "plain"}
