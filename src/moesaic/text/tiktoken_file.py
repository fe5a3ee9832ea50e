"""`tiktoken.model`, a byte-level BPE vocabulary of one token and its rank a line, as the tokenizer.json it amounts to.

tiktoken cuts a text into pieces with a regular expression; a piece that is itself a token is that token; otherwise the
two neighbours whose union is the token of lowest rank are joined, leftmost first, until no union is a token. A
tokenizer.json lists pairs to join, in order of preference. Listing every division of every token into two tokens, in
order of the token's rank, is the same algorithm: while a stretch of bytes is not crossed by a join, the joins inside
it do not depend on what surrounds it, so one token arises from one and the same pair wherever it arises, and pairs
with the same union never compete. `ignore_merges` is the rule for whole pieces.

The expression is not in the file. A checkpoint has it only in code of its own, which is never run, so it stands here
by the name of the tokenizer class that defines it.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.text.decoders import BYTE_OF_CHAR
from moesaic.text.files import read_text
from moesaic.text.special import SpecialTokens

NAME = "tiktoken.model"
RESERVED = 256  # ids behind the vocabulary, all of them special tokens
MAX_TOKEN_BYTES, MAX_TOTAL_BYTES = 1 << 10, 1 << 23  # published: 256, and 1.1 million

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LEAD, _CLITIC = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def _word(upper: str, lower: str) -> str:
    """Letters of any script but Han, one other character in front, an English clitic behind."""
    return rf"{_LEAD}[{_UPPER}&&[^\p{{Han}}]]{upper}[{_LOWER}&&[^\p{{Han}}]]{lower}{_CLITIC}"


CUTTERS: Mapping[str, str] = {
    "TikTokenTokenizer": "|".join(
        (
            r"[\p{Han}]+",
            _word("*", "+"),
            _word("+", "*"),
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )
}
"""By `tokenizer_class` of tokenizer_config.json: how a text is cut into pieces. (Moonshot AI's tokenizers)"""


def tokenizer_json(path: Path, config: Mapping[str, Any], special: SpecialTokens) -> dict[str, Any]:
    """The tokenizer.json that gives the ids of the vocabulary `path`; config and special: of the files beside it.

    Raises CheckpointError naming the line or the token that is wrong, UnsupportedError for an unknown tokenizer class.
    """
    kind = config.get("tokenizer_class")
    if not isinstance(kind, str) or kind not in CUTTERS:
        raise UnsupportedError(
            f"belongs to the tokenizer class {kind!r:.60}, whose way of cutting text into pieces is not known",
            where=str(path), remedy=f"Known: {', '.join(CUTTERS)}. Otherwise a tokenizer.json is needed.",
        )  # fmt: skip
    tokens = read_tokens(path)
    cut = {"type": "Split", "pattern": {"Regex": CUTTERS[kind]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": added_tokens(len(tokens), special, path), "decoder": level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, level]}, "model": bpe(tokens),
    }  # fmt: skip


def read_tokens(path: Path) -> list[bytes]:
    """The tokens in order of rank. Every rank from 0 is there once, every token once, and each of the 256 bytes."""
    by_rank: dict[int, bytes] = {}
    total = 0
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        token, rank = _parse(line, number, path)
        if rank in by_rank:
            raise _bad(f"line {number}: rank {rank} for the second time", path)
        by_rank[rank] = token
        total += len(token)
        if total > MAX_TOTAL_BYTES:
            raise _bad(f"its tokens have more than {MAX_TOTAL_BYTES} bytes together", path)
    if by_rank and max(by_rank) >= len(by_rank):
        missing = next(rank for rank in range(len(by_rank)) if rank not in by_rank)
        raise _bad(f"has no token of rank {missing}, but {len(by_rank)} tokens with ranks up to {max(by_rank)}", path)
    tokens = [by_rank[rank] for rank in range(len(by_rank))]
    distinct = set(tokens)
    if len(distinct) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise _bad(f"has the token {twice!r:.80} twice", path)
    if lacking := [byte for byte in range(256) if bytes([byte]) not in distinct]:
        raise _bad(f"has no token for the byte {lacking[0]:#04x}", path)
    return tokens


def _parse(line: str, number: int, path: Path) -> tuple[bytes, int]:
    """(token, rank) of one line: base64, a space, decimal digits."""
    code, _, rank = line.rstrip("\r").partition(" ")
    try:
        token = base64.b64decode(code.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise _bad(f"line {number}: {code!r:.60} is not base64", path) from None
    if not 0 < len(token) <= MAX_TOKEN_BYTES:
        raise _bad(f"line {number}: a token has 1 to {MAX_TOKEN_BYTES} bytes, not {len(token)}", path)
    if not (rank.isascii() and rank.isdecimal() and len(rank) < 9):
        raise _bad(f"line {number}: {rank!r:.60} is not a rank", path)
    return token, int(rank)


def bpe(tokens: list[bytes]) -> dict[str, Any]:
    """The `model` of tokenizer.json, in the byte-level alphabet."""
    chars = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    vocab = {token.decode("latin-1").translate(chars): rank for rank, token in enumerate(tokens)}
    merges = [
        (text[:cut], text[cut:])
        for text in vocab
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
        "vocab": vocab, "merges": merges,
    }  # fmt: skip


def added_tokens(base: int, special: SpecialTokens, path: Path) -> list[dict[str, Any]]:
    """The ids behind the vocabulary: those that tokenizer_config.json names, the others as `<|reserved_token_N|>`."""
    named = special.by_id
    if outside := [index for index in named if not base <= index < base + RESERVED]:
        raise CheckpointError(
            f"added_tokens_decoder names the id {outside[0]}, which is not one of the {RESERVED} behind the {base} "
            f"of {path.name}", where=str(path.with_name("tokenizer_config.json")), remedy="Download both files again.",
        )  # fmt: skip
    tokens = {
        i: named.get(i) or AddedToken(f"<|reserved_token_{i}|>", special=True, normalized=False)
        for i in range(base, base + RESERVED)
    }
    texts = {token.content for token in tokens.values()}
    if len(texts) < RESERVED or "" in texts:
        raise CheckpointError(
            "added_tokens_decoder names a token twice, or one without text",
            where=str(path.with_name("tokenizer_config.json")), remedy="Download the file again.",
        )  # fmt: skip
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return [{"id": i, **{flag: getattr(token, flag) for flag in flags}} for i, token in tokens.items()]


def _bad(what: str, path: Path) -> CheckpointError:
    return CheckpointError(what, where=str(path), remedy="Download the file again.")
