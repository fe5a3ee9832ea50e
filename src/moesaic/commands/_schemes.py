"""`moesaic eval --schemes`: one checkpoint in many number formats, on the same items.

The checkpoint as it is stored answers first. A scheme is then held against those answers in one pass: where its own
most likely token is the answer's everywhere, its greedy answer is that answer, word for word; where they part, it goes
on by itself from its own token. That is how speculative decoding accepts a draft (Leviathan et al. 2022, arXiv
2211.17192, greedy case), and it gives the distances between the two models' distributions in the same pass.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moesaic.commands._scheme_table import Row, brief
from moesaic.commands.eval import Asked
from moesaic.contracts.scheme import UNQUANTIZED
from moesaic.engine.forced import Distance, distance, forced_logits, means
from moesaic.engine.params import SamplingParams
from moesaic.errors import MoesaicError
from moesaic.layers.linear import Stored
from moesaic.llm import LLM
from moesaic.models.decoder import Decoder
from moesaic.moe.layer import MoELayer
from moesaic.tasks.paired import Paired
from moesaic.tasks.score import Score

KEEP_BYTES = 512 << 20
"""Of the stored model's logits, kept to compare with: every item's if they fit, else of every second, third, ..."""
STORED = "as stored"

Item = tuple[str, Tensor] | Stored
Open = Callable[[str | None], LLM]
"""None: the checkpoint as it is stored. Else the name of a scheme (or of whatever else is to be held against it)."""


@dataclass(frozen=True)
class How:
    """max_tokens: of an answer.  stop: texts that end one.  progress: bars, and a line per scheme, on stderr."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    progress: bool = False

    def patience(self, answer: Sequence[int]) -> int:
        """Most tokens of another model's answer: one that rambles to twice the length has lost its way."""
        return min(self.max_tokens, 2 * len(answer) + 64)

    def say(self, text: str) -> None:
        if self.progress:
            print(f"moesaic: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Sound:
    """The side that every scheme is compared with: its answers, whether they are right, and some of its logits."""

    asked: list[Asked]
    answers: list[list[int]]
    right: list[bool]
    logits: dict[int, Tensor]


def compare(open_model: Open, ask: Callable[[LLM], list[Asked]], names: Sequence[str], how: How,
            done: Mapping[str, Row] | None = None) -> Iterator[Row]:  # fmt: skip
    """The row of the stored model, then one per scheme; a scheme that cannot run gives a row with its `error`.

    done: rows of an earlier run with the same settings, taken as they are.
    """
    llm = open_model(None)
    how.say(f"{STORED}: generating")
    sound, row = listen(llm, ask(llm), how)
    yield row
    del llm
    for i, name in enumerate(names, 1):
        if name == row["scheme"]:
            continue
        if done and name in done:
            yield done[name]
            continue
        gc.collect()  # the model before is not to stay beside this one
        how.say(f"{name} ({i} of {len(names)})")
        yield measured(open_model, name, sound, how)


def measured(open_model: Open, name: str, sound: Sound, how: How) -> Row:
    """One scheme's row, or why there is none."""
    try:
        llm = open_model(name)
        row = against(llm, name, sound, how)
        how.say(brief(row))
        return row
    except MoesaicError as error:
        how.say(f"{name}: {error.one_line()}")
        return {"scheme": name, "error": error.one_line()}


def listen(llm: LLM, asked: list[Asked], how: How) -> tuple[Sound, Row]:
    """Generates the stored model's answers, and keeps logits along evenly chosen ones."""
    began = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=how.max_tokens, stop=how.stop)
    results = llm.generate([a.prompt for a in asked], params)
    right = [a.right(r.text) for a, r in zip(asked, results, strict=True)]
    answers = [r.tokens for r in results]
    model = llm.launched.built.model
    every = -(-sum(map(len, answers)) * model.spec.vocab * 4 // KEEP_BYTES)
    chosen = [i for i in range(0, len(asked), max(1, every)) if answers[i]]
    texts = [(asked[i].prompt, answers[i]) for i in chosen]
    logits = dict(zip(chosen, forced_logits(model, texts, budget(llm)), strict=True))
    sound = Sound(asked, answers, right, logits)
    quantized = any(item.part.scheme.quantized for item in model.sources() if isinstance(item, Stored))
    row: Row = {"scheme": STORED if quantized else UNQUANTIZED.name} | weights(model) | scores(asked, right)
    row |= {"dtype": str(llm.launched.built.dtype).removeprefix("torch."), "texts": len(logits)}
    row |= {"tokens": sum(map(len, logits.values()))}
    return sound, row | {"seconds": round(time.perf_counter() - began, 1)}


def against(llm: LLM, name: str, sound: Sound, how: How) -> Row:
    """A scheme's answers and distances."""
    began = time.perf_counter()
    apart, ways = replay(llm, name, sound, how)
    texts = go_on(llm, sound, ways, how)
    right = [sound.asked[i].right(texts[i]) if i in texts else sound.right[i] for i in range(len(sound.asked))]
    paired = Paired.of(sound.right, right)
    row: Row = {"scheme": name} | weights(llm.launched.built.model) | scores(sound.asked, right)
    row |= {
        "lost": paired.lost, "gained": paired.gained, "difference": paired.difference, "interval": paired.interval,
        "p_value": paired.p_value, "other_answers": len(ways), **means(apart),
    }  # fmt: skip
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def replay(llm: LLM, name: str, sound: Sound, how: How) -> tuple[list[Distance], dict[int, list[int]]]:
    """(distances along the kept answers, {item: tokens up to and with the first of its own} for other answers)."""
    from tqdm import tqdm

    chosen = [i for i, answer in enumerate(sound.answers) if answer]
    found = forced_logits(
        llm.launched.built.model, [(sound.asked[i].prompt, sound.answers[i]) for i in chosen], budget(llm)
    )
    apart, ways = list[Distance](), dict[int, list[int]]()
    show = how.progress and sys.stderr.isatty()
    for i, logits_AV in tqdm(zip(chosen, found, strict=True), name, len(chosen), unit="answer", disable=not show):
        if i in sound.logits:
            apart.append(distance(sound.logits[i], logits_AV, sound.answers[i]))
        own, given = logits_AV.argmax(-1).tolist(), sound.answers[i]
        if own != given:
            ways[i] = own[: 1 + next(k for k, (a, b) in enumerate(zip(own, given, strict=True)) if a != b)]
    return apart, ways


def go_on(llm: LLM, sound: Sound, ways: Mapping[int, list[int]], how: How) -> dict[int, str]:
    """The whole answers of those that went their own way."""
    ends, texts = llm.engine.eos_token_ids, dict[int, str]()
    open_ways = {i: tokens for i, tokens in ways.items() if tokens[-1] not in ends and room(llm, sound, i, tokens, how)}
    prompts = [[*sound.asked[i].prompt, *tokens] for i, tokens in open_ways.items()]
    limits = [room(llm, sound, i, tokens, how) for i, tokens in open_ways.items()]
    params = [SamplingParams(temperature=0, max_tokens=limit, stop=how.stop) for limit in limits]
    more = dict(zip(open_ways, llm.generate(prompts, params) if prompts else [], strict=True))
    for i, tokens in ways.items():
        whole = tokens + (more[i].tokens if i in more else [])
        text = llm.tokenizer.decode(whole[:-1] if whole[-1] in ends else whole)
        for stop in how.stop:
            text = text.partition(stop)[0]
        texts[i] = text
    return texts


def room(llm: LLM, sound: Sound, item: int, tokens: Sequence[int], how: How) -> int:
    """How many tokens may follow."""
    used = len(sound.asked[item].prompt) + len(tokens)
    return max(0, min(how.patience(sound.answers[item]) - len(tokens), llm.max_model_len - used))


def budget(llm: LLM) -> int:
    """Tokens of a pass: those of the engine's own prefill steps."""
    return llm.config.max_num_batched_tokens


def scores(asked: Sequence[Asked], right: Sequence[bool]) -> Row:
    total = Score("all", sum(right), len(right))
    families = {each.name: 0 for each in asked}
    for each, ok in zip(asked, right, strict=True):
        families[each.name] += ok
    return {
        "right": total.right, "count": total.count, "accuracy": total.accuracy, "accuracy_interval": total.interval,
        "families": families,
    }  # fmt: skip


def weights(model: Decoder) -> Row:
    """What the routed experts and the other projections are held in, and the bytes of all weights and of the experts.

    Draft layers count. What is not quantised counts as the checkpoint stores it, in whatever dtype the model computes.
    """
    plain = 4 if model.spec.checkpoint_dtype == "float32" else 2
    blocks = [*model.blocks, *(draft.block for draft in model.drafts)]
    experts = [item for block in blocks if isinstance(block.mlp, MoELayer) for item in block.mlp.experts.sources()]
    routed = {item.name for item in experts if isinstance(item, Stored)}
    every = list(model.sources())
    others = [item for item in every if isinstance(item, Stored) and item.name not in routed]
    return {
        "experts": held(experts), "others": held(others),
        "bytes": nbytes(every, plain), "expert_bytes": nbytes(experts, plain),
    }  # fmt: skip


def held(items: Iterable[Item]) -> str:
    """`format x encoding` of those that are quantised (the encoding where there is one); `bf16` where none is."""
    found = []
    for item in items:
        if isinstance(item, Stored) and item.weight.form.name != "bf16":
            how = item.part.runs.activation
            found.append(str(item.weight.form) + (f" x {how}" if how.name != "bf16" else ""))
    return ", ".join(dict.fromkeys(found)) or "bf16"


def nbytes(items: Iterable[Item], plain: int) -> int:
    total = 0
    for item in items:
        if isinstance(item, Stored) and item.weight.form.name != "bf16":
            total += item.weight.nbytes
        else:
            total += plain * (item.weight.plain if isinstance(item, Stored) else item[1]).numel()
    return total
