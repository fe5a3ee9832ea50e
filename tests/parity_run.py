"""Runs a parity case on both sides: `transformers` as the oracle, and our engine through its scheduler and KV pool.

Letters: S sequences, L positions, V vocabulary, E experts, D hidden size, R rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.config import EngineConfig
from moesaic.engine.batch import make_input
from moesaic.engine.blocks import BlockManager
from moesaic.engine.launch import Launched, launch
from moesaic.engine.params import SamplingParams
from moesaic.engine.request import Request
from moesaic.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.models.checkpoint import Checkpoint
from moesaic.moe.layer import MoELayer
from tests.checkpoints import random_drafts, random_model, save
from tests.compare import row_errors
from tests.parity_cases import Case
from tests.parity_routing import Choices, Gates, watched

DECODE = 64
PROMPT = 53
RAGGED = ((1, 9), (2, 5), (17, 1), (31, 7), (48, 3))
"""(prompt length, tokens forced after it) of the sequences that run beside the main one: 1, primes, a full block."""


@dataclass(frozen=True)
class Text:
    """A prompt, the tokens that are forced after it, and the oracle's logits [prompt + forced - 1, V] of all rows."""

    prompt: list[int]
    forced: list[int]
    logits_LV: Tensor

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.forced


@dataclass(frozen=True)
class Oracle:
    """A case made into a checkpoint, and what `transformers` says about it in FP32.

    texts: the first is the main one, forced along the oracle's own greedy tokens.
    choices: per text, the experts that it took and how nearly (see `parity_routing`).
    decided: the smallest gap between the two best logits on the greedy path, over the norm of that row's logits.
    """

    case: Case
    model: PreTrainedModel
    path: Path
    texts: list[Text]
    choices: list[Choices]
    decided: float


@torch.inference_mode()
def make_oracle(case: Case, path: Path) -> Oracle:
    """Writes the case's checkpoint under `path` and asks `transformers`."""
    model = random_model(case.model_type, case.seed, **case.config)
    drafts = random_drafts(model, case.drafts) if case.drafts else None
    set_biases(model, case.bias)
    if drafts is not None:
        set_biases(drafts, case.bias)
    save(model, path, dtype=getattr(torch, case.stored), drafts=drafts, old=case.old, shard=case.shard)
    generator = torch.Generator().manual_seed(1000 + case.seed)

    def draw(count: int) -> list[int]:
        return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()

    prompt = draw(PROMPT)
    greedy, decided = greedy_tokens(model, prompt, DECODE)
    pairs = [(prompt, greedy), *((draw(n), draw(m)) for n, m in RAGGED)]
    rows = [(p + f)[:-1] for p, f in pairs]
    with watched(model) as found:
        logits = [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]
    texts = [Text(*pair, each) for pair, each in zip(pairs, logits, strict=True)]
    return Oracle(case, model, path, texts, found(), decided)


def set_biases(model: torch.nn.Module, kind: str) -> None:
    """Gives every selection bias of a model the size that the case asks for. FP32 numbers: BF16 would make ties."""
    for i, (name, bias_E) in enumerate(sorted(model.named_buffers())):
        if name.endswith("e_score_correction_bias") and kind != "small":
            noise_E = torch.rand(len(bias_E), generator=torch.Generator().manual_seed(i))
            # negative: about -8, within 1/4 of one another; swallow: distinct steps of 512, against scores below 1.
            bias_E.copy_(-8 - 0.25 * noise_E if kind == "negative" else 512 * noise_E.argsort().float())


def greedy_tokens(model: PreTrainedModel, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """The oracle's greedy continuation through its own cache, and the smallest relative gap of the two best logits."""
    tokens: list[int] = []
    # The cache was called `past_key_values` before transformers 5.24.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    gap, cache, step = float("inf"), None, torch.tensor([list(prompt)])
    for _ in range(count):
        out = model(step, use_cache=True, **{name: cache})
        cache, last_V = out[name], out.logits[0, -1]
        best = last_V.topk(2)
        gap = min(gap, ((best.values[0] - best.values[1]) / last_V.norm()).item())
        tokens.append(int(best.indices[0]))
        step = torch.tensor([tokens[-1:]])
    return tokens, gap


# --- our side --------------------------------------------------------------------------------------------------------


def start(oracle: Oracle, dtype: str, *, deterministic: bool = False, experts: str = "auto") -> Launched:
    config = EngineConfig(
        dtype=dtype, progress=False, prefix_cache=False, kv_memory=8 << 20, deterministic=deterministic, experts=experts
    )
    with Checkpoint.open(oracle.path) as checkpoint:
        return launch(checkpoint, config, None)


@torch.inference_mode()
def forced_logits(
    ours: Launched, texts: Sequence[Text], *, budget: int = 2048, chunk: int | None = None, gates: Gates | None = None
) -> list[Tensor]:
    """Our logits [L, V] of every row of every text, all in one batch, in steps of at most `budget` tokens.

    The scheduler and the KV pool do what they do when serving; only the sampled token is replaced by the forced one.
    gates: told which rows each step holds.
    """
    runner, blocks = ours.engine.runner, ours.blocks
    limits = SchedulerConfig(
        max_num_seqs=len(texts), max_num_batched_tokens=budget, max_model_len=ours.max_model_len, chunk_size=chunk
    )
    scheduler = Scheduler(limits, BlockManager(blocks, runner.pool.block_size, prefix_cache=False))
    known = {str(i): text.tokens for i, text in enumerate(texts)}
    rows: dict[str, list[Tensor]] = {name: [] for name in known}
    for name, text in zip(known, texts, strict=True):
        params = SamplingParams(temperature=0.0, max_tokens=len(text.forced), ignore_eos=True)
        scheduler.add(Request(name, text.prompt, params))
    while (step := scheduler.schedule()) is not None:
        inputs = make_input(step, runner.pool, runner.feed)
        if gates is not None:
            gates.at = [(int(c.request.id), c.start + i) for c in step.chunks for i in range(c.count)]
        logits_TV = runner.model.logits(runner.model(inputs))
        for piece, span in zip(step.chunks, inputs.attention.spans, strict=True):
            assert piece.start == sum(len(part) for part in rows[piece.request.id]), "a row was left out or came twice"
            rows[piece.request.id].append(logits_TV[span.start : span.start + span.count])
        scheduler.commit(step, [known[c.request.id][c.start + c.count] for c in step.chunks if c.sample])
    return [torch.cat(rows[name]) for name in known]


def generate(ours: Launched, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens through the whole engine, sampler included."""
    engine, tokens = ours.engine, list[int]()
    engine.add("greedy", prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.tokens
    return tokens


# --- the two sides together: the tests assert on these numbers, scripts/parity_table.py prints them ------------------


@dataclass(frozen=True)
class Errors:
    """Worst rows of a run: of the main text's prompt, of its decoding steps, and of the texts that ran beside it."""

    prefill: float
    decode: float
    beside: float

    @property
    def worst(self) -> float:
        return max(self.prefill, self.decode, self.beside)


def errors(oracle: Oracle, logits: Sequence[Tensor]) -> Errors:
    """Of the logits of the first texts, or of all."""
    rows = [row_errors(ours_LV, text.logits_LV) for ours_LV, text in zip(logits, oracle.texts, strict=False)]
    beside = max((part.max().item() for part in rows[1:]), default=0.0)
    return Errors(rows[0][:PROMPT].max().item(), rows[0][PROMPT:].max().item(), beside)


@dataclass(frozen=True)
class HalfRun:
    """A BF16 run. within: share of rows, none left out, within 2^-6.

    before: the worst of the `untouched` rows: those that no other choice of experts, of their own or of an earlier row
    of their text, can have changed.  other: the margins of the choices that differ, out of `choices`.
    """

    errors: Errors
    within: float
    before: float
    untouched: int
    other: list[float]
    choices: int


def run_bf16(oracle: Oracle, *, force: bool) -> HalfRun:
    """All texts at once in BF16; with the oracle's choice of experts, or freely."""
    ours = start(oracle, "bfloat16")
    layers = [block.mlp for block in ours.built.model.blocks if isinstance(block.mlp, MoELayer)]
    with Gates(layers, oracle.choices, force) as gates:
        logits = forced_logits(ours, oracle.texts, gates=gates)
    rows = [row_errors(ours_LV, text.logits_LV) for ours_LV, text in zip(logits, oracle.texts, strict=True)]
    first = [min([at for text, _, at in gates.other if text == i], default=len(each)) for i, each in enumerate(rows)]
    kept_R, all_R = torch.cat([each[:end] for each, end in zip(rows, first, strict=True)]), torch.cat(rows)
    margins = [oracle.choices[text].margins_MR[layer, at].item() for text, layer, at in gates.other]
    return HalfRun(
        errors(oracle, logits), (all_R <= 2**-6).float().mean().item(), kept_R.max().item(), len(kept_R), margins,
        sum(choices.margins_MR.numel() for choices in oracle.choices),
    )  # fmt: skip
