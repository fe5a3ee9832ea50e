"""StopChecker against a naive oracle, for every way of cutting the text."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.text.stops import StopChecker

letters = st.text("ab", max_size=20)
stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4).map(tuple)
chunks = st.lists(st.tuples(st.text("abc", max_size=6), st.booleans()), max_size=12)


def oracle(pieces, stop, include):
    """The whole text that may be shown, and the hit: at each end position, the longest stop string that ends there."""
    text, active = "", []
    for piece, on in pieces:
        text += piece
        active += [on] * len(piece)
    for end in range(1, len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended and active[end - 1]:
            hit = max(ended, key=len)
            return text[: end if include else end - len(hit)], hit
    return text, None


def run(pieces, stop, include):
    checker = StopChecker(stop, include)
    shown, hit = "", None
    for piece, on in pieces:
        emitted, found = checker.push(piece, on)
        assert hit is None or (emitted, found) == ("", hit), "nothing more comes after a hit"
        shown, hit = shown + emitted, found
    return shown + checker.flush(), hit


@given(pieces=chunks, stop=stops, include=st.booleans())
def test_equals_the_oracle(pieces, stop, include):
    assert run(pieces, stop, include) == oracle(pieces, stop, include)


@given(text=letters, cuts=st.lists(st.integers(0, 20)), stop=stops, include=st.booleans())
def test_cutting_the_text_does_not_matter(text, cuts, stop, include):
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [(text[a:b], True) for a, b in itertools.pairwise(edges)]
    assert run(pieces, stop, include) == run([(text, True)], stop, include)


@given(pieces=chunks, stop=stops)
def test_holds_back_exactly_the_longest_suffix_that_could_become_a_stop(pieces, stop):
    checker, text, shown = StopChecker(stop, False), "", ""
    for piece, on in pieces:
        emitted, hit = checker.push(piece, on)
        if hit:
            return
        text, shown = text + piece, shown + emitted
        partial = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
        assert len(text) - len(shown) == max(partial, default=0)


def test_including_the_stop_holds_nothing_back():
    checker = StopChecker(("abc",), include_stop=True)
    assert checker.push("xxab") == ("xxab", None)
    assert checker.push("cyy") == ("c", "abc")
    assert checker.flush() == ""


def test_the_stop_that_ends_first_wins():
    assert StopChecker(("abcd", "bc"), False).push("abcd") == ("a", "bc")
    assert StopChecker(("bc", "abc"), False).push("abc") == ("", "abc")


def test_a_stop_may_begin_before_min_tokens_and_end_after():
    checker = StopChecker(("END",), False)
    assert checker.push("one END two E", active=False) == ("one END two ", None)
    assert checker.push("ND three") == ("", "END")


def test_no_stops_pass_everything():
    checker = StopChecker((), False)
    assert checker.push("anything") == ("anything", None)
    assert checker.flush() == ""


def test_an_empty_stop_is_a_mistake():
    with pytest.raises(ValueError, match="empty"):
        StopChecker(("",), False)


def test_a_hostile_stop_string_costs_linear_time():
    checker = StopChecker(("a" * 100_000 + "b",), False)
    start = time.perf_counter()
    for _ in range(2000):
        checker.push("a" * 100)
    assert time.perf_counter() - start < 5.0
