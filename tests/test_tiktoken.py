"""`tiktoken.model` against the `tiktoken` library with the same ranks and expression, and files that are wrong.

The library wants the expression and the special tokens from its caller; both are written out here once more.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Native
from tokenizers import models, pre_tokenizers, trainers

from moesaic.errors import CheckpointError, MoesaicError, UnsupportedError
from moesaic.text.decoders import byte_level_bytes
from moesaic.text.detokenize import IncrementalDetokenizer
from moesaic.text.tokenizer import Tokenizer
from tests.text_support import CORPUS, real_tokenizer

# As published in the tokenizer's own code: runs of Han; words of other scripts; digits by threes; the rest.
PATTERN = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [bytes([byte]) for byte in range(256)]
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 11: "<|tool_calls_begin|>", 255: "[PAD]"}
"""Offset behind the vocabulary -> text. 11 is not `special`, as in released checkpoints."""


def special_ids(base: int) -> dict[str, int]:
    return {NAMED.get(i, f"<|reserved_token_{base + i}|>"): base + i for i in range(256)}


def write(directory: Path, tokens: Sequence[bytes], **config: Any) -> Path:
    """A checkpoint's tokenizer files. config: fields of tokenizer_config.json that differ."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (directory / "tiktoken.model").write_text("".join(lines))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(len(tokens) + i): {"content": text, **flags, "special": i != 11} for i, text in NAMED.items()}
    roles = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    fields = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": added, **roles, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return directory


def oracle_of(tokens: Sequence[bytes]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("oracle", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_ids(len(tokens)))


class Pair:
    """Our tokenizer and the library, over one vocabulary."""

    def __init__(self, directory: Path, tokens: Sequence[bytes]) -> None:
        self.ours, self.oracle = Tokenizer.from_directory(write(directory, tokens)), oracle_of(tokens)

    def check(self, text: str) -> int:
        ids = self.oracle.encode(text, allowed_special="all")
        assert self.ours.encode(text) == ids, text[:200]
        assert self.ours.decode(ids, skip_special_tokens=False) == text
        return len(ids)


# --- vocabularies ----------------------------------------------------------------------------------------------------

HAN = "".join(map(chr, range(0x4E00, 0x4E80))) + "中文和English混合内容，你好世界。日本語のテキスト 한국어 텍스트 "
SOURCES = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_text_*.py"))]


def embedded() -> list[bytes]:
    """Of the embedded model: ids in order of its merges, without its special tokens."""
    file = Path(__file__).parents[1] / "src" / "moesaic" / "assets" / "tiny" / "tokenizer.json"
    return vocabulary(json.loads(file.read_text(encoding="utf-8")))


def vocabulary(spec: dict[str, Any]) -> list[bytes]:
    added = {token["content"] for token in spec["added_tokens"]}
    by_id = sorted((index, text) for text, index in spec["model"]["vocab"].items() if text not in added)
    return [byte_level_bytes(text) for _, text in by_id]


def trained() -> list[bytes]:
    """3,000 tokens that another library learns from source code and five scripts."""
    native = Native(models.BPE())
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    native.train_from_iterator([*CORPUS, *[HAN] * 3, *SOURCES], trainer)
    return vocabulary(json.loads(native.to_str()))


def scrambled(seed: int = 0) -> list[bytes]:
    """Nothing that training would give: tokens that no join reaches, ranks below those of the parts, random order."""
    rng = random.Random(seed)
    words = {bytes(rng.choices(b"ab c\xe4\xbd\xa0", k=rng.randint(2, 6))) for _ in range(400)}
    tokens = [*BYTES, *sorted(words)]
    rng.shuffle(tokens)
    return tokens


def seams() -> list[bytes]:
    """Joins every byte with each of some ASCII characters on either side, so that nearly every cut shows."""
    pairs = [ends for side in b"aAls1 !'\n" for byte in BYTES for ends in (byte + bytes([side]), bytes([side]) + byte)]
    return [*BYTES, *dict.fromkeys(pairs)]


@pytest.fixture(scope="module", params=[embedded, trained, scrambled, seams], ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("tiktoken"), request.param())


# --- the same ids ----------------------------------------------------------------------------------------------------

TEXTS = [
    "", " ", "  ", "\n", "\r\n \r\n\t\n", "hello world", "Hello, World!  ", "   three   spaces   ", "tab\t\ttab",
    "I'm you'Re they'LL it'ſ 'Kelvin 'd 'x don''t", "CamelCaseHTTPServer snake_case ÀÉîõü ŐŰ ǅ ǈ ʰˠ ªº",
    "1 12 123 1234 12345678901 ٣٤٥٦ ①②③④ ⅷ 〇〇 3.14159e-10", "中文English混合 汉字abc 北京市 Pascal 々〻〡",
    "⼀⺀ 㐀𠀀𪜀", "日本語のテキスト カタカナ ー ｶﾀｶﾅ 한국어 ภาษาไทย हिन्दी العربية עברית ไม่",
    "e\u0301 n\u0303 \u0301 \u0301a \u200d\ufe0f", "😀😀 👩‍👩‍👧 🇩🇪🇯🇵 👍🏽",
    "\x00\x01\x1f\x7f\x80\x85\xa0\u2028\u2029\u3000\ufeff\ufffd", "!?!?\n\n...\r\n---\n",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # note\n\n\n", "<|im_user|>hi<|im_end|><|im_end|> [EOS] [BOS",
    "[PAD]", "<|tool_calls_begin|>", "<|reserved_token_5|>", "A\u0301Bb ÀÉé", "a" * 5000,
    " " * 3000 + "x", "\n" * 3000, "中" * 3000, "0" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_known_texts(pair: Pair, text: str) -> None:
    pair.check(text)


def test_source_code_and_prose(pair: Pair) -> None:
    assert sum(pair.check(text) for text in [*SOURCES, *CORPUS, HAN]) > 10_000


def test_random_texts_of_every_kind(pair: Pair) -> None:
    rng = random.Random(7)
    blocks = (
        range(0x20, 0x7F), range(0x4E00, 0xA000), range(0x3040, 0x3100), range(0xAC00, 0xD7A4), range(0x400, 0x500),
        range(0x300, 0x370), range(0x600, 0x700), range(0x1F300, 0x1F700), range(0x20), range(0x2000, 0x2070),
        range(0x1C4, 0x1F4), range(0x20000, 0x20100), [0x3005, 0x3007, 0x17F, 0x212A, 0x27, 0x53, 0x73, 0x74, 0x2019],
    )  # fmt: skip
    glue = (" ", "  ", "\n", "\r\n", " \n", "'s", "'LL", "12345", "aaaa", "ab ab", "你你", "\u3000", "<|im_end|>")
    for _ in range(4000):
        pieces = [chr(rng.choice(rng.choice(blocks))) if rng.random() < 0.8 else rng.choice(glue) for _ in range(20)]
        pair.check("".join(pieces))


def test_every_character_is_cut_alike(tmp_path: Path) -> None:
    """Its class (letter, case, mark, digit, Han, space) shows in what it is kept together with: two regular expression
    engines, each with Unicode tables of its own."""
    pair = Pair(tmp_path, seams())
    uniform = ((0x3400, 0xA000), (0xAC00, 0xD7A0), (0xD800, 0xF900), (0x20000, 0x110000))  # a sample is enough there
    points = [p for p in range(0x110000) if p % 16 == 0 or not any(first <= p < end for first, end in uniform)]
    characters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    for start in range(0, len(characters), 1 << 12):
        pair.check("".join(f"a{c}A{c}Aa1{c} {c}{c}!{c}\n" for c in characters[start : start + (1 << 12)]))


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
@settings(max_examples=200)
def test_any_text(pair: Pair, text: str) -> None:
    pair.check(text)


def test_any_vocabulary(tmp_path: Path) -> None:
    """Also those that no training would give: the joins and their order are the library's."""
    rng = random.Random(3)
    for seed in range(40):
        pair = Pair(tmp_path, scrambled(seed))
        for _ in range(60):
            pair.check("".join(rng.choices(("a", "b", " ", "c", "ab", "你", "aa", "ca"), k=rng.randint(1, 30))))


def test_streaming_gives_the_same_text(pair: Pair) -> None:
    text = "stream 你好 😀 e\u0301 naïve\n" * 3
    stream = IncrementalDetokenizer(pair.ours)
    parts = [stream.push([index]) for index in pair.ours.encode(text)]
    assert "".join([*parts, stream.finish()]) == text


@pytest.mark.long
def test_a_published_vocabulary_of_150_000_tokens(tmp_path: Path) -> None:
    spec = json.loads((real_tokenizer("qwen3") / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = vocabulary(spec)
    assert len(tokens) > 150_000
    pair = Pair(tmp_path, tokens)
    test_source_code_and_prose(pair)
    test_random_texts_of_every_kind(pair)


# --- the files beside it ---------------------------------------------------------------------------------------------


def test_special_tokens(tmp_path: Path) -> None:
    tokens = trained()
    base = len(tokens)
    ours = Tokenizer.from_directory(write(tmp_path, tokens))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (base, base + 1, base + 255, base + 256)
    assert ours.special_ids == frozenset(range(base, base + 256)) - {base + 11}
    assert ours.decode([base, base + 11, base + 7, base + 2]) == "<|tool_calls_begin|>"
    assert ours.decode([base + 7], skip_special_tokens=False) == f"<|reserved_token_{base + 7}|>"
    assert ours.encode("x", add_special_tokens=True) == ours.encode("x", add_special_tokens=False)


def test_the_checkpoints_own_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('it was run')")
    auto = {"AutoTokenizer": ["tokenization_own.TikTokenTokenizer", None]}
    assert Tokenizer.from_directory(write(tmp_path, BYTES, auto_map=auto)).encode("ab") == [97, 98]


def test_a_tokenizer_json_comes_first(tmp_path: Path) -> None:
    native = Native(models.BPE({"z": 0}, []))
    native.save(str(write(tmp_path, BYTES) / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path).encode("z") == [0]


def test_lines_in_any_order_with_either_line_end(tmp_path: Path) -> None:
    write(tmp_path, [*BYTES, b"ab"])
    file = tmp_path / "tiktoken.model"
    lines = file.read_text().splitlines()
    file.write_bytes(("\r\n".join(reversed(lines)) + "\r\n\r\n").encode())
    assert Tokenizer.from_directory(tmp_path).encode("abba") == [256, 98, 97]


@pytest.mark.parametrize("kind", [None, "LlamaTokenizer", 3])
def test_an_unknown_class_of_tokenizer(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(UnsupportedError, match="not known") as caught:
        Tokenizer.from_directory(write(tmp_path, BYTES, tokenizer_class=kind))
    assert caught.value.remedy


def added(index: int, content: Any = "[X]") -> dict[str, Any]:
    return {"added_tokens_decoder": {str(index): {"content": content, "special": True}}}


BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "inside the vocabulary": (added(255), "id 255"),
    "behind the 256": (added(512), "id 512"),
    "far behind": (added(1 << 40), "id 1099511627776"),
    "twice": ({"added_tokens_decoder": {"256": {"content": "[A]"}, "257": {"content": "[A]"}}}, "twice"),
    "a reserved name": (added(256, "<|reserved_token_300|>"), "twice"),
    "empty": (added(256, ""), "without text"),
    "not a text": (added(256, 5), "malformed"),
    "not an object": ({"added_tokens_decoder": [1]}, "malformed"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_added_tokens_that_cannot_be(tmp_path: Path, name: str) -> None:
    fields, message = BESIDE[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_directory(write(tmp_path, BYTES, **fields))
    assert "tokenizer_config.json" in str(caught.value)


# --- hostile files ---------------------------------------------------------------------------------------------------


def line(token: bytes, rank: object) -> bytes:
    return base64.b64encode(token) + f" {rank}\n".encode()


def with_line(more: bytes) -> Callable[[bytes], bytes]:
    return lambda good: good + more


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "no token for the byte 0x00"),
    "bad base64": (with_line(b"!!!! 256\n"), "line 257: '!!!!' is not base64"),
    "cut base64": (with_line(b"YWI 256\n"), "line 257: 'YWI' is not base64"),
    "not ASCII": (with_line("YWIé 256\n".encode()), "not base64"),
    "not UTF-8": (with_line(b"\xff\xfe 256\n"), "not UTF-8"),
    "no rank": (with_line(b"YWI=\n"), "line 257: '' is not a rank"),
    "a negative rank": (with_line(b"YWI= -1\n"), "'-1' is not a rank"),
    "a rank in other digits": (with_line("YWI= ٢\n".encode()), "is not a rank"),
    "a rank of many digits": (with_line(b"YWI= " + b"9" * 5000 + b"\n"), "is not a rank"),
    "three fields": (with_line(b"YWI= 256 1\n"), "'256 1' is not a rank"),
    "an empty token": (with_line(b" 256\n"), "1 to 1024 bytes, not 0"),
    "a rank twice": (with_line(line(b"ab", 5)), "line 257: rank 5 for the second time"),
    "a token twice": (with_line(line(b"a", 256)), "the token b'a' twice"),
    "a gap": (with_line(line(b"ab", 300)), "no token of rank 256"),
    "a far rank": (with_line(line(b"ab", 99_999_999)), "no token of rank 256"),
    "a byte is missing": (lambda good: b"".join(line(token, i) for i, token in enumerate(BYTES[:-1])), "byte 0xff"),
    "a huge token": (with_line(line(b"a" * 4000, 256)), "1 to 1024 bytes, not 4000"),
    "many huge tokens": (
        lambda good: b"".join(line(b"%1000d" % i, i) for i in range(10_000)), "more than 8388608 bytes"),
    "a pickle": (lambda good: b"\x80\x04\x95\x10", "not UTF-8"),
    "JSON": (lambda good: b'{"a": 1}', "not base64"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    file = write(tmp_path, BYTES) / "tiktoken.model"
    file.write_bytes(change(file.read_bytes()))
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert message in str(caught.value)
    assert "tiktoken.model" in str(caught.value)
    assert caught.value.remedy
    assert time.monotonic() - began < 5


@given(data=st.binary(max_size=300))
@settings(max_examples=100)
def test_any_bytes_are_a_vocabulary_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.mktemp("bytes")
    (write(directory, BYTES) / "tiktoken.model").write_bytes(data)
    with pytest.raises(MoesaicError):  # too short to hold the 256 bytes
        Tokenizer.from_directory(directory)
