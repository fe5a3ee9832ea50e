"""Quantised products inside real models: every scheme in three architectures, and what they take of memory.

Each call of a quantised op during a forward pass is held against the reference in FP64 on the call's own operands, in
BF16. Then, in FP32, the logits of a whole model against those of the same model on the reference, which must take the
same discrete decisions (codes, experts) on its way, up to near-ties.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moesaic.config import EngineConfig
from moesaic.contracts.scheme import SCHEMES, Encoding, Scheme
from moesaic.contracts.spec import MoESpec
from moesaic.engine.forced import run_batch
from moesaic.engine.launch import Launched, launch
from moesaic.errors import MoesaicError
from moesaic.formats.base import QuantTensor, nbytes_of
from moesaic.formats.checkpoint import part_scheme
from moesaic.formats.encodings import Rows
from moesaic.kernels import cpu_quant, reference
from moesaic.kernels.ops import ExpertWeights
from moesaic.layers.linear import Linear, Stored
from moesaic.models import hold
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder
from moesaic.models.weights import settle
from tests.checkpoints import random_model, save
from tests.compare import assert_rows_close
from tests.quant_checks import check_codes, checked_encode, checked_experts, checked_linear, is_code

COMMON: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v3": COMMON | {"intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128,
                             "kv_lora_rank": 64, "v_head_dim": 32, "n_shared_experts": 1},
    "qwen3_moe": COMMON | {"moe_intermediate_size": 128, "head_dim": 32},
    "mixtral": COMMON | {"intermediate_size": 256, "head_dim": 32},
}  # fmt: skip
"""Widths that every format divides: groups of 128 are the largest. q_a + kv_a = 128 + 80 rows."""
PRODUCTS = {"deepseek_v3": 2 * 3 + 2 + 2, "qwen3_moe": 2 * 2, "mixtral": 2 * 2}
"""Quantised dense products of a pass: down, q_b, o / qkv, o a layer; gate_up and down of a dense or shared part."""
QUANTIZED = [scheme for scheme in SCHEMES.values() if scheme.quantized]
TEXTS = [([3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5]), ([27], [1, 8]), ([(7 * i * i + 3) % 256 for i in range(19)], [2, 7])]
FP32 = 1e-4
"""Of a whole model, as in test_parity_logits.py."""


def product(turn: int) -> list[Any]:
    """Every scheme in every architecture; each day a third of the pairs, in which each scheme comes once."""
    pairs = [(i + k + turn, scheme, kind) for i, scheme in enumerate(QUANTIZED) for k, kind in enumerate(SIZES)]
    long = pytest.mark.long
    return [pytest.param(s, kind, id=f"{s.name}-{kind}", marks=long if at % 3 else ()) for at, s, kind in pairs]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save(random_model(kind, **sizes), folder / kind) for kind, sizes in SIZES.items()}


def start(path: Path, scheme: Scheme, dtype: str, **options: Any) -> Launched:
    """The model held in exactly this scheme; static scales, which nobody measured here, are set apart from 1."""
    config = EngineConfig(dtype=dtype, quantization=scheme.name, progress=False, kv_memory=1 << 20, **options)
    with patch.object(hold, "dynamic", lambda scheme: scheme), Checkpoint.open(path) as checkpoint:
        launched = launch(checkpoint, config, None)
    model, full = launched.built.model, {"fp8_tensor": 448, "nvfp4": 2688}
    for i, item in enumerate(stored_in(model)):
        if item.input_scale is not None:
            item.input_scale.fill_((6 + i % 3) / full[item.part.runs.activation.name])
    settle(model.sources())
    return launched


def stored_in(model: Decoder) -> list[Stored]:
    return [item for item in model.sources() if isinstance(item, Stored)]


def routed(name: str) -> bool:
    return ".experts." in name


@pytest.mark.parametrize(("scheme", "kind"), product(0))
def test_every_product_of_a_pass(scheme: Scheme, kind: str, paths: dict[str, Path]) -> None:
    seen: list[QuantTensor] = []

    def linear(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
        seen.append(w)
        return checked_linear(x, w, bias_N)

    def experts(x: Rows, w: ExpertWeights, ids: Tensor, weights: Tensor) -> Tensor:
        seen.append(w.w13)
        return checked_experts(x, w, ids, weights)

    with patch.multiple(cpu_quant, encode=checked_encode, linear_quant=linear, experts=experts):
        launched = start(paths[kind], scheme, "bfloat16")
    model = launched.built.model
    check_types(model, scheme)
    assert all(logits.isfinite().all() for logits in run_batch(model, TEXTS))
    mixtures = [block for block in model.spec.layers if isinstance(block.mlp, MoESpec)]
    assert len(seen) == PRODUCTS[kind] + more_for_static(model) + len(mixtures)
    assert {w.form for w in seen} == {item.weight.form for item in stored_in(model) if item.weight.form.name != "bf16"}


def check_types(model: Decoder, scheme: Scheme) -> None:
    """Each projection but kv_b is held as the scheme says, in the bytes that the format takes; plan and model agree."""
    for item in stored_in(model):
        wanted = part_scheme(scheme, expert=routed(item.name)).weight.name
        assert item.weight.form.name == ("bf16" if item.name.endswith("kv_b_proj") else wanted), item.name
        assert item.weight.nbytes == nbytes_of(item.weight.form, (item.part.outputs,), item.part.inputs), item.name
    for block in model.blocks:
        for stack in (getattr(block.attention, "qkv", None), getattr(block.attention, "down", None)):
            assert stack is None or len(stack.pieces) == 1, "one matrix of all parts"


def more_for_static(model: Decoder) -> int:
    """A stack whose parts were calibrated apart is multiplied part by part."""
    stacks = [item for item in walk(model) if isinstance(item, Linear)]
    return sum(len(piece.products) - 1 for stack in stacks for piece in stack.pieces)


def walk(node: Any) -> Iterator[Any]:
    """The objects of a model's parts."""
    yield node
    for value in vars(node).values():
        for each in value if isinstance(value, list) else [value]:
            if type(each).__module__.startswith(("moesaic.layers", "moesaic.moe", "moesaic.models.decoder")):
                yield from walk(each)


# --- whole models ----------------------------------------------------------------------------------------------------


@dataclass
class Decisions:
    """What `cpu_quant` decided in a pass: every encoding and every choice of experts, in order.

    `replay` is the same pass on the reference: it must decide alike, up to near-ties, and goes on with what was
    decided here. So no row is left out of the comparison for a rounding that fell on the other side.
    """

    coded: list[Rows] = field(default_factory=list)
    chosen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    at: Tensor | None = None
    """In the replay, between the products of experts: which of the recorded rows each row is."""

    def record(self) -> dict[str, Callable[..., Any]]:
        encode, experts = cpu_quant.encode, cpu_quant.experts

        def record_codes(x: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
            self.coded.append(encode(x, encoding, scale))
            return self.coded[-1]

        def record_choice(x: Rows, w: ExpertWeights, ids: Tensor, weights: Tensor) -> Tensor:
            self.chosen.append((ids, weights))
            return experts(x, w, ids, weights)

        return {"encode": record_codes, "experts": record_choice}

    def replay(self) -> dict[str, Callable[..., Any]]:
        coded, chosen, encode, experts = iter(self.coded), iter(self.chosen), reference.encode, reference.experts

        def replay_codes(x: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
            theirs, mine = encode(x, encoding, scale), next(coded)
            if encoding.name == "bf16":
                return theirs
            mine = mine if self.at is None else reordered(mine, self.at)
            check_codes(mine, theirs)
            return replace(mine, dtype=theirs.dtype)

        def replay_choice(x: Rows, w: ExpertWeights, ids: Tensor, weights: Tensor) -> Tensor:
            mine, own_weights = next(chosen)
            assert torch.allclose(weights, own_weights, rtol=1e-3), "other experts, and no near-tie"
            self.at = mine[mine >= 0].argsort(stable=True).argsort()
            y = experts(x, w, mine, weights)
            self.at = None
            return y

        return {"encode": replay_codes, "experts": replay_choice, "linear_quant": reference.linear_quant}


def reordered(x: Rows, order: Tensor) -> Rows:
    """Rows in another order; a scale of all rows stays."""

    def turned(part: Tensor) -> Tensor:
        return part.view(torch.uint8)[order].view(part.dtype) if is_code(part) else part[order]

    return replace(x, parts={name: turned(part) if part.ndim == 2 else part for name, part in x.parts.items()})


def logits_of(path: Path, scheme: Scheme, ops: dict[str, Callable[..., Any]]) -> Tensor:
    """[R, V] of all rows of all texts in FP32, with some functions of `cpu_quant` replaced."""
    with patch.multiple(cpu_quant, **ops):
        model = start(path, scheme, "float32").built.model
        return torch.cat(run_batch(model, [(prompt[:1], [*prompt[1:], *answer]) for prompt, answer in TEXTS]))


@pytest.mark.parametrize(("scheme", "kind"), product(1))
def test_logits_are_those_of_the_reference(scheme: Scheme, kind: str, paths: dict[str, Path]) -> None:
    decisions = Decisions()
    mine = logits_of(paths[kind], scheme, decisions.record())
    replay = decisions.replay()
    with patch.object(reference, "encode", replay["encode"]):  # what encodes between the products of experts
        theirs = logits_of(paths[kind], scheme, replay)
    assert decisions.chosen
    assert (decisions.coded[0].encoding == scheme.activation) or scheme.name.startswith("w4afp8")
    assert len(mine) == sum(len(prompt) + len(answer) - 1 for prompt, answer in TEXTS)
    assert_rows_close(mine, theirs, FP32, "logits")


# --- deterministic mode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.name)
def test_deterministic_or_refused(scheme: Scheme, paths: dict[str, Path]) -> None:
    """A text's logits are, to the last bit, what they are beside other texts; or the scheme is refused by name."""
    if not scheme.activation.by_row:
        remedy = r"--quantization (fp8_channel|w4afp8_token), or a checkpoint with calibrated \(static\) scales"
        with pytest.raises(MoesaicError, match=f"layer .: {scheme.name} gives all rows .* Works here: {remedy}"):
            start(paths["deepseek_v3"], scheme, "bfloat16", deterministic=True)
        return
    model = start(paths["deepseek_v3"], scheme, "bfloat16", deterministic=True).built.model
    together = run_batch(model, TEXTS)
    for i, text in enumerate(TEXTS):
        assert torch.equal(run_batch(model, [text])[0], together[i])


def test_the_remedies_work(paths: dict[str, Path]) -> None:
    for name in ("fp8_channel", "w4afp8_token", "w4afp8_static", "fp8_tensor_static"):
        launched = start(paths["deepseek_v3"], SCHEMES[name], "bfloat16", deterministic=True)
        assert launched.built.plan.base.batch_invariant


# --- memory ----------------------------------------------------------------------------------------------------------

MIB = 1 << 20
TILES = 24 * MIB
"""What a product may take beside the codes: a decoded tile (2 MiB in FP32) and its temporaries, rows, the library's
own buffers. A dequantised copy would take 256 MiB and more."""


def test_weights_stay_codes() -> None:
    """256 MiB of BF16 as a dense weight, and as experts: allocated and multiplied in a fresh process."""
    for found in measured("products", "fp8_block", "mxfp8", "mxfp4", "nvfp4", "int4"):
        assert found["bf16"] >= 256 * MIB
        assert found["held"] <= 0.54 * found["bf16"]
        assert found["growth"] <= found["held"] + TILES


def test_a_model_is_quantised_while_it_is_loaded(tmp_path: Path) -> None:
    """A 256 MiB checkpoint held in 4 bits: neither loading nor running ever holds it whole."""
    (written,) = measured("write", str(tmp_path))
    (found,) = measured("model", "mxfp4", str(tmp_path))
    assert written["bf16"] >= 256 * MIB
    assert found["held"] <= 0.28 * written["bf16"]
    assert found["growth"] <= found["held"] + 96 * MIB


def measured(*args: str) -> list[dict[str, int]]:
    command = [sys.executable, "-m", "tests.quant_memory", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
