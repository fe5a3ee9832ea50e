"""IncrementalDetokenizer against decoding everything at once."""

from __future__ import annotations

import functools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.text.detokenize import IncrementalDetokenizer
from moesaic.text.tokenizer import Tokenizer
from tests.text_support import KINDS, PLAIN, SPECIALS, real_tokenizer, write_checkpoint

VOCABULARY = 740  # a little more than the tokenizers have: unknown ids are passed over


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return Tokenizer.from_directory(write_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def main_tokenizer(request, tmp_path_factory):
    return Tokenizer.from_directory(write_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


def stream(tokenizer, ids, cuts=(), skip=True, prompt=None):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    edges = sorted({0, len(ids), *(min(cut, len(ids)) for cut in cuts)}) if cuts else range(len(ids) + 1)
    pieces = [detokenizer.push(ids[a:b]) for a, b in zip(edges, list(edges)[1:], strict=False)]
    return "".join(pieces) + detokenizer.finish()


def byte_ids(tokenizer):
    return [i for i in range(VOCABULARY) if len(tokenizer.token_bytes(i)) == 1]


@functools.cache
def id_lists(tokenizer):
    """Lists of any ids, with so many single bytes and special tokens that broken UTF-8 is common."""
    pool = [*range(VOCABULARY), *byte_ids(tokenizer) * 3, *list(range(len(SPECIALS))) * 30]
    return st.lists(st.sampled_from(pool), max_size=25)


@given(data=st.data(), cuts=st.lists(st.integers(0, 25), max_size=4), skip=st.booleans())
@settings(max_examples=150)
def test_pieces_add_up_to_the_whole(tokenizer, data, cuts, skip):
    ids = data.draw(id_lists(tokenizer))
    assert stream(tokenizer, ids, cuts, skip) == tokenizer.decode(ids, skip)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_real_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert stream(tokenizer, ids) == tokenizer.decode(ids)


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150)
def test_after_a_prompt_only_the_rest_comes(main_tokenizer, data, skip):
    tokenizer = main_tokenizer
    prompt = data.draw(id_lists(tokenizer)) * data.draw(st.integers(1, 3))
    prompt += tokenizer.encode(" end", add_special_tokens=False)  # ends on a whole character
    ids = data.draw(id_lists(tokenizer))
    whole, before = tokenizer.decode(prompt + ids, skip), tokenizer.decode(prompt, skip)
    assert whole.startswith(before)
    assert stream(tokenizer, ids, skip=skip, prompt=prompt) == whole[len(before) :]


def test_a_leading_space_survives_only_after_a_prompt(tmp_path):
    tokenizer = Tokenizer.from_directory(write_checkpoint(tmp_path, "sentencepiece"))
    ids = tokenizer.encode("dog", add_special_tokens=False)
    assert stream(tokenizer, ids) == "dog"
    assert stream(tokenizer, ids, prompt=tokenizer.encode("lazy")) == " dog"
    # Special tokens far longer than the context that is looked at: still the beginning of the text, or not.
    assert stream(tokenizer, ids, prompt=[0] * 100) == "dog"
    assert stream(tokenizer, ids, prompt=[*tokenizer.encode("lazy"), *[0] * 100]) == " dog"


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_is_shown_once_and_whole(tmp_path, kind):
    tokenizer = Tokenizer.from_directory(write_checkpoint(tmp_path, kind))
    by_byte = {tokenizer.token_bytes(i): i for i in byte_ids(tokenizer)}
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([by_byte[bytes([byte])]]) for byte in "😀".encode()]
    assert pieces[:3] == ["", "", ""]
    (plain,) = tokenizer.encode(PLAIN, add_special_tokens=False)
    assert "".join(pieces) + detokenizer.push([plain]) == f"😀{PLAIN}"
    assert detokenizer.push([by_byte[b"\xf0"]]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    with pytest.raises(RuntimeError):
        detokenizer.push([1])


def test_a_broken_run_of_byte_tokens_does_not_wait(tmp_path):
    tokenizer = Tokenizer.from_directory(write_checkpoint(tmp_path, "sentencepiece"))
    by_byte = {tokenizer.token_bytes(i): i for i in byte_ids(tokenizer)}
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([by_byte[b"\xe4"], by_byte[b"\xbd"]]) == ""
    assert detokenizer.push([by_byte[b"\xff"]]) == "\ufffd" * 3
    assert detokenizer.push([by_byte[b"\xe4"]]) == "\ufffd"


DECODERS = {
    "none": None,
    "metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "strip tokens": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "byte level, then strip": {
        "type": "Sequence",
        "decoders": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {"type": "Strip", "content": " ", "start": 2, "stop": 0},
        ],
    },
    "strip the whole": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 3, "stop": 0},
        ],
    },
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_other_decoder_chains(tmp_path, decoder):
    directory = write_checkpoint(tmp_path, "byte_level" if "byte" in str(decoder).lower() else "sentencepiece")
    spec = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps({**spec, "decoder": decoder}))
    tokenizer = Tokenizer.from_directory(directory)
    spaces = [i for i in range(VOCABULARY) if tokenizer.token_bytes(i).startswith(b" ")] or [5]

    @given(st.lists(st.sampled_from([*range(4, VOCABULARY), *spaces * 5]), min_size=1, max_size=20))
    def check(ids):
        assert stream(tokenizer, ids) == tokenizer.decode(ids)

    check()


def test_cost_does_not_grow_with_the_text(main_tokenizer):
    """100,000 tokens one by one; decoding the whole text at each would take hours."""
    ids = main_tokenizer.encode("the quick brown fox 你 ", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(main_tokenizer)
    start = time.perf_counter()
    for turn in range(100_000):
        detokenizer.push([ids[turn % len(ids)]])
    assert time.perf_counter() - start < 20.0


@pytest.mark.long
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3"])
def test_published_tokenizers(name):
    tokenizer = Tokenizer.from_directory(real_tokenizer(name))
    short = [i for i in range(2000) if len(tokenizer.token_bytes(i)) == 1]
    any_id = st.integers(0, tokenizer.vocab_size + 5)
    special = st.sampled_from(sorted(tokenizer.special_ids))

    @given(
        ids=st.lists(st.one_of(any_id, special, st.sampled_from(short)), max_size=40),
        cuts=st.lists(st.integers(0, 40), max_size=5),
        skip=st.booleans(),
    )
    @settings(max_examples=3000)
    def check(ids, cuts, skip):
        assert stream(tokenizer, ids, cuts, skip) == tokenizer.decode(ids, skip)

    check()
