"""Tokenizer against `transformers.AutoTokenizer` on the same directory, and every way in which files can be wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moesaic.errors import CheckpointError, RequestError, UnsupportedError
from moesaic.text.tokenizer import Tokenizer
from tests.text_support import KINDS, PLAIN, SPECIALS, real_tokenizer, write_checkpoint

TEXTS = [
    "",
    " ",
    "hello world",
    "  two leading spaces, trailing  ",
    "line\n\n\tbreaks\r\n",
    "café 你好 😀 \u0301 e\u0301",
    "<s>inside</s> the <|user|> text <think>hm</think>",
    "\x00\x7f\ufffd",
]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
spiced_text = st.lists(st.one_of(unicode_text, st.sampled_from([*SPECIALS, PLAIN, "hello", " "])), max_size=6).map(
    "".join
)


def skipped_by(oracle, size):
    native = oracle.backend_tokenizer
    return {i for i in range(size) if native.decode([i], skip_special_tokens=False) and not native.decode([i])}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("special", [True, False])
def test_encode_equals_transformers_on_known_texts(pair, special):
    ours, oracle = pair
    for text in TEXTS:
        assert ours.encode(text, special) == oracle.encode(text, add_special_tokens=special), text


@given(text=spiced_text)
@settings(max_examples=150)
def test_encode_and_decode_equal_transformers(pair, text):
    ours, oracle = pair
    ids = oracle.encode(text)
    assert ours.encode(text) == ids
    for skip in (True, False):
        assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_identity_of_the_special_ids(pair):
    ours, oracle = pair
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (oracle.bos_token_id, oracle.eos_token_id, None)
    assert ours.special_tokens == oracle.special_tokens_map
    assert ours.vocab_size == len(oracle)
    assert ours.special_ids == skipped_by(oracle, len(oracle)) == set(range(4))


def test_token_text_keeps_the_leading_space_and_token_bytes_join_to_the_text(pair):
    ours, _ = pair
    text = "the dog, 你😀 words"
    ids = ours.encode(text, add_special_tokens=False)
    assert b"".join(map(ours.token_bytes, ids)).decode().lstrip() == text
    shown = [ours.token_text(index) for index in ids]
    assert any(piece.startswith(" ") and piece.strip() for piece in shown[1:])
    for token in ("<s>", PLAIN):
        (index,) = ours.encode(token, add_special_tokens=False)
        assert (ours.token_text(index), ours.token_bytes(index)) == (token, token.encode())
    assert ours.token_text(10**6) == ""
    assert ours.token_bytes(10**6) == b""


CONFIGS = {
    "declared tokens": {
        "added_tokens_decoder": {
            "0": {"content": "<s>", "special": True},
            "1": {"content": "</s>", "special": True},
            "700": {"content": "<think>", "special": True, "normalized": False},
            "701": {"content": "<tool>", "special": False, "lstrip": True},
        }
    },
    "additional": {
        "additional_special_tokens": ["<think>", "<new>"],
        "pad_token": {"__type": "AddedToken", "content": "</s>"},
    },
    "extra by role": {"extra_special_tokens": {"image_token": "<img>"}, "boi_token": "<boi>"},
    "special text split": {"split_special_tokens": True},
    "no bos": {"bos_token": None},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_side_files_have_the_effect_they_have_in_transformers(tmp_path, kind, config):
    directory = write_checkpoint(tmp_path, kind, **config)
    ours, oracle = Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    for text in [*TEXTS, "a <new> b <img> c <boi> d <tool> e <think>"]:
        ids = oracle.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert ours.special_ids == skipped_by(oracle, len(oracle))
    assert ours.special_tokens == oracle.special_tokens_map


def test_legacy_side_files(tmp_path):
    directory = write_checkpoint(tmp_path, "byte_level", bos_token=None, eos_token=None)
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|user|>", "lstrip": False}, "unk_token": "<unk>"})
    )
    (directory / "added_tokens.json").write_text(json.dumps({"<late>": 701}))
    ours, oracle = Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.special_tokens == oracle.special_tokens_map == {"eos_token": "<|user|>", "unk_token": "<unk>"}
    assert ours.encode("x <late> y") == oracle.encode("x <late> y")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_explicit_bos_and_eos_flags_are_honoured(tmp_path, bos, eos):
    """transformers 5 ignores the flags beside a tokenizer.json, so the oracle is told through its own properties."""
    directory = write_checkpoint(tmp_path, "sentencepiece", add_bos_token=bos, add_eos_token=eos)
    ours, oracle = Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    oracle.add_bos_token, oracle.add_eos_token = bos, eos
    assert ours.encode("hello") == oracle.encode("hello")
    assert ours.encode("hello", add_special_tokens=False) == oracle.encode("hello", add_special_tokens=False)


def test_mixtral_checkpoints_read_the_same(tmp_path):
    directory = write_checkpoint(tmp_path, "sentencepiece", tokenizer_class="LlamaTokenizer", unk_token="<unk>")
    (directory / "config.json").write_text('{"model_type": "mixtral"}')
    ours, oracle = Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    for text in ["hello world", "  x <s> y", "你好 😀", "the quick brown fox"]:
        assert ours.encode(text) == oracle.encode(text), text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1,)),
        ({"config.json": {"eos_token_id": 7}}, (1, 7)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [9, 1, 8]}}, (1, 9, 8)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {}}, (1, 7)),
    ],
)
def test_eos_ids(tmp_path, files, expected):
    directory = write_checkpoint(tmp_path, "byte_level")
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    assert Tokenizer.from_directory(directory).eos_ids == expected


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    directory = write_checkpoint(tmp_path, "byte_level")
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    text = "hello world " * 10
    assert Tokenizer.from_directory(directory).encode(text) == AutoTokenizer.from_pretrained(directory).encode(text)


# --- long and invalid text ---


def test_ten_million_characters_are_refused_at_once(pair):
    ours, _ = pair
    for text in ("a" * 10_000_000, " " * 10_000_000, "hello world " * 833_334, "你" * 10_000_000):
        start = time.perf_counter()
        with pytest.raises(RequestError, match=r"at least \d+ tokens, and at most 4096 fit") as caught:
            ours.encode(text, max_tokens=4096)
        assert caught.value.remedy
        assert time.perf_counter() - start < 1.0


def test_a_long_prompt_is_probed_before_it_is_tokenised(tmp_path):
    ours = Tokenizer.from_directory(write_checkpoint(tmp_path, "byte_level"))
    ours._max_bytes = None  # as for a tokenizer about which nothing can be known in advance
    start = time.perf_counter()
    with pytest.raises(RequestError, match=r"more than \d+ tokens, and at most 1000 fit"):
        ours.encode("hello world " * 833_334, max_tokens=1000)
    assert time.perf_counter() - start < 3.0


@given(text=spiced_text, slack=st.integers(-2, 2))
def test_max_tokens_refuses_exactly_what_does_not_fit(pair, text, slack):
    ours, _ = pair
    ids = ours.encode(text)
    limit = max(0, len(ids) + slack)
    if len(ids) <= limit:
        assert ours.encode(text, max_tokens=limit) == ids
    else:
        with pytest.raises(RequestError):
            ours.encode(text, max_tokens=limit)


@given(text=spiced_text)
def test_the_bytes_bound_is_a_bound(pair, text):
    ours, _ = pair
    assert ours._max_bytes is not None
    assert len(text.encode()) <= ours._max_bytes * len(ours.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff here"])
def test_lone_surrogates(pair, text):
    with pytest.raises(RequestError, match="lone surrogate"):
        pair[0].encode(text)


@pytest.mark.parametrize("ids", [[-1], [2**40]])
def test_impossible_ids(pair, ids):
    with pytest.raises(RequestError, match="cannot be decoded"):
        pair[0].decode(ids)
    assert pair[0].decode([10**6]) == ""


# --- broken checkpoints ---


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"looked for tokenizer\.json, tokenizer\.model") as caught:
        Tokenizer.from_directory(tmp_path)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_another_kind_of_tokenizer(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x0a\x0b")
    with pytest.raises(UnsupportedError, match=f"only {name}") as caught:
        Tokenizer.from_directory(tmp_path)
    assert "save_pretrained" in caught.value.remedy


BROKEN = {
    "truncated": b'{"version": "1.0", "model"',
    "empty": b"",
    "a list": b"[]",
    "not utf-8": b'{"version": "\xff\xfe"}',
    "nested": b"[" * 200_000,
    "an object": b"{}",
    "wrong model": b'{"version":"1.0","added_tokens":[],"model":{"type":"Nope","vocab":{}}}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_tokenizer_json(tmp_path, content):
    directory = write_checkpoint(tmp_path, "byte_level")
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"bos_token": 3}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {"special": true}}}'),
        ("tokenizer_config.json", '{"additional_special_tokens": "<a>"}'),
        ("special_tokens_map.json", "[1]"),
        ("added_tokens.json", '{"<a>": "b"}'),
        ("generation_config.json", '{"eos_token_id": "two"}'),
        ("generation_config.json", "nope"),
        ("config.json", '{"eos_token_id": -1}'),
    ],
)
def test_broken_side_files_are_named(tmp_path, name, content):
    directory = write_checkpoint(tmp_path, "byte_level")
    (directory / name).write_text(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Tokenizer.from_directory(directory)


def test_a_decoder_that_cannot_be_streamed_is_refused(tmp_path):
    directory = write_checkpoint(tmp_path, "byte_level")
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UnsupportedError, match="WordPiece"):
        Tokenizer.from_directory(directory)


# --- the real ones ---


@pytest.mark.long
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3"])
def test_published_tokenizers_equal_transformers(name):
    directory = real_tokenizer(name)
    ours, oracle = Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    oracle.add_bos_token = json.loads((directory / "tokenizer_config.json").read_text())["add_bos_token"]
    extra = ["<|im_start|>user\n<think>", "<｜User｜>你<｜Assistant｜>", Path(__file__).read_text(), "1234567 " * 50]
    for text in [*TEXTS, *extra]:
        for special in (True, False):
            ids = oracle.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)
    assert ours.special_ids == skipped_by(oracle, len(oracle))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id)


@pytest.mark.long
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3"])
def test_ten_million_characters_on_published_tokenizers(name):
    ours = Tokenizer.from_directory(real_tokenizer(name))
    for text in ("a" * 10_000_000, "hello world " * 833_334, "你好" * 5_000_000):
        start = time.perf_counter()
        with pytest.raises(RequestError):
            ours.encode(text, max_tokens=131_072)
        assert time.perf_counter() - start < 10.0
    with pytest.raises(RequestError, match="cannot be tokenised"):
        ours.encode(" " * 10_500_000)  # the library's regular expressions panic here
