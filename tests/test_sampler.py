"""The sampler against transformers' logits processors, a naive FP64 twin, published random numbers and statistics."""

from __future__ import annotations

import math
from array import array
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moesaic.engine import draw as draw_module
from moesaic.engine.noise import exponentials, row_key, uniforms, words
from moesaic.engine.params import SamplingParams
from moesaic.engine.processors import process
from moesaic.engine.ranking import best, order_keys
from moesaic.engine.rows import Row, upload_words
from moesaic.engine.sampler import Sampled, prompt_logprobs, sample, validate
from moesaic.errors import RequestError

GREEDY = SamplingParams(temperature=0.0)
MASK64 = (1 << 64) - 1


def row(
    params: SamplingParams,
    output: list[int] | None = None,
    *,
    seed: int = 0,
    prompt: list[int] | None = None,
    eos: frozenset[int] = frozenset(),
) -> Row:
    return Row(params, prompt or [], output or [], seed, eos)


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def history(vocab: int, length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


# ------------------------------------------------------------------------------ a naive FP64 twin


def naive_process(raw: np.ndarray, r: Row) -> np.ndarray:
    p, x = r.params, raw.astype(np.float64).copy()
    counts = Counter(r.output)
    for token in range(len(x)):
        x[token] += p.logit_bias.get(token, 0.0)
        if token in set(r.prompt) | set(r.output):
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        if counts[token]:
            x[token] -= p.presence_penalty + p.frequency_penalty * counts[token]
    ends = set(p.stop_token_ids) | (set() if p.ignore_eos else set(r.eos))
    if len(r.output) < p.min_tokens and any(x[t] > -np.inf for t in range(len(x)) if t not in ends):
        for token in ends:
            x[token] = -np.inf
    return x


def naive_support(x: np.ndarray, p: SamplingParams) -> dict[int, float]:
    """Token -> probability, of the distribution that is drawn from."""
    order = sorted(range(len(x)), key=lambda t: (-x[t], t))
    if p.top_k:
        order = order[: p.top_k]
    weights = {t: math.exp((x[t] - x[order[0]]) / p.temperature) for t in order}
    total, mass, kept = sum(weights.values()), 0.0, []
    for token in order:
        if p.top_p < 1 and mass >= p.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    kept = [t for t in kept if weights[t] >= p.min_p]
    total = sum(weights[t] for t in kept)
    return {t: weights[t] / total for t in kept}


def naive_noise(seed: int, position: int, token: int) -> float:
    """The unit exponential, by SplitMix64 in Python integers, as the module's docstring defines it."""

    def nth(state: int, n: int) -> int:
        z = (state + (n + 1) * 0x9E3779B97F4A7C15) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        return z ^ (z >> 31)

    word = nth(nth(nth(seed, 0), position), token)
    return -math.log(((word >> 12) + 0.5) / 2**52)


def naive_sample(raw: np.ndarray, r: Row) -> int:
    x = naive_process(raw, r).astype(np.float32)
    if r.params.greedy:
        return int(np.argmax(x))
    support = naive_support(x.astype(np.float64), r.params)
    return max(support, key=lambda t: support[t] / naive_noise(r.seed, len(r.output), t))


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 7, 1000]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.93]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.1, -0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    logit_bias=st.dictionaries(st.integers(0, 36), st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 36), max_size=2).map(tuple),
    min_tokens=st.sampled_from([0, 3]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 3]),
)
row_strategy = st.builds(
    Row,
    params_strategy,
    st.lists(st.integers(0, 36), max_size=6),
    st.lists(st.integers(0, 36), max_size=6),
    st.integers(0, 2**63 - 1),
    st.frozensets(st.integers(0, 36), max_size=2),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(row_strategy, min_size=1, max_size=5), st.integers(0, 2**31))
def test_any_batch_matches_the_naive_twin_row_by_row(rows: list[Row], seed: int) -> None:
    raw = logits(len(rows), 37, seed)
    got = sample(raw.clone(), rows, count_near_ties=True)
    assert got.tokens == [naive_sample(raw[i].numpy(), r) for i, r in enumerate(rows)]
    assert got.failed == []
    for i, r in enumerate(rows):
        alone = sample(raw[i : i + 1].clone(), [r], count_near_ties=True)
        assert (alone.tokens[0], alone.logprobs[0], alone.near_tie[0]) == (
            got.tokens[i], got.logprobs[i], got.near_tie[i])  # fmt: skip


# ------------------------------------------------------------------------------ processors


def test_repetition_penalty_matches_transformers() -> None:
    raw, ids = logits(3, 50), [history(50, 9, s) for s in range(3)]
    for penalty in (1.3, 0.6):
        got = raw.clone()
        process(got, [row(SamplingParams(repetition_penalty=penalty), o[4:], prompt=o[:4]) for o in ids])
        want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), raw.clone())
        torch.testing.assert_close(got, want, rtol=2e-7, atol=0)


def test_processors_match_the_formulas_and_leave_other_rows_untouched() -> None:
    raw = logits(5, 40)
    rows = [
        row(GREEDY, [1, 1], prompt=[2]),
        row(SamplingParams(presence_penalty=0.5), [3, 3, 4], prompt=[7]),
        row(SamplingParams(frequency_penalty=0.25, repetition_penalty=1.5), [3, 3, 3, 4], prompt=[7, 3]),
        row(SamplingParams(logit_bias={0: 5.0, 39: -100.0}, presence_penalty=-2.0), [0]),
        row(SamplingParams(min_tokens=2, stop_token_ids=(5,)), [6], eos=frozenset({8})),
    ]
    got = raw.clone()
    process(got, rows)
    assert torch.equal(got[0], raw[0])
    for i, r in enumerate(rows):
        np.testing.assert_array_equal(got[i].numpy(), naive_process(raw[i].numpy(), r).astype(np.float32))
    assert (got[4] == -math.inf).nonzero().flatten().tolist() == [5, 8]


def test_histories_may_be_arrays_and_hold_ids_outside_the_vocabulary() -> None:
    raw = logits(1, 10)
    p = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0)
    got, want = raw.clone(), raw.clone()
    process(got, [Row(p, array("q", [3, 10, -1]), array("q", [4, 99999]), 0)])
    process(want, [row(p, [4], prompt=[3])])
    assert torch.equal(got, want)


@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 1e300])
def test_extreme_penalties_stay_finite(penalty: float) -> None:
    raw = torch.tensor([[5.0, -5.0, 0.0, -math.inf]])
    process(raw, [row(SamplingParams(repetition_penalty=penalty), [0, 1, 2, 3])])
    assert raw[0, :3].isfinite().all()
    assert raw[0, 3] == -math.inf


def test_min_tokens_masks_ends_until_reached_unless_nothing_else_is_possible() -> None:
    p = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1,))
    raw = torch.tensor([[9.0, 8.0, 1.0]])
    eos = frozenset({0})
    assert sample(raw.clone(), [row(p, [2], eos=eos)]).tokens == [2]
    assert sample(raw.clone(), [row(p, [2, 2], eos=eos)]).tokens == [0]
    only_ends = torch.tensor([[9.0, 8.0, -math.inf], [9.0, 8.0, 1.0]])
    assert sample(only_ends, [row(p, eos=eos), row(p, eos=eos)]).tokens == [0, 2]
    ignoring = SamplingParams(temperature=0.0, min_tokens=2, ignore_eos=True)
    assert sample(raw.clone(), [row(ignoring, eos=eos)]).tokens == [0]


# ------------------------------------------------------------------------------ truncation


def support(raw: torch.Tensor, p: SamplingParams, draws: int = 2000) -> set[int]:
    """Every token drawn in many draws of one row."""
    return set(sample(raw.expand(draws, -1).clone(), [row(p, seed=s) for s in range(draws)]).tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 1.7, "top_p": 0.8}, {"top_k": 5, "top_p": 0.8},
        {"top_k": 6, "top_p": 0.95, "min_p": 0.1, "temperature": 0.8},
    ],
)  # fmt: skip
def test_support_is_that_of_transformers_warpers(options: dict[str, float]) -> None:
    raw = logits(1, 12, seed=5, scale=1.0)
    p = SamplingParams(**options)  # type: ignore[arg-type]
    scores = TemperatureLogitsWarper(p.temperature)(None, raw.clone()) if p.temperature != 1 else raw.clone()
    for used, warper in ((p.top_k, TopKLogitsWarper), (p.top_p < 1, TopPLogitsWarper), (p.min_p, MinPLogitsWarper)):
        if used:
            scores = warper({TopKLogitsWarper: p.top_k, TopPLogitsWarper: p.top_p, MinPLogitsWarper: p.min_p}[warper])(
                None, scores)  # fmt: skip
    assert support(raw, p) == set((scores[0] > -math.inf).nonzero().flatten().tolist())


def test_top_p_keeps_the_shortest_prefix_and_at_least_one() -> None:
    raw = torch.zeros(1, 4)  # a quarter each, exactly
    assert support(raw, SamplingParams(top_p=0.5)) == {0, 1}
    assert support(raw, SamplingParams(top_p=0.5000001)) == {0, 1, 2}
    assert support(raw, SamplingParams(top_p=1e-300)) == {0}


def test_ties_are_broken_by_the_lower_id_exactly() -> None:
    raw = torch.full((1, 5000), 1.5)
    raw[0, [4000, 17, 333]] = 2.0
    raw[0, 17] = -0.0
    assert sample(raw.clone(), [row(GREEDY)]).tokens == [333]
    assert support(raw, SamplingParams(top_k=3), 200) == {333, 4000, 0}
    assert sample(raw.clone(), [row(SamplingParams(top_k=1))]).tokens == [333]
    zeros = torch.tensor([[-1.0, -0.0, 0.0]])
    assert best(order_keys(zeros), 3).tolist() == [[1, 2, 0]]


def test_order_keys_sort_like_floats() -> None:
    values = [math.inf, 3e38, 1.0, 1e-45, 0.0, -1e-45, -1.0, -3e38, -math.inf]
    shuffled = torch.tensor([values])[:, torch.randperm(9, generator=torch.Generator().manual_seed(1))]
    assert shuffled.gather(1, best(order_keys(shuffled), 9)).tolist() == torch.tensor([values]).tolist()


def test_a_nucleus_larger_than_the_first_candidates_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = logits(6, 300, scale=0.5)
    rows = [row(SamplingParams(top_p=0.1 + 0.15 * i), seed=i) for i in range(6)]
    wide = sample(raw.clone(), rows)  # 300 < NARROW: every token is a candidate
    monkeypatch.setattr(draw_module, "NARROW", 20)
    assert sample(raw.clone(), rows) == wide
    rows[0] = row(SamplingParams(top_k=250, top_p=0.9), seed=4)
    assert sample(raw.clone(), rows).tokens[1:] == wide.tokens[1:]
    assert sample(raw.clone(), rows).tokens[0] == naive_sample(raw[0].numpy(), rows[0])


# ------------------------------------------------------------------------------ randomness


def test_words_are_splitmix64() -> None:
    """The published first outputs of SplitMix64 seeded with 1234567 and with 0 (Rosetta Code; Vigna's C source)."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    got = words(upload_words([1234567, 0], torch.device("cpu")), torch.arange(5))
    assert [w % 2**64 for w in got[0].tolist()] == want
    assert got[1, 0].item() % 2**64 == 0xE220A8397B1DCDAF


def test_noise_equals_its_definition_in_python_integers() -> None:
    cases = [(0, 0), (2**63 - 1, 4095), (-5, 1), (2**64 + 3, 7)]
    keys = upload_words([row_key(s, p) for s, p in cases], torch.device("cpu"))
    got = exponentials(keys, torch.tensor([0, 1, 151935]))
    want = [[naive_noise(s & MASK64, p, t) for t in (0, 1, 151935)] for s, p in cases]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-15, atol=1e-16)


def chi_square_z(observed: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square as a standard normal (Wilson and Hilferty, 1931)."""
    df = len(observed) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def kolmogorov(values: np.ndarray) -> float:
    """sqrt(n) times the largest distance to the uniform distribution function; 1.95 is the 0.1% point."""
    values, n = np.sort(values), len(values)
    upper, lower = np.arange(1, n + 1) / n - values, values - np.arange(n) / n
    return math.sqrt(n) * float(max(upper.max(), lower.max()))


def along_each_axis(axis: str) -> np.ndarray:
    """2^16 uniforms along consecutive tokens, positions or seeds."""
    n = 1 << 16
    keys = {"token": [row_key(1, 1)], "position": [row_key(1, i) for i in range(n)],
            "seed": [row_key(i, 1) for i in range(n)]}[axis]  # fmt: skip
    tokens = torch.arange(n) if axis == "token" else torch.tensor([3])
    return uniforms(upload_words(keys, torch.device("cpu")), tokens).flatten().numpy()


@pytest.mark.parametrize("axis", ["token", "position", "seed"])
def test_uniforms_are_uniform_and_neighbours_independent(axis: str) -> None:
    u = along_each_axis(axis)
    assert u.min() > 0
    assert u.max() < 1
    cells = np.bincount((u * 1024).astype(int), minlength=1024)
    pairs = np.bincount((u[:-1] * 32).astype(int) * 32 + (u[1:] * 32).astype(int), minlength=1024)
    low_bits = np.bincount((u * 2**40).astype(np.int64) & 1023, minlength=1024)
    for observed in (cells, pairs, low_bits):
        assert abs(chi_square_z(observed, np.full(1024, observed.sum() / 1024))) < 3.9
    assert kolmogorov(u) < 1.95


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.9}, {"top_k": 7, "min_p": 0.05}])
@pytest.mark.parametrize("by", ["seed", "position"])
def test_draws_follow_the_distribution(options: dict[str, float], by: str) -> None:
    raw, n = logits(1, 20, seed=3, scale=1.2), 20_000
    p = SamplingParams(**options)  # type: ignore[arg-type]
    output = np.zeros(n, dtype=np.int64)
    rows = [Row(p, (), output[:i] if by == "position" else (), i if by == "seed" else 9) for i in range(n)]
    tokens = sample(raw.expand(n, -1).clone(), rows).tokens
    want = naive_support(raw[0].double().numpy(), p)
    observed = np.array([tokens.count(t) for t in want])
    assert observed.sum() == n
    assert abs(chi_square_z(observed, np.array([n * q for q in want.values()]))) < 3.9


def test_a_row_is_the_same_alone_reordered_and_amid_others() -> None:
    """A vocabulary large enough for chunks, narrow and wide draws; rows of every strategy."""
    kinds = [
        {"temperature": 0.0}, {}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 0.99, "temperature": 4.0}, {"min_p": 0.1},
        {"top_k": 2000, "top_p": 0.8}, {"top_k": 1}, {"temperature": 0.0, "frequency_penalty": 1.0, "logprobs": 4},
        {"repetition_penalty": 1.2, "logprobs": 0}, {"logit_bias": {3: 100.0}, "min_tokens": 9},
    ]  # fmt: skip
    rows = [
        row(SamplingParams(**k), history(30_000, 5, i), seed=i, prompt=history(30_000, 8, i + 99))  # type: ignore[arg-type]
        for i, k in enumerate(kinds)
    ]
    raw = logits(len(rows), 30_000)
    together = sample(raw.clone(), rows, count_near_ties=True)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    reordered = sample(raw[order], [rows[i] for i in order], count_near_ties=True)
    for place, i in enumerate(order):
        alone = sample(raw[i : i + 1].clone(), [rows[i]], count_near_ties=True)
        for got in (alone, 0), (reordered, place):
            assert entry(*got) == entry(together, i)


def entry(sampled: Sampled, i: int) -> tuple[object, ...]:
    return sampled.tokens[i], sampled.logprobs[i], sampled.near_tie[i]


def test_seed_and_position_each_change_the_draw() -> None:
    raw, p = torch.zeros(1, 1000), SamplingParams()
    by_seed = {sample(raw.clone(), [row(p, seed=s)]).tokens[0] for s in range(20)}
    by_position = {sample(raw.clone(), [row(p, [0] * n)]).tokens[0] for n in range(20)}
    assert min(len(by_seed), len(by_position)) > 15


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    raw = torch.cat([logits(20, 50), torch.tensor([[3e38] + [-3e38] * 49])])
    rows = [row(SamplingParams(temperature=temperature, top_p=0.9 if i % 2 else 1.0), seed=i) for i in range(21)]
    got = sample(raw.clone(), rows)
    assert got.tokens == raw.argmax(dim=1).tolist()


def test_an_enormous_temperature_is_uniform_over_possible_tokens() -> None:
    raw = torch.tensor([[30.0, -30.0, -math.inf, 0.0]])
    assert support(raw, SamplingParams(temperature=1e300), 500) == {0, 1, 3}


# ------------------------------------------------------------------------------ log-probs, ties, faults


def test_logprobs_are_of_the_raw_logits() -> None:
    raw = logits(4, 60)
    p = SamplingParams(temperature=0.0, logprobs=5, logit_bias={7: 100.0}, repetition_penalty=1.9)
    got = sample(raw.clone(), [row(p, [1, 2], prompt=[3])] * 4)
    want = torch.log_softmax(raw.double(), dim=1)
    assert got.tokens == [7] * 4
    for i, found in enumerate(got.logprobs):
        assert found is not None
        assert found.token == 7
        assert found.logprob == pytest.approx(want[i, 7].item(), rel=1e-7)
        assert found.rank == 1 + int((raw[i] > raw[i, 7]).sum())
        values, ids = want[i].topk(5)
        assert [t for t, _ in found.top] == ids.tolist()
        assert [v for _, v in found.top] == pytest.approx(values.tolist(), rel=1e-7)


def test_prompt_logprobs_ranks_and_ties() -> None:
    raw = torch.tensor([[1.0, 2.0, 2.0, 0.0]] * 4)
    found = prompt_logprobs(raw, torch.arange(4), 3)
    assert [f.rank for f in found] == [3, 1, 2, 4]
    assert [t for t, _ in found[0].top] == [1, 2, 0]
    assert all(f.top[f.rank - 1] == (f.token, f.logprob) for f in found[:3])
    assert prompt_logprobs(raw, torch.arange(4), 0)[2].top == ()
    assert len(prompt_logprobs(raw, torch.arange(4), 20)[0].top) == 4
    assert prompt_logprobs(raw[:0], torch.arange(0), 3) == []


def test_prompt_logprobs_do_not_depend_on_the_batch() -> None:
    raw, targets = logits(9, 40_000), torch.arange(9) * 4000
    whole = prompt_logprobs(raw, targets, 6)
    assert whole == [prompt_logprobs(raw[i : i + 1], targets[i : i + 1], 6)[0] for i in range(9)]
    want = torch.log_softmax(raw.double(), dim=1).gather(1, targets[:, None]).flatten()
    assert [f.logprob for f in whole] == pytest.approx(want.tolist(), rel=1e-7)


def test_near_ties_of_greedy_rows() -> None:
    raw = torch.tensor([[1.0, 1.01, 0.0], [1.0, 1.03, 0.0], [5.0, 5.0, 1.0], [1.0, -math.inf, -math.inf]])
    got = sample(raw.clone(), [row(GREEDY)] * 4, count_near_ties=True)
    assert (got.tokens, got.near_tie) == ([1, 1, 0, 0], [True, False, True, False])
    assert sample(raw.clone(), [row(GREEDY)] * 4).near_tie == [False] * 4
    assert sample(torch.zeros(1, 1), [row(GREEDY)], count_near_ties=True).near_tie == [False]


def test_near_ties_of_sampled_rows_are_those_a_small_change_of_logits_can_flip() -> None:
    raw, n, t = logits(1, 30, scale=0.5), 1500, 0.7
    rows = [row(SamplingParams(temperature=t), seed=s) for s in range(n)]
    got = sample(raw.expand(n, -1).clone(), rows, count_near_ties=True)
    noise = np.array([[naive_noise(s, 0, i) for i in range(30)] for s in range(n)])
    keys = np.sort(raw.numpy().astype(np.float64) - t * np.log(noise), axis=1)
    assert got.near_tie == (keys[:, -1] - keys[:, -2] < 0.02).tolist()
    assert 5 < sum(got.near_tie) < 100


def test_bad_rows_fail_alone() -> None:
    good, rows = logits(1, 40), []
    bad = [[math.nan] * 40, [-math.inf] * 40, [0.0] * 39 + [math.nan], [math.inf] + [0.0] * 39]
    raw = torch.cat([row_ for b in bad for row_ in (torch.tensor([b]), good)])
    for options in (
        {"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0, "logprobs": 2},
        {"repetition_penalty": 1.5, "logit_bias": {39: 1.0, 0: 1.0}}, {"frequency_penalty": 1.0, "logprobs": 1},
        {"min_tokens": 5, "stop_token_ids": (39, 0)},
    ):  # fmt: skip
        rows = [row(SamplingParams(**options), [39, 0, 1])] * 8  # type: ignore[arg-type]
        got = sample(raw.clone(), rows, count_near_ties=True)
        assert got.failed == [0, 2, 4, 6]
        assert got.tokens[::2] == [-1] * 4
        assert got.logprobs[::2] == [None] * 4
        assert got.near_tie[::2] == [False] * 4
        want = entry(sample(good.clone(), rows[:1], count_near_ties=True), 0)
        assert [entry(got, i) for i in (1, 3, 5, 7)] == [want] * 4


def test_wrong_shapes_and_empty_batches() -> None:
    assert sample(torch.zeros(0, 5), []) == Sampled([], [], [], [])
    for wrong in (torch.zeros(2, 5), torch.zeros(5), torch.zeros(1, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="logits must be FP32"):
            sample(wrong, [row(GREEDY)])


@pytest.mark.parametrize("options", [{"logit_bias": {100: 1.0}}, {"logit_bias": {-1: 1.0}}, {"stop_token_ids": [100]}])
def test_validate_refuses_ids_outside_the_vocabulary(options: dict[str, object]) -> None:
    params = SamplingParams(**options)  # type: ignore[arg-type]
    validate(params, 101) if -1 not in params.logit_bias else None
    with pytest.raises(RequestError, match=next(iter(options))):
        validate(params, 100)
