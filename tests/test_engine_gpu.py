"""The engine on a GPU (`-m gpu`): graphs, running ahead, the FP8 cache, deterministic mode, and what loading takes.

`tiny` in BF16 unless said. Answers of different ways of running are compared token by token; where they may differ by a
near tie, up to the first difference, whose two tokens must then be nearly tied in both.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic import LLM, SamplingParams
from moesaic.engine.draw import NEAR_TIE
from moesaic.engine.engine import Engine
from moesaic.engine.graphs import DecodeGraphs, sizes
from moesaic.errors import MoesaicError
from moesaic.kernels.registry import Kernels
from moesaic.kernels.traced import TracedKernels
from moesaic.layers.linear import Stored
from moesaic.models.decoder import Decoder
from moesaic.models.dummy import fill_model
from moesaic.tasks import FAMILIES, items
from tests.request_streams import answers, summary
from tests.small_models import alike
from tests.test_dummy import CONFIG, folder_of
from tests.test_traced import compiled, planned, steps

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0, max_tokens=48, logprobs=2)
PROMPTS = [item.prompt for name in FAMILIES for item in items(name, "test", 2)]


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def open_tiny(**options: Any) -> LLM:
    return LLM(**{"device": "cuda", "progress": False, "kv_memory": 1 << 28, "max_num_seqs": 16, **options})


def ask(llm: LLM, prompts: Sequence[str], params: SamplingParams = GREEDY) -> list[Any]:
    tokens = [llm.chat_tokens([{"role": "user", "content": prompt}]) for prompt in prompts]
    return [result.completions[0] for result in llm.generate(tokens, params)]


def same_but_for_ties(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many answers part at a near tie; none may part elsewhere."""
    parted = 0
    for mine, theirs in zip(one, other, strict=True):
        differ = (k for k, (a, b) in enumerate(zip(mine.tokens, theirs.tokens, strict=False)) if a != b)
        if (at := next(differ, None)) is None:
            assert len(mine.tokens) == len(theirs.tokens)
            continue
        parted += 1
        for answer in (mine, theirs):
            first, second = answer.logprobs[at].top[:2]
            assert first[1] - second[1] < 2 * NEAR_TIE, "an answer that parts where nothing is tied"
    return parted


def test_graphs_and_running_ahead_change_nothing_but_near_ties() -> None:
    llm = open_tiny()
    assert isinstance(llm.engine.runner.graphs, DecodeGraphs)
    assert llm.engine.overlap
    ahead = ask(llm, PROMPTS)
    llm.engine.overlap = False
    assert same_but_for_ties(ask(llm, PROMPTS), ahead) <= len(PROMPTS) // 8
    llm.engine.runner.graphs = None
    parted = same_but_for_ties(ask(llm, PROMPTS), ahead)
    assert parted <= len(PROMPTS) // 8
    cpu = LLM(device="cpu", dtype="float32", progress=False)
    parted = same_but_for_ties(ask(cpu, PROMPTS), ahead)
    print(f"\n{parted} of {len(PROMPTS)} answers part from the CPU's at a near tie")
    assert parted <= len(PROMPTS) // 4


def test_short_prompts_in_graphs_change_nothing_but_near_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that come alone, in the graphs of decoding and without."""
    llm, prompts, run = open_tiny(max_num_seqs=48), PROMPTS[:12], []
    real = DecodeGraphs.run
    monkeypatch.setattr(DecodeGraphs, "run", lambda self, step: (run.append(step.decode), real(self, step))[1])
    alone = [ask(llm, [prompt])[0] for prompt in prompts]
    assert run.count(False) == len(prompts)
    llm.engine.runner.graphs = None
    llm.engine.scheduler.blocks.reset()
    assert same_but_for_ties([ask(llm, [prompt])[0] for prompt in prompts], alone) <= 2


@pytest.mark.parametrize("options", [{}, {"kv": "fp8"}, {"quantization": "fp8"}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_rows_of_a_prompt_see_one_another(tmp_path: Path, size: int, options: dict[str, Any],
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Heads, whose attention fetches the cache early, and weights at random, so that every token of a context counts:
    all scores of prompts in graphs, within a tenth of what another context with the same last token makes. Together
    they are taken in chunks, beside one that decodes."""
    folder = folder_of(tmp_path, hidden_size=1024, num_attention_heads=8, head_dim=size, num_experts=32,
                       num_experts_per_tok=4, moe_intermediate_size=256, vocab_size=20)  # fmt: skip
    llm = LLM(str(folder), load_format="dummy", device="cuda", progress=False, kv_memory=1 << 28,
              max_num_batched_tokens=400, **options)  # fmt: skip
    graphs, seen = llm.engine.runner.graphs, Counter[bool]()
    assert isinstance(graphs, DecodeGraphs)
    real = DecodeGraphs.fits
    monkeypatch.setattr(DecodeGraphs, "fits", lambda self, step: (found := real(self, step), seen.update([found]))[0])
    params, rng = SamplingParams(temperature=0, max_tokens=1, logprobs=20), random.Random(1)
    prompts = [[rng.randrange(20) for _ in range(count)] + [7] for count in (1, 2, 9, 30, 50, 63, 64, 100, 310, 480)]

    def scores(together: bool) -> Tensor:
        if together:
            long = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
            answers = llm.generate([[3, 4, 5], *prompts], [long, *[params] * len(prompts)])[1:]
        else:
            answers = [llm.generate([prompt], params)[0] for prompt in prompts]
        llm.engine.scheduler.blocks.reset()
        found = [dict(each.completions[0].logprobs[0].top) for each in answers]
        return torch.tensor([[at[token] for token in range(20)] for at in found])

    mine = torch.stack([scores(together) for together in (False, True) * 3])
    assert set(seen) == {True}, "all steps in graphs"
    llm.engine.runner.graphs = None
    theirs = scores(False)
    other = (theirs - theirs.roll(1, 0)).square().mean(1).sqrt()
    assert ((mine - theirs).square().mean(2).sqrt() < other / 10).all()
    assert not options.get("deterministic") or (mine == theirs).all()


def test_every_way_of_sampling_is_the_same_ahead() -> None:
    """Random requests over time, some preempted: with and without running ahead, in one order of arrival each."""
    engine: Engine = open_tiny(max_num_seqs=6, max_model_len=256).engine
    found = {}
    for overlap in (False, True):
        engine.overlap = overlap
        found[overlap] = summary(answers(engine, random.Random(1), 30))
        engine.scheduler.blocks.reset()
    alike = sum(found[True][name][0] == found[False][name][0] for name in found[True])
    assert alike >= 24, "batches differ by a step, so a near tie may turn; not more"


def test_the_fp8_cache() -> None:
    plain, fp8 = open_tiny(), open_tiny(kv="fp8")
    rows = [llm.engine.runner.pool.layers[0] for llm in (plain, fp8)]
    assert rows[1].dtype == torch.uint8
    assert rows[1].shape[1] <= 0.65 * rows[0].shape[1] * 2, "a latent in FP8, the rotary key in BF16"
    assert isinstance(fp8.engine.runner.graphs, DecodeGraphs)
    one, other = ask(plain, PROMPTS), ask(fp8, PROMPTS)
    alike = sum(a.tokens == b.tokens for a, b in zip(one, other, strict=True))
    print(f"\nFP8 cache: {alike} of {len(PROMPTS)} answers are the same")
    assert alike >= 0.7 * len(PROMPTS)
    again = ask(fp8, PROMPTS)
    assert fp8.engine.scheduler.blocks.hits > 0
    assert same_but_for_ties(again, other) <= len(PROMPTS) // 8, "read back from the prefix cache"


@pytest.mark.parametrize("quantization", [None, "fp8", "mxfp8"])
def test_deterministic_mode_is_exact(quantization: str | None) -> None:
    """Tokens and log-probs, bit for bit: alone, in company, in another order, preempted, from the prefix cache."""
    try:
        llm = open_tiny(deterministic=True, quantization=quantization)
    except MoesaicError as error:
        pytest.skip(f"refused: {error.one_line():.300}")
    prompts = PROMPTS[:18]

    def exact(found: Sequence[Any]) -> list[Any]:
        return [(each.tokens, [entry.logprob for entry in each.logprobs]) for each in found]

    together = exact(ask(llm, prompts))
    assert exact(ask(llm, prompts[::-1]))[::-1] == together
    assert [exact(ask(llm, [prompt]))[0] for prompt in prompts] == together
    llm.engine.runner.graphs = None
    assert exact(ask(llm, prompts)) == together, "eager"
    pressed = open_tiny(deterministic=True, quantization=quantization, max_model_len=512, kv_memory=1 << 20)
    assert exact(ask(pressed, prompts)) == together
    assert pressed.engine.stats.preemptions > 0


def test_padding_rows_touch_no_expert() -> None:
    """Three rows run in a graph of four: the load that is counted is theirs alone."""
    llm = open_tiny()
    meter = llm.engine.runner.model.meter
    meter.start()
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    llm.generate([[5, 6, 7], [8, 9], [10]], params)
    spec = llm.engine.runner.model.spec
    top_k = next(layer.mlp.router.top_k for layer in spec.layers if hasattr(layer.mlp, "router"))
    counts = [sum(load.counts) for load in meter.loads()[: len([b for b in spec.layers if hasattr(b.mlp, "router")])]]
    # Every prompt token, and every new one but the last; with a step ahead also the last one's successor, for nobody.
    rows = 6 + 3 * 8
    assert all(rows * top_k <= count <= (rows + 3) * top_k for count in counts), counts


def test_loading_takes_no_more_than_a_layer_beside_the_weights(tmp_path: Path) -> None:
    for options in ({}, {"quantization": "fp8"}, {"load_format": "dummy"}):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        llm = open_tiny(kv_memory=1 << 20, graphs=False, max_model_len=256, **options)
        peak = torch.cuda.max_memory_allocated() - before
        model = llm.launched.built.model
        each = [sum((s.weight if isinstance(s, Stored) else s[1]).nbytes for s in block.sources())
                for block in model.blocks]  # fmt: skip
        held = model.nbytes() + llm.engine.runner.pool.nbytes
        assert peak <= held + max(each) + (4 << 20), (options, peak, held, max(each))
        del llm, model


def test_a_large_dummy_is_made_on_the_gpu(tmp_path: Path) -> None:
    """Two layers of the shape of Qwen3-30B-A3B in FP8: peak memory, and tokens out of the whole engine."""
    folder = folder_of(tmp_path, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                       num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=32000)  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == CONFIG["num_hidden_layers"]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    options = {"load_format": "dummy", "quantization": "fp8", "max_num_seqs": 4, "kv_memory": 1 << 28}
    llm = LLM(str(folder), device="cuda", progress=False, **options)
    held = llm.launched.built.model.nbytes() + (1 << 28)
    layer = held / 2
    assert torch.cuda.max_memory_allocated() - before <= held + layer
    results = llm.generate([[1, 2, 3], [4] * 100], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert [len(result.tokens) for result in results] == [8, 8]


@pytest.mark.parametrize("case", [("heads with norms", "fp8", "fp8", "triton"), ("latent", "mxfp8", "bf16", "triton")],
                         ids=str)  # fmt: skip
@torch.inference_mode()
def test_a_compiled_model_is_the_model(case: tuple[str, str, str, str]) -> None:
    spec, plan = planned(*case)
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    model, plain = (Decoder(spec, kind(plan), like, 128) for kind in (TracedKernels, Kernels))
    fill_model(model)
    alike(model, plain)
    run, pools = compiled(model, "aot_eager"), [each.pool(24, 4) for each in (model, plain)]
    for mine, theirs in zip(steps(pools[0]), steps(pools[1]), strict=True):
        assert torch.equal(run(mine), plain.scores(plain(theirs)))


def test_sizes_of_graphs() -> None:
    assert sizes(1) == [1]
    assert sizes(64)[-1] == 64
    assert all(a < b for a, b in zip(sizes(300), sizes(300)[1:], strict=False))
    assert max(b - a for a, b in zip(sizes(300), sizes(300)[1:], strict=False)) == 32
