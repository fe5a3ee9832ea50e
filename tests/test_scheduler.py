"""The scheduler: scenarios worked by hand, with blocks of 4 tokens unless stated."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from moesaic.engine.blocks import BlockManager
from moesaic.engine.params import SamplingParams
from moesaic.engine.request import FinishReason, Request, Status
from moesaic.engine.scheduler import Scheduler, SchedulerConfig, Step
from moesaic.errors import OptionError, RequestError

EOS = 99


def make(
    num_blocks: int = 101,
    *,
    seqs: int = 8,
    budget: int = 64,
    length: int = 64,
    chunk: int | None = None,
    prefix_cache: bool = True,
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=length, chunk_size=chunk
    )
    return Scheduler(config, BlockManager(num_blocks, 4, prefix_cache))


def request(name: str, prompt: int | list[int], **params: object) -> Request:
    """A request whose prompt is given, or has so many tokens that no other request shares."""
    tokens = prompt if isinstance(prompt, list) else [1000 * ord(name) + i for i in range(prompt)]
    return Request(name, tokens, SamplingParams(**params), frozenset([EOS]))  # type: ignore[arg-type]


def added(scheduler: Scheduler, *requests: Request) -> tuple[Request, ...]:
    for each in requests:
        scheduler.add(each)
    return requests


def shape(step: Step | None) -> list[tuple[str, int, int, bool]]:
    assert step is not None
    assert step.tokens == sum(chunk.count for chunk in step.chunks)
    return [(chunk.request.id, chunk.start, chunk.count, chunk.sample) for chunk in step.chunks]


def advance(scheduler: Scheduler, token: int = 7) -> tuple[list[tuple[str, int, int, bool]], list[Request]]:
    """Schedule, pretend to run, commit the same token for everybody; (shape of the step, who ended)."""
    step = scheduler.schedule()
    scheduler.check()
    assert step is not None
    finished = scheduler.commit(step, [token for chunk in step.chunks if chunk.sample])
    scheduler.check()
    return shape(step), finished


def ids(requests: Iterable[Request]) -> list[str]:
    return [each.id for each in requests]


def test_prefill_then_decode_until_max_tokens() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", 5, max_tokens=3))
    assert (scheduler.num_waiting, scheduler.num_running) == (1, 0)
    assert advance(scheduler) == ([("a", 0, 5, True)], [])
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    assert advance(scheduler) == ([("a", 5, 1, True)], [])
    assert advance(scheduler) == ([("a", 6, 1, True)], [a])
    assert (a.output, a.finish_reason, a.stop_reason, a.status) == ([7, 7, 7], "length", None, Status.FINISHED)
    assert not scheduler.has_work
    assert scheduler.schedule() is None
    assert scheduler.blocks.available == 100


def test_a_step_is_decode_iff_every_chunk_is_a_newly_generated_token() -> None:
    scheduler = make()
    added(scheduler, request("a", 1))
    steps = []
    for name in (None, "b", None):
        if name:
            added(scheduler, request(name, 1))
        step = scheduler.schedule()
        assert step is not None
        steps.append((step.decode, len(step.chunks)))
        scheduler.commit(step, [7] * len(step.chunks))
    assert steps == [(False, 1), (False, 2), (True, 2)]


def test_decodes_come_first_and_the_budget_cuts_the_prompt_into_chunks() -> None:
    scheduler = make(budget=6)
    added(scheduler, request("a", 3), request("b", 11), request("c", 2))
    assert advance(scheduler)[0] == [("a", 0, 3, True), ("b", 0, 3, False)]
    assert advance(scheduler)[0] == [("a", 3, 1, True), ("b", 3, 5, False)]
    assert advance(scheduler)[0] == [("a", 4, 1, True), ("b", 8, 3, True), ("c", 0, 2, True)]
    assert advance(scheduler)[0] == [("a", 5, 1, True), ("b", 11, 1, True), ("c", 2, 1, True)]


def test_no_more_than_max_num_seqs_run_at_once() -> None:
    scheduler = make(seqs=2)
    added(scheduler, *(request(name, 2, max_tokens=2) for name in "abc"))
    assert [entry[0] for entry in advance(scheduler)[0]] == ["a", "b"]
    assert ids(advance(scheduler)[1]) == ["a", "b"]
    assert [entry[0] for entry in advance(scheduler)[0]] == ["c"]


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [(None, [("b", 1, 1, True), ("a", 4, 1, False)]), (2, [("a", 4, 2, False)])],
)
def test_an_earlier_prefill_is_not_starved_by_later_decodes(
    chunk: int | None, expected: list[tuple[str, int, int, bool]]
) -> None:
    """a, the earliest, is in prefill while b and c decode with a budget of 2: a token, or a fixed chunk, is a's."""
    scheduler = make(budget=2, seqs=3, chunk=chunk)
    for each, computed in zip(
        added(scheduler, request("a", 12), request("b", 1), request("c", 1)), (4, 1, 1), strict=True
    ):
        scheduler._running.append(scheduler._waiting.pop(each.id))  # a state that takes a long story to reach
        each.status, each.computed = Status.RUNNING, computed
        each.blocks = scheduler.blocks.allocate(-(-len(each.tokens) // 4)) or []
        each.tokens += [7] if each.id != "a" else []
    scheduler.check()
    assert advance(scheduler)[0] == expected


def test_admission_leaves_headroom_so_that_nobody_is_preempted_soon() -> None:
    """5 blocks: a takes 2, b takes 1; c would need 1 of the 2 left, but a and b may each want one soon."""
    scheduler = make(6, prefix_cache=False)
    a, b, c = added(
        scheduler, request("a", 7, max_tokens=6), request("b", 4, max_tokens=4), request("c", 3, max_tokens=3)
    )
    assert advance(scheduler)[0] == [("a", 0, 7, True), ("b", 0, 4, True)]
    assert scheduler.blocks.available == 2
    assert advance(scheduler)[0] == [("a", 7, 1, True), ("b", 4, 1, True)]  # b takes one
    assert advance(scheduler)[0] == [("a", 8, 1, True), ("b", 5, 1, True)]  # and a the other
    assert scheduler.blocks.available == 0
    assert advance(scheduler)[1] == [b]
    assert advance(scheduler)[0] == [("a", 10, 1, True), ("c", 0, 3, True)]
    assert (len(a.blocks), len(c.blocks), scheduler.blocks.available) == (3, 1, 1)
    assert advance(scheduler)[1] == [a]
    assert advance(scheduler)[1] == [c]
    assert a.preemptions == b.preemptions == c.preemptions == 0


def test_preempted_request_returns_in_order_of_arrival_and_continues() -> None:
    """4 blocks; a and b have 4 prompt tokens and grow to 10 (3 blocks each): b must give way once."""
    scheduler = make(5, prefix_cache=False, seqs=2)
    a, b, c = added(scheduler, *(request(name, 4, max_tokens=6) for name in "abc"))
    advance(scheduler, 1)  # 2 of 4 blocks used
    for token in (2, 3, 4, 5):  # positions 4 to 7: the other 2
        advance(scheduler, token)
    assert scheduler.blocks.available == 0
    step = scheduler.schedule()  # a writes position 8
    assert step is not None
    assert (shape(step), ids(step.preempted)) == ([("a", 8, 1, True)], ["b"])
    assert (b.status, b.blocks, b.computed, b.output, b.preemptions) == (Status.WAITING, [], 0, [1, 2, 3, 4, 5], 1)
    assert list(scheduler._waiting) == ["b", "c"]
    assert ids(scheduler.commit(step, [6])) == ["a"]
    # b computes prompt and output again (3 blocks); c waits for its headroom
    assert advance(scheduler, 6) == ([("b", 0, 9, True)], [b])
    assert b.output == a.output == [1, 2, 3, 4, 5, 6]
    assert c.status is Status.WAITING
    while scheduler.has_work:
        advance(scheduler)
    assert scheduler.blocks.available == 4


def test_the_latest_gives_way_itself_when_it_is_the_one_in_need() -> None:
    """3 blocks; a and b have one each. Both write position 4 in step 3: a takes the last block, b has none."""
    scheduler = make(4, prefix_cache=False)
    a, b = added(scheduler, request("a", 3, max_tokens=3), request("b", 3, max_tokens=3))
    assert advance(scheduler)[0] == [("a", 0, 3, True), ("b", 0, 3, True)]
    assert advance(scheduler)[0] == [("a", 3, 1, True), ("b", 3, 1, True)]
    step = scheduler.schedule()
    assert step is not None
    assert (shape(step), step.preempted) == ([("a", 4, 1, True)], (b,))
    assert scheduler.commit(step, [7]) == [a]
    assert advance(scheduler) == ([("b", 0, 5, True)], [b])
    assert (a.preemptions, b.preemptions, b.output) == (0, 1, [7, 7, 7])


def test_prefix_hit_leaves_at_least_one_token_to_compute() -> None:
    scheduler = make()
    prompt = list(range(8))
    added(scheduler, request("a", prompt, max_tokens=1))
    advance(scheduler)
    (b,) = added(scheduler, request("b", prompt, max_tokens=1))
    assert advance(scheduler)[0] == [("b", 4, 4, True)]
    assert (b.cached_prompt_tokens, scheduler.blocks.hits) == (4, 4)
    (c,) = added(scheduler, request("c", [*prompt, 8], max_tokens=1))
    assert advance(scheduler)[0] == [("c", 8, 1, True)]
    assert c.cached_prompt_tokens == 8


def test_a_block_is_shared_also_when_the_chunk_ends_beyond_it() -> None:
    scheduler = make()
    added(scheduler, request("a", list(range(6)), max_tokens=1))
    advance(scheduler)
    added(scheduler, request("b", list(range(6)), max_tokens=1))
    assert advance(scheduler)[0] == [("b", 4, 2, True)]


def test_a_blocked_head_gets_in_when_a_prefill_publishes_what_it_begins_with() -> None:
    """5 blocks, 3 beside a's prompt: b needs 3 and one of headroom. Then a takes one more; but now b needs only 1."""
    scheduler = make(6)
    added(scheduler, request("a", list(range(8)), max_tokens=5), request("b", list(range(9)), max_tokens=1))
    assert advance(scheduler)[0] == [("a", 0, 8, True)]
    assert advance(scheduler)[0] == [("a", 8, 1, True), ("b", 8, 1, True)]


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", list(range(6)), max_tokens=3))
    while scheduler.has_work:
        advance(scheduler)
    (b,) = added(scheduler, request("b", [*a.tokens, 50], max_tokens=1))
    assert advance(scheduler)[0] == [("b", 8, 2, True)]
    assert b.cached_prompt_tokens == 8


def test_prompt_logprobs_compute_the_whole_prompt() -> None:
    scheduler = make()
    added(scheduler, request("a", list(range(9)), max_tokens=1))
    advance(scheduler)
    added(scheduler, request("b", list(range(9)), max_tokens=1, prompt_logprobs=0))
    assert advance(scheduler)[0] == [("b", 0, 9, True)]


def test_fixed_chunks_end_at_multiples_whatever_the_budget_and_the_prefix_hit() -> None:
    scheduler = make(budget=20, chunk=8)
    prompt = list(range(18))
    added(scheduler, request("a", prompt, max_tokens=2))
    assert advance(scheduler)[0] == [("a", 0, 8, False)]
    added(scheduler, request("b", prompt[:4] + [70] * 16, max_tokens=9))
    assert advance(scheduler)[0] == [("a", 8, 8, False), ("b", 4, 4, False)]
    assert advance(scheduler)[0] == [("a", 16, 2, True), ("b", 8, 8, False)]
    assert advance(scheduler)[0] == [("a", 18, 1, True), ("b", 16, 4, True)]


def test_a_fixed_chunk_is_never_cut_to_fit_the_budget() -> None:
    scheduler = make(budget=8, chunk=8)
    added(scheduler, request("a", 3, max_tokens=3), request("b", 9, max_tokens=1))
    assert advance(scheduler)[0] == [("a", 0, 3, True)]
    assert advance(scheduler)[0] == [("a", 3, 1, True)], "7 tokens are left: not enough for b's 8"
    assert advance(scheduler)[0] == [("a", 4, 1, True)]
    assert advance(scheduler)[0] == [("b", 0, 8, False)]


def test_with_fixed_chunks_the_earliest_prefill_has_its_chunk_before_later_decodes() -> None:
    """Steps of 9. a's chunks of 8 leave one token, which is b's; c gets in when a's last chunk is short."""
    scheduler = make(budget=9, chunk=8)
    added(scheduler, request("a", 17, max_tokens=2), request("b", 1, max_tokens=9), request("c", 1, max_tokens=9))
    assert advance(scheduler)[0] == [("a", 0, 8, False), ("b", 0, 1, True)]
    assert advance(scheduler)[0] == [("b", 1, 1, True), ("a", 8, 8, False)]
    assert advance(scheduler)[0] == [("b", 2, 1, True), ("a", 16, 1, True), ("c", 0, 1, True)]
    assert advance(scheduler)[0] == [("a", 17, 1, True), ("b", 3, 1, True), ("c", 1, 1, True)]


def test_nobody_is_admitted_past_a_running_prefill_that_the_budget_left_out() -> None:
    scheduler = make(budget=9, chunk=8)
    added(scheduler, request("a", 16), request("b", 9), request("c", 1))
    assert advance(scheduler)[0] == [("a", 0, 8, False)]  # b has its place, but only one token is left
    assert scheduler.num_running == 2
    assert advance(scheduler)[0] == [("a", 8, 8, True)], "c's only token would fit"
    assert advance(scheduler)[0] == [("a", 16, 1, True), ("b", 0, 8, False)]


@pytest.mark.parametrize(
    ("params", "token", "reason", "stop_reason"),
    [
        ({}, EOS, FinishReason.STOP, None),
        ({"stop_token_ids": (5,)}, 5, FinishReason.STOP, 5),
        ({"stop_token_ids": (EOS,)}, EOS, FinishReason.STOP, None),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, EOS, FinishReason.STOP, EOS),
        ({"ignore_eos": True}, EOS, None, None),
        ({"min_tokens": 2}, EOS, None, None),
        ({"min_tokens": 2, "stop_token_ids": (5,)}, 5, None, None),
        ({"min_tokens": 1}, EOS, FinishReason.STOP, None),
        ({"max_tokens": 1}, 5, FinishReason.LENGTH, None),
        ({"max_tokens": 1}, EOS, FinishReason.STOP, None),
        ({"max_tokens": 1, "ignore_eos": True}, EOS, FinishReason.LENGTH, None),
    ],
)
def test_how_the_first_token_ends_a_request(
    params: dict[str, object], token: int, reason: FinishReason | None, stop_reason: int | None
) -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", 3, **params))
    _, finished = advance(scheduler, token)
    assert (a.finish_reason, a.stop_reason) == (reason, stop_reason)
    assert finished == ([a] if reason else [])
    assert a.output == [token]


def test_max_tokens_left_out_means_up_to_the_model_or_the_cache() -> None:
    for scheduler, most in ((make(length=6), 6), (make(3, length=64), 8)):
        (a,) = added(scheduler, request("a", 5))
        while scheduler.has_work:
            advance(scheduler)
        assert len(a.tokens) == a.max_total == most
        assert a.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("num_blocks", "prompt", "params", "message"),
    [
        (101, 0, {}, r"prompt: the prompt has no tokens\. Send"),
        (101, 64, {}, r"the prompt has 64 tokens.*max_model_len\) of 64 tokens takes at most 63.*--max-model-len"),
        (4, 12, {}, r"the prompt has 12 tokens.*KV cache of 12 tokens takes at most 11.*--kv-memory"),
        (101, 60, {"max_tokens": 5}, r"60 prompt tokens and max_tokens 5 make 65.*at most 4.*--max-model-len"),
        (4, 8, {"max_tokens": 5}, r"8 prompt tokens and max_tokens 5 make 13.*at most 4.*--kv-memory"),
        (101, 60, {"min_tokens": 5}, r"min_tokens: 60 prompt tokens and min_tokens 5 make 65"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(
    num_blocks: int, prompt: int, params: dict[str, object], message: str
) -> None:
    scheduler = make(num_blocks)
    with pytest.raises(RequestError, match=message):
        scheduler.add(request("a", prompt, **params))
    assert not scheduler.has_work
    scheduler.check()


def test_what_fits_exactly_is_taken() -> None:
    for scheduler, prompt, tokens in ((make(), 60, 4), (make(), 63, None), (make(4), 11, 1), (make(4), 8, 4)):
        (a,) = added(scheduler, request("a", prompt, max_tokens=tokens))
        while scheduler.has_work:
            advance(scheduler)
        assert len(a.tokens) == prompt + (tokens or 1)


def test_a_live_id_is_refused_and_a_finished_one_is_free_again() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", 3))
    with pytest.raises(RequestError, match="'a' is already in use"):
        scheduler.add(request("a", 4))
    scheduler.abort("a")
    added(scheduler, request("a", 4))
    with pytest.raises(RequestError, match="already in use"):
        scheduler.add(a)


def test_abort_waiting_running_and_in_flight() -> None:
    scheduler = make(seqs=2)
    a, b, c = added(scheduler, *(request(name, 6) for name in "abc"))
    assert scheduler.abort("nobody") is None
    assert scheduler.abort("c") is c
    advance(scheduler)
    assert scheduler.abort("a") is a
    assert scheduler.abort("a") is None
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.abort("b") is b
    scheduler.check()
    assert scheduler.blocks.available == 100, "freed at once"
    added(scheduler, request("b", 2, max_tokens=1))  # the same id again, before the old one's step is committed
    assert scheduler.commit(step, [7]) == []
    assert (b.output, b.finish_reason, b.status) == ([7], FinishReason.ABORT, Status.FINISHED)
    assert advance(scheduler)[0] == [("b", 0, 2, True)]
    assert not scheduler.has_work


def test_finish_by_stop_string_also_on_the_last_token() -> None:
    scheduler = make()
    a, b = added(scheduler, request("a", 3), request("b", 3, max_tokens=1))
    _, finished = advance(scheduler)
    assert ids(finished) == ["b"]
    for each in (a, b):
        scheduler.finish(each, FinishReason.STOP, "###")
        assert (each.finish_reason, each.stop_reason, each.status) == ("stop", "###", Status.FINISHED)
    scheduler.check()
    assert not scheduler.has_work


def test_a_step_is_committed_once_with_the_right_number_of_tokens_or_discarded() -> None:
    scheduler = make()
    a, b = added(scheduler, request("a", 3), request("b", 3))
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(RuntimeError, match="commit or discard"):
        scheduler.schedule()
    with pytest.raises(ValueError, match="1 tokens for 2"):
        scheduler.commit(step, [7])
    scheduler.discard(step)
    scheduler.finish(b, FinishReason.ERROR)  # the runner blames b
    again = scheduler.schedule()
    assert shape(again) == [("a", 0, 3, True)]
    assert again is not None
    scheduler.commit(again, [7])
    for call in (lambda: scheduler.commit(again, [7]), lambda: scheduler.discard(step)):
        with pytest.raises(RuntimeError, match="not in flight"):
            call()
    assert a.output == [7]


def test_a_blocked_head_is_looked_up_again_only_when_there_is_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(6)
    lookups = 0
    original = scheduler.blocks.acquire

    def counting(tokens: list[int], limit: int, spare: int = 0) -> tuple[list[int], int] | None:
        nonlocal lookups
        lookups += 1
        return original(tokens, limit, spare)

    monkeypatch.setattr(scheduler.blocks, "acquire", counting)
    added(scheduler, request("a", 4, max_tokens=12), request("b", 16, max_tokens=1))
    while scheduler.num_running or scheduler.num_waiting == 2:
        advance(scheduler)
    assert lookups <= 3, "a once; b once beside a's prefill, and once after it"
    assert advance(scheduler)[0] == [("b", 0, 16, True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqs": 0}, "max_num_seqs: must be at least 1"),
        ({"budget": 0}, "max_num_batched_tokens: must be"),
        ({"length": -1}, "max_model_len: must be"),
        ({"chunk": 0}, "chunk_size: must be"),
        ({"budget": 7, "chunk": 8}, "a fixed chunk of 8 tokens does not fit a step of 7"),
    ],
)
def test_contradictory_limits_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(**options)  # type: ignore[arg-type]
