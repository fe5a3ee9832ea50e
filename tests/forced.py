"""Engines held against `transformers` in FP32, by the log-probs of prompts and of the answers that an engine gave.

Two engines in BF16 do not agree to any number that could be named beforehand: each is as far from the exact model as
its roundings take it, and where two tokens are nearly tied, their answers part. So each is judged by itself, over its
own answers, and the one under test may be no farther from the oracle than one that is known to be right.

Letters: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.llm import Result
from tests.checkpoints import random_model, save
from tests.text_support import write_checkpoint

LEAST = 700
"""Positions of each kind that a verdict needs."""
FACTOR = 1.25
"""How much larger the mean error may be, and its root mean square.

Of n errors that are normal, the mean size has a relative standard error of 0.76 / sqrt(n), the RMS of 0.71 / sqrt(n),
and a ratio of two such sqrt(2) as much: at most 4.1% of `LEAST`. (Over 16 seeds of `test_forced.py` it was 2.8 to 3.4%:
engines share weights, prompts, and every kernel but one.) The limit is at 5 of these, so that roundings which are
allowed have room: `cpu`, which rounds scores and shares to BF16, is 7% behind the reference in decoding. An error
that is independent of rounding is seen once it is 3/4 as large.
"""
PEAKED = {"q_norm.weight": 3.0, "lm_head.weight": 3.0}
"""What is larger than in `randomise`, and by how much.

Queries: scores of order 1 weigh hundreds of positions alike, so that random values average to nothing and no fault of
attention shows; at 3, a few positions have most of the weight, as in trained models. The head: an answered token then
has a likelihood of about 1/3, where those of a vocabulary are otherwise nearly as likely as each other.
"""


@torch.no_grad()
def write_peaked(path: Path, model_type: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A checkpoint in BF16, and the oracle: the same numbers in FP32.

    Every expert should be chosen (`num_experts_per_tok`): rounding turns a choice that is nearly tied, and one token
    whose experts differ is as far off as hundreds that were rounded. Such a mean would have no sampling error to name.
    """
    model = random_model(model_type, seed, **config)
    for name, weight in model.named_parameters():
        gain = next((gain for end, gain in PEAKED.items() if name.endswith(end)), 1.0)
        weight.copy_((gain * weight).bfloat16())
    save(model, path, dtype=torch.bfloat16)
    write_checkpoint(path, "byte_level")
    return model


def draw_prompts(lengths: Sequence[int], vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


@dataclass(frozen=True)
class Judged:
    """Of the tokens of prompts, but their first, and of those answered: log-probs, less the oracle's.

    trails_T: how far each answered token is behind the oracle's best.
    """

    prompts_T: Tensor
    answers_T: Tensor
    trails_T: Tensor

    @property
    def worst(self) -> float:
        return torch.cat([self.prompts_T, self.answers_T]).abs().max().item()

    def __str__(self) -> str:
        parts = [f"{name} {size(each, 1):.5f} (RMS {size(each, 2):.5f}, {len(each)} tokens)" for name, each in
                 (("prompts", self.prompts_T), ("answers", self.answers_T))]  # fmt: skip
        behind = f"{int((self.trails_T > 0).sum())} tokens not the best, by at most {self.trails_T.max():.4f}"
        return f"{', '.join(parts)}, at most {self.worst:.4f}; {behind}"


@torch.inference_mode()
def judge(oracle: PreTrainedModel, results: Sequence[Result]) -> Judged:
    """Of greedy results with `logprobs` and `prompt_logprobs`."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for result in results:
        assert result.prompt_logprobs is not None
        entries = [*result.prompt_logprobs[1:], *result.completions[0].logprobs]
        tokens_T = torch.tensor(result.prompt_tokens + result.tokens)
        scores_TV = oracle(tokens_T[None, :-1], use_cache=False).logits[0].double().log_softmax(-1)
        exact_T = scores_TV.gather(1, tokens_T[1:, None])[:, 0]
        assert [entry.token for entry in entries if entry] == tokens_T[1:].tolist()
        error_T = torch.tensor([entry.logprob for entry in entries if entry], dtype=torch.float64) - exact_T
        first = len(result.prompt_tokens) - 1
        found.append((error_T[:first], error_T[first:], (scores_TV.amax(1) - exact_T)[first:]))
    return Judged(*(torch.cat(part) for part in zip(*found, strict=True)))


def size(error_T: Tensor, power: int) -> float:
    """The mean size of errors (power 1), or their root mean square (2)."""
    return error_T.abs().pow(power).mean().item() ** (1 / power)


def hold(theirs: Judged, ours: Judged) -> None:
    """Asserts that one engine is as near to the oracle as another one that is known to be right.

    A greedy token that is not the oracle's best has an error of its own and one of the best's to thank for it: it may
    trail by two errors, as large as the largest of ours.
    """
    kinds = {"prompts": (theirs.prompts_T, ours.prompts_T), "answers": (theirs.answers_T, ours.answers_T)}
    for kind, pair in kinds.items():
        assert min(map(len, pair)) >= LEAST, f"{kind}: too few tokens to tell"
        for power, name in ((1, "mean"), (2, "RMS")):
            mine, own = (size(each, power) for each in pair)
            assert mine <= FACTOR * own, f"{kind}: errors of {mine:.5f} ({name}), of ours {own:.5f}"
    trail = theirs.trails_T.max().item()
    assert trail <= 2 * ours.worst, f"a token {trail:.4f} behind the best; errors of ours are at most {ours.worst:.4f}"
