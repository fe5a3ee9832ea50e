"""What a plan says it costs: against the model itself, published sizes, and numbers counted by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from moesaic.contracts.plan import ModelPlan, Refusal, Wishes
from moesaic.contracts.spec import ModelSpec
from moesaic.hardware import GPUS, Hardware
from moesaic.kernels.registry import Kernels
from moesaic.models.build import spec_of
from moesaic.models.decoder import Decoder
from moesaic.models.floor import Step, step, touched
from moesaic.models.hold import hold_online
from moesaic.planning.cost import fit, vocabulary
from moesaic.planning.plan import plan
from scripts import plan_fixtures
from tests.planning_support import CATALOGUE, HYPOTHETICAL

H100 = GPUS["h100"]


def spec(name: str, **changes: Any) -> ModelSpec:
    """Of a fixture; its config alone, with changes."""
    fixture = plan_fixtures.read(name)
    config: Mapping[str, Any] = {**fixture.config, **changes}
    if fixture.sidecar:
        config = {**config, "quantization_config": {"quant_method": "modelopt", **fixture.sidecar}}
    return spec_of(config)


def made(of: ModelSpec, on: Hardware = H100, dtype: str = "bfloat16", **wishes: Any) -> ModelPlan:
    found = plan(of, on, CATALOGUE, replace(HYPOTHETICAL, **wishes), dtype)
    assert isinstance(found, ModelPlan), found
    return found


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek-v3-fp8", {"num_hidden_layers": 4}),
        ("deepseek-r1-nvfp4", {"num_hidden_layers": 4}),
        ("deepseek-v2-lite", {}),
        ("qwen3-30b-a3b", {"num_hidden_layers": 3}),
        ("kimi-k2-int4", {"num_hidden_layers": 3}),
        ("glm-4.5-air", {"num_hidden_layers": 3}),
        ("mixtral-8x7b", {"tie_word_embeddings": True}),
        ("gpt-oss-120b", {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_the_weights_are_those_that_the_model_allocates(name: str, changes: dict[str, Any], dtype: str) -> None:
    """To the byte: norms, routers, biases, sinks and draft layers included."""
    of = spec(name, **changes)
    planned = plan(of, GPUS["h100"], [c for c in CATALOGUE if c.backend in ("reference", "local")], Wishes(), dtype)
    assert isinstance(planned, ModelPlan), planned
    like = torch.empty(0, dtype=getattr(torch, dtype), device="meta")
    model = Decoder(of, Kernels(planned), like, 1)
    assert planned.weight_bytes == model.nbytes()
    assert planned.kv_bytes_per_token == like.element_size() * sum(model.kv_widths())


def test_the_weights_on_eight_ranks_are_counted_by_hand() -> None:
    """Qwen3-30B-A3B on 8 ranks: 4 q heads and 1 of 4 kv heads (each on two ranks), a width of 96, whole routers, and an
    eighth of the vocabulary."""
    planned = made(spec("qwen3-30b-a3b"), tp=8)
    attention = 2048 * (4 * 128 + 2 * 128) + 2048 * 4 * 128
    layer = 2 * (attention + 128 * 3 * 2048 * 96 + 2 * 2048 + 2 * 128) + 4 * 128 * 2048
    assert planned.weight_bytes == 48 * layer + 2 * (2 * 151936 // 8 * 2048 + 2048)
    assert planned.kv_bytes_per_token == 48 * 2 * 2 * 128
    qkv = next(each for each in planned.layers[0].linears if each.role == "qkv")
    assert qkv.nbytes == 2 * 2048 * 6 * 128
    assert planned.layers[0].nbytes == layer


def test_the_latent_projection_and_the_latent_cache_are_whole_on_each_rank() -> None:
    of = spec("deepseek-v3-fp8")
    one, eight = made(of), made(of, tp=8, ep=8)
    down = {len(p.layers): next(e.nbytes for e in p.layers[0].linears if e.role == "down") for p in (one, eight)}
    assert len(set(down.values())) == 1
    fp8 = 1536 * 7168 + 576 * 7168 + 4 * (12 * 56 + 5 * 56)
    assert set(down.values()) == {fp8}
    assert one.kv_bytes_per_token == eight.kv_bytes_per_token == 2 * 576 * 61


def test_experts_are_dealt_out_under_expert_parallelism_and_cut_under_tensor_parallelism() -> None:
    """Mixtral, 32 layers of 8 experts of 3 x 4096 x 14336: either way an eighth of them on each of 8 ranks."""
    of, experts = spec("mixtral-8x7b"), 2 * 3 * 4096 * 14336
    one, dealt, cut = made(of), made(of, ep=8), made(of, tp=8)
    assert one.weight_bytes - dealt.weight_bytes == 32 * 7 * experts
    attention, words = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096), 2 * 2 * 32000 * 4096
    assert one.weight_bytes - cut.weight_bytes == 32 * (7 * experts + attention * 7 // 8) + words * 7 // 8


def test_the_last_rank_of_a_vocabulary_that_does_not_divide_has_fewer_rows() -> None:
    """Whole where no projection is cut, as with experts shared out alone."""
    of, words = replace(spec("mixtral-8x7b"), vocab=32001), 2 * 2 * 4096
    whole, dealt, two = made(of), made(of, ep=8), made(of, tp=2)
    assert vocabulary(of, Wishes(ep=8)) == 32001
    assert vocabulary(of, Wishes(tp=2)) == 16001
    layers = {id(p): sum(len(each.layers) * each.nbytes for each in p.layers) for p in (whole, dealt, two)}
    assert whole.weight_bytes - layers[id(whole)] == dealt.weight_bytes - layers[id(dealt)] == 32001 * words + 2 * 4096
    assert two.weight_bytes - layers[id(two)] == 16001 * words + 2 * 4096


def test_a_model_that_computes_in_float32_takes_twice_the_memory() -> None:
    of = spec("mixtral-8x7b")
    both = {dtype: plan(of, local(), CATALOGUE, Wishes(), dtype) for dtype in ("bfloat16", "float32")}
    narrow, wide = both["bfloat16"], both["float32"]
    assert isinstance(narrow, ModelPlan)
    assert isinstance(wide, ModelPlan)
    routers = 32 * 8 * 4096 * 4
    assert wide.weight_bytes - routers == 2 * (narrow.weight_bytes - routers)
    assert wide.kv_bytes_per_token == 2 * narrow.kv_bytes_per_token == 32 * 2 * 8 * 128 * 4


def local() -> Hardware:
    return Hardware("a processor", "cpu", 64 * 10**9, frozenset({"avx512_bf16"}))


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("deepseek-v3-fp8", 688.6), ("qwen3-30b-a3b", 61.1), ("mixtral-8x7b", 93.4), ("glm-4.5-air", 220.9),
     ("qwen3-235b-a22b", 470.2), ("kimi-k2-int4", 594.2), ("gpt-oss-120b", 65.2)],
)  # fmt: skip
def test_the_weights_are_about_what_was_published(name: str, gigabytes: float) -> None:
    """The files, less a draft layer's copies of embedding and head, and with kv_b_proj and routers wider."""
    of = spec(name)
    copies = 2 * 2 * of.vocab * of.hidden * len(of.drafts) / 1e9
    assert made(of).weight_bytes / 1e9 == pytest.approx(gigabytes - copies, rel=0.005)


def test_fit_says_what_lacks_and_what_there_is_room_for() -> None:
    planned = made(spec("qwen3-30b-a3b"))
    small = replace(H100, memory=61_500_000_000)
    usable = int(small.memory * 0.92)
    assert fit(planned, small, 4096).lacking == planned.weight_bytes + 4096 * 98304 - usable
    assert fit(planned, small, 4096).tokens == 0
    roomy = fit(planned, H100, 4096)
    assert roomy.lacking == 0
    assert roomy.tokens == (int(80e9 * 0.92) - planned.weight_bytes) // 98304


# --- what cannot be cut ----------------------------------------------------------------------------------------------


def refusal(of: ModelSpec, **wishes: Any) -> Refusal:
    found = plan(of, H100, CATALOGUE, replace(HYPOTHETICAL, **wishes))
    assert isinstance(found, Refusal)
    return found


def test_heads_are_not_cut() -> None:
    """Qwen3-30B-A3B has 32 query and 4 kv heads: 3 and 6 ranks cannot share them, though 6 divides 6 x 128 columns."""
    for ways in (3, 6, 64):
        assert "heads" in refusal(spec("qwen3-30b-a3b"), tp=ways).what
    made(spec("qwen3-30b-a3b"), tp=16)
    made(spec("qwen3-30b-a3b"), tp=2)


def test_a_block_is_not_cut() -> None:
    """Qwen3-235B-A22B in FP8: experts of 1536 on 8 ranks are 192 wide, which is a block and a half."""
    found = refusal(spec("qwen3-235b-a22b-fp8"), tp=8)
    assert "1536 / 8 = 192 cuts a block of 128 of fp8_block; legal: 1, 2, 3, 4, 6, 12 ways" in found.what
    made(spec("qwen3-235b-a22b-fp8"), tp=8, ep=8)


def test_what_several_ranks_need_is_known_and_not_built() -> None:
    for wishes in ({"tp": 2}, {"tp": 2, "ep": 2}, {"ep": 2}):
        found = plan(spec("mixtral-8x7b"), H100, CATALOGUE, Wishes(**wishes))
        assert isinstance(found, Refusal)
        assert found.kind == "not_built"
        made(spec("mixtral-8x7b"), **wishes)


# --- the floor -------------------------------------------------------------------------------------------------------


def steps(of: ModelSpec, on: Hardware = H100, **wishes: Any) -> dict[str, Step]:
    planned = made(of, on, **wishes)
    return {"decode": step(of, planned, on, 64, 1, 4096), "prefill": step(of, planned, on, 1, 2048, 2048)}


def test_a_decode_step_of_mixtral_counted_by_hand() -> None:
    """64 requests with 4096 positions: all 8 experts are met; 8 kv heads of 128, 32 query heads."""
    found = steps(spec("mixtral-8x7b"))["decode"]
    expert, dense = 3 * 4096 * 14336, 2 * 4096 * 4096 + 2 * 1024 * 4096
    met = 8 * (1 - (6 / 8) ** 64)
    head = 32000 * 4096
    layer = 2 * dense + met * 2 * expert + 4 * 8 * 4096 + 2 * 2 * 4096 + 64 * 4096 * 2 * 2 * 1024
    assert found.nbytes == pytest.approx(32 * layer + 2 * head + 64 * 2 * 4096, rel=1e-9)
    products = dense + 2 * expert + 8 * 4096 + 32 * 2 * 128 * 4096
    assert found.operations == 2 * 64 * (32 * products + head)
    assert found.seconds == pytest.approx(found.nbytes / 3.35e12)
    assert found.bound == "memory"
    assert found.tokens == 64


def test_a_decode_step_of_deepseek_v3_counted_by_hand() -> None:
    """One request, 8 ranks sharing experts, one batch: 8 of 256 experts are met, one on each rank, on average."""
    found = step(of := spec("deepseek-v3-fp8"), made(of, tp=8, ep=8), H100, 1, 1, 4096)
    fp8 = lambda rows, columns: rows * columns + 4 * -(-rows // 128) * -(-columns // 128)  # noqa: E731
    attention = fp8(1536, 7168) + fp8(576, 7168) + fp8(3072, 1536) + fp8(7168, 2048) + 2 * 4096 * 512
    norms, cache = 2 * (2 * 7168 + 1536 + 512), 4096 * 2 * 576
    dense = 2 * fp8(2304, 7168) + fp8(7168, 2304)
    shared = 2 * fp8(256, 7168) + fp8(7168, 256)
    routed = 2 * fp8(2048, 7168) + fp8(7168, 2048) + 4 * (256 * 7168 + 256)
    layers = 61 * (attention + norms + cache) + 3 * dense + 58 * (shared + routed)
    assert found.nbytes == pytest.approx(layers + (2 * 129280 * 7168 + 2 * 7168) / 8, rel=1e-9)
    projections = 7168 * (1536 + 576) + 1536 * 3072 + 2048 * 7168 + 4096 * 512
    attended = 16 * (2 * 512 + 64) * 4096
    feed = 3 * 3 * 7168 * 2304 + 58 * (3 * 7168 * 256 + 3 * 7168 * 2048 + 256 * 7168)
    assert found.operations == 2 * (61 * (projections + attended) + feed + 129280 * 7168 // 8)


def test_prefill_attends_to_earlier_positions_and_its_floor_is_operations() -> None:
    """Qwen3-30B-A3B, 2048 tokens: 2048 x 2049 / 2 pairs, 32 heads of 128; 3 of 151936 x 2048 products is the head's."""
    found = steps(spec("qwen3-30b-a3b"))["prefill"]
    pairs = 2048 * 2049 // 2
    layer = 2048 * (2 * 4096 * 2048 + 2 * 512 * 2048 + 8 * 3 * 768 * 2048 + 128 * 2048) + 32 * 2 * 128 * pairs
    assert found.operations == 2 * (48 * layer + 151936 * 2048)
    assert found.seconds == pytest.approx(max(found.operations / 989e12, found.nbytes / 3.35e12))


def test_a_window_bounds_what_is_read() -> None:
    """gpt-oss: every second layer sees 128 positions, 8 kv heads of 64."""
    one, two = (step(of := spec("gpt-oss-120b"), made(of), H100, 1, 1, context) for context in (4096, 8192))
    assert two.nbytes - one.nbytes == 18 * 4096 * 2 * 2 * 8 * 64
    assert two.operations - one.operations == 18 * 4096 * 2 * 2 * 64 * 64


def test_ranks_with_batches_of_their_own_share_experts() -> None:
    """tp 1, ep 8: each rank has 64 requests and reads all of its dense weights, and experts met by 512 rows."""
    of = spec("mixtral-8x7b")
    apart, together = steps(of, ep=8)["decode"], steps(of, tp=8, ep=8)["decode"]
    assert (apart.tokens, together.tokens) == (512, 64)
    assert apart.nbytes > together.nbytes
    expert = 2 * 3 * 4096 * 14336
    head = 2 * 32000 * 4096 + 64 * 2 * 4096
    dense = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096) + 4 * 8 * 4096 + 4 * 4096 + 64 * 4096 * 4096
    assert apart.nbytes == pytest.approx(32 * (dense + touched(8, 2, 512) / 8 * expert) + head, rel=1e-9)


def test_operands_that_the_hardware_lacks_take_the_next_wider_rate() -> None:
    """NVFP4 rows: FP4 on Blackwell; on Hopper the bound is its FP8 rate."""
    of = hold_online(spec("qwen3-30b-a3b"), "nvfp4_dynamic")
    fast, slow = (step(of, made(of, on), replace(on, bandwidth=1e18), 1, 2048, 2048) for on in (GPUS["b200"], H100))
    assert slow.bound == fast.bound == "operations"
    assert fast.operations == slow.operations
    assert slow.seconds > 2 * fast.seconds


def test_uniform_routing_meets_experts_as_a_simulation_does() -> None:
    generator = torch.Generator().manual_seed(0)
    for experts, top_k, tokens in ((8, 2, 1), (8, 2, 3), (256, 8, 16), (128, 8, 64)):
        seen = [
            len({int(e) for _ in range(tokens) for e in torch.randperm(experts, generator=generator)[:top_k]})
            for _ in range(60)
        ]
        assert sum(seen) / len(seen) == pytest.approx(touched(experts, top_k, tokens), rel=0.05)
