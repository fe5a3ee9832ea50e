"""Static activation scales: measured as transformers sees the same inputs, stored, read back, and used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.commands._prompts import from_arguments, from_file
from moesaic.commands.quantize import tokens_of
from moesaic.contracts.scheme import SCHEMES
from moesaic.engine.calibrate import calibrate
from moesaic.formats.encodings import Rows
from moesaic.hardware import local_cpu
from moesaic.kernels import registry
from moesaic.kernels.ops import ExpertWeights
from moesaic.layers.linear import Stored
from moesaic.models.build import build, plan_here, stored_spec
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder
from moesaic.models.hold import hold
from moesaic.models.weights import settle
from tests.quantize_support import TOKENS, model_of, outputs, quantize, quantized, tensors_of, write_source

STATIC = [name for name, scheme in SCHEMES.items() if scheme.activation.static]
PROMPTS = ["one two three, what is it?", "zz " * 30]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("calibrate")
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    found = {kind: write_source(path / kind, kind, torch.float32) for kind in ("qwen3_moe", "deepseek_v3")}
    return {**found, "prompts": path / "prompts.txt"}


def seen_by_transformers(path: Path, sequences: list[list[int]]) -> dict[str, float]:
    """The largest input of each projection of a qwen3_moe, by hooks on its modules.

    Its experts are one module: who gets which token is taken from its router, the rest is computed here in FP64.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    found: dict[str, float] = {}

    def note(name: str, x: Tensor) -> None:
        if x.numel():
            found[name] = max(found.get(name, 0.0), x.abs().max().item())

    def dense(name: str) -> Any:
        return lambda module, args: note(name, args[0])

    def experts(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x_TD, ids_TA = args[0].reshape(-1, args[0].shape[-1]), args[1]
            for e in range(module.num_experts):
                own = x_TD[(ids_TA == e).any(-1)]
                gate, up = (own.double() @ module.gate_up_proj[e].double().T).chunk(2, -1)
                note(f"{name}.{e}.gate_proj", own)
                note(f"{name}.{e}.up_proj", own)
                note(f"{name}.{e}.down_proj", torch.nn.functional.silu(gate) * up)

        return hook

    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            module.register_forward_pre_hook(dense(name))
        elif name.endswith("mlp.experts"):
            module.register_forward_pre_hook(experts(name))
    with torch.no_grad():
        for tokens in sequences:
            model(torch.tensor([tokens]))
    return found


def test_inputs_are_as_large_as_transformers_sees_them(sources: dict[str, Path]) -> None:
    """Of every projection and every expert, those that no token reached included. FP32: equal up to rounding."""
    sequences = [TOKENS[:3], TOKENS[3:20], [5]]
    told: list[int] = []
    with Checkpoint.open(sources["qwen3_moe"]) as source:
        ours = calibrate(source, sequences, told.append)
    theirs = seen_by_transformers(sources["qwen3_moe"], sequences)
    assert told == [3, 17, 1]
    assert {name for name in ours if "lm_head" not in name} == set(theirs)
    assert len([name for name in theirs if ".experts." in name]) > 3 * 2
    for name, amax in theirs.items():
        assert ours[name] == pytest.approx(amax, rel=1e-4), name


def test_experts_that_a_kernel_packs_are_seen_as_they_are(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend of another package may want their bytes in an order of its own: here from the last one to the first."""
    known, used = dict(registry.backends()), []

    def flipped(w: ExpertWeights, packing: str) -> ExpertWeights:
        for each in (w.w13, w.w2):
            each.parts["data"].copy_(each.parts["data"].flip(-1))
        return replace(w, packing=packing)

    def experts(x: Rows, w: ExpertWeights, ids: Tensor, weights: Tensor) -> Tensor:
        w.must_be("flipped")
        used.append(len(ids))
        y: Tensor = known["cpu"].experts(x, flipped(w, "plain"), ids, weights)
        flipped(w, "flipped")
        return y

    (mine,) = (each for each in known["cpu"].CONTRACTS if each.op == "experts")
    packing = ModuleType("flipping")
    packing.__dict__.update(
        CONTRACTS=(replace(mine, backend="flipping", packing="flipped", rank=1),), experts=experts,
        pack=lambda w, before: flipped(w, "flipped"), unpack=lambda w: flipped(w, "plain"),
    )  # fmt: skip
    with Checkpoint.open(sources["qwen3_moe"]) as source:
        plain = calibrate(source, [TOKENS], lambda _: None)
    monkeypatch.setattr(registry, "backends", lambda: known | {"flipping": packing})
    registry.local_catalogue.cache_clear()
    with Checkpoint.open(sources["qwen3_moe"]) as source:
        found = calibrate(source, [TOKENS], lambda _: None)
    monkeypatch.undo()
    registry.local_catalogue.cache_clear()
    assert len(used) == 2, "both layers"
    assert found.keys() == plain.keys()
    for name, amax in plain.items():
        assert found[name] == pytest.approx(amax, rel=1e-4), name


def test_experts_that_nothing_reached_are_missing_and_get_the_largest_of_their_layer(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": [5]}\n')
    with Checkpoint.open(sources["qwen3_moe"]) as source:
        amax = calibrate(source, [[5]], lambda _: None)
    reached = {name for name in amax if ".experts." in name}
    assert len(reached) == 2 * 2 * 3, "two layers, top 2, three projections"
    out = quantized(
        sources["qwen3_moe"], tmp_path / "q", "fp8_tensor_static", "--calibrate", str(tmp_path / "one.jsonl")
    )
    stored = tensors_of(out)
    for i in (0, 1):
        for part in ("gate", "up", "down"):
            names = [f"model.layers.{i}.mlp.experts.{e}.{part}_proj" for e in range(5)]
            largest = max(amax.get(name, 0.0) for name in names)
            for name in names:
                scale = stored[f"{name}.input_scale"].item()
                assert scale == pytest.approx(amax.get(name, largest) / 448, rel=1e-6)


@pytest.mark.parametrize("scheme", STATIC)
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_scales_go_into_the_file_and_from_there_into_the_model(
    kind: str, scheme: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Each stored scale is amax over 448, or over 2688 for NVFP4 and inverted; the loaded model computes as one in
    memory whose scales were put in by hand. Draft layers are calibrated too."""
    out = quantized(sources[kind], tmp_path / "q", scheme, "--calibrate", str(sources["prompts"]))
    amax, stored = measured(sources[kind]), tensors_of(out)
    ends = ("input_scale", "input_global_scale")
    names = {name: tensor.item() for name, tensor in stored.items() if name.endswith(ends)}
    assert names
    for name, value in names.items():
        module = name.rpartition(".")[0]
        if scheme == "w4afp8_static":
            module = module.replace(".w1", ".gate_proj").replace(".w3", ".up_proj").replace(".w2", ".down_proj")
        wanted = 2688 / amax[module] if scheme == "nvfp4" else amax[module] / 448
        assert value == pytest.approx(wanted, rel=1e-6), name
    assert any("model.layers.2." in name for name in names) == (kind == "deepseek_v3")
    model = model_of(out, dtype="float32")
    assert torch.equal(outputs(model), outputs(by_hand(sources[kind], scheme, names)))
    dynamic = outputs(model_of(sources[kind], dtype="float32", quantization=scheme))
    assert 0 < ((outputs(model) - dynamic).norm() / dynamic.norm()).item() < 0.2


def measured(path: Path) -> dict[str, float]:
    with Checkpoint.open(path) as source:
        return calibrate(source, tokens_of(source, from_arguments(PROMPTS), 2048), lambda _: None)


def by_hand(path: Path, scheme: str, scales: dict[str, float]) -> Decoder:
    """The source, quantised at load in the static scheme, with the scales of a file written into it."""
    with Checkpoint.open(path) as source:
        spec = hold(stored_spec(source)[0], SCHEMES[scheme])
        model = build(source, spec, plan_here(spec, local_cpu(), "float32"), 64).model
    for item in model.sources():
        if isinstance(item, Stored) and item.input_scale is not None:
            old = item.name.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2")
            keys = (f"{item.name}.input_scale", f"{old}.input_scale", f"{item.name}.input_global_scale")
            value = torch.tensor(next(scales[key] for key in keys if key in scales))
            item.input_scale.fill_(1 / value if scheme == "nvfp4" else value)
    settle(model.sources())
    return model


def test_prompts_of_every_kind(sources: dict[str, Path], tmp_path: Path) -> None:
    """Text as it is, ids, and conversations through the template; each cut off at the limit."""
    lines = [{"prompt": "ab"}, {"prompt": [1, 2, 3, 4]}, {"messages": [{"role": "user", "content": "ab"}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with Checkpoint.open(sources["qwen3_moe"]) as source:
        text, ids, chat = tokens_of(source, from_file(str(tmp_path / "p.jsonl")), 3)
    assert ids == [1, 2, 3]
    assert len(chat) == 3
    assert chat != text


def test_what_cannot_be_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    source, prompts, out = sources["qwen3_moe"], str(sources["prompts"]), tmp_path / "out"
    for scheme in STATIC:
        error = quantize(source, out, scheme).error
        assert "has calibrated scales of activations" in error
        assert "--calibrate FILE" in error
    assert "has nothing to calibrate" in quantize(source, out, "mxfp8", "--calibrate", prompts).error
    assert "cannot be read" in quantize(source, out, "nvfp4", "--calibrate", str(tmp_path / "none")).error
    assert "at least 1" in quantize(source, out, "nvfp4", "--calibrate", prompts, "--calibrate-tokens", "0").error
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n')
    assert "bad.jsonl:1" in quantize(source, out, "nvfp4", "--calibrate", str(tmp_path / "bad.jsonl")).error
    (tmp_path / "ids.jsonl").write_text('{"prompt": [999999]}\n')
    assert "999999" in quantize(source, out, "nvfp4", "--calibrate", str(tmp_path / "ids.jsonl")).error
