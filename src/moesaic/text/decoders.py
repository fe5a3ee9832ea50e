"""Token strings to text, one token at a time.

A Hugging Face tokenizer describes its decoder as a chain of steps over the *whole* list of tokens. Here each step is
a `Stage` that takes one piece at a time and gives back only what no later token can change, so a stream costs O(1)
per token and adds up to exactly what the whole-list decoder would give. A step that cannot be streamed is refused
when the tokenizer is loaded.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from moesaic.errors import UnsupportedError

REPLACEMENT = "�"
_BYTE_TOKEN = re.compile(r"<0x(\+?[0-9A-Fa-f]{1,2})>")


class Stage(Protocol):
    """One streaming step. `feed` and `end` return pieces that are final; after `end` the stage is spent."""

    def feed(self, piece: str) -> Sequence[str]: ...

    def end(self) -> Sequence[str]: ...


def byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: which byte each printable stand-in means.

    Printable Latin-1 bytes stand for themselves; the 68 others take U+0100, U+0101 ... in order (the GPT-2
    convention, which every ByteLevel tokenizer shares).
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


BYTE_OF_CHAR = byte_of_char()


@lru_cache(maxsize=1 << 16)
def byte_level_bytes(token: str) -> bytes:
    """The bytes a ByteLevel token means; a token outside the alphabet (an added one) means its own UTF-8."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


def byte_token_value(token: str) -> int | None:
    """The byte of a fallback token such as `<0xE4>`, or None for any other token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match and len(token) == 6 else None


class ByteLevelStage:
    """Tokens to bytes to text; an unfinished character waits, an invalid one becomes U+FFFD."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: str) -> Sequence[str]:
        return (self._utf8.decode(byte_level_bytes(piece)),)

    def end(self) -> Sequence[str]:
        return (self._utf8.decode(b"", True),)


class ByteFallbackStage:
    """Runs of byte tokens to text.

    The rule is all or nothing: a run that is valid UTF-8 is its text, any other run is one U+FFFD per byte. A run
    that is valid so far therefore waits for its end; one that is already broken does not.
    """

    def __init__(self) -> None:
        self._run = bytearray()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")  # only tells whether the run can still be valid
        self._broken = False

    def feed(self, piece: str) -> Sequence[str]:
        byte = byte_token_value(piece)
        if byte is None:
            return (*self.end(), piece)
        if self._broken:
            return (REPLACEMENT,)
        self._run.append(byte)
        try:
            self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._broken = True
            return (REPLACEMENT,) * len(self._run)
        return ()

    def end(self) -> Sequence[str]:
        run, broken, unfinished = bytes(self._run), self._broken, bool(self._utf8.getstate()[0])
        self._run.clear()
        self._utf8.reset()
        self._broken = False
        if broken or not run:
            return ()
        return (REPLACEMENT,) * len(run) if unfinished else (run.decode("utf-8"),)


class ReplaceStage:
    """Replaces a fixed string inside each token."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content

    def feed(self, piece: str) -> Sequence[str]:
        return (piece.replace(self._pattern, self._content),)

    def end(self) -> Sequence[str]:
        return ()


class MetaspaceStage:
    """The word mark becomes a space, except in the first token, where it is dropped (unless never prepended)."""

    def __init__(self, replacement: str, drop_first: bool) -> None:
        self._replacement, self._first = replacement, drop_first

    def feed(self, piece: str) -> Sequence[str]:
        mark, self._first = "" if self._first else " ", False
        return (piece.replace(self._replacement, mark),)

    def end(self) -> Sequence[str]:
        return ()


class StripStage:
    """Removes up to `count` leading copies of a character: from each token, or, once fused, from the whole text."""

    def __init__(self, content: str, count: int, fused: bool) -> None:
        self._content, self._count, self._fused = content, count, fused

    def feed(self, piece: str) -> Sequence[str]:
        lead = min(self._count, len(piece) - len(piece.lstrip(self._content)))
        if self._fused and piece:
            # The text goes on being stripped only while it has consisted of nothing else.
            self._count = self._count - lead if lead == len(piece) else 0
        return (piece[lead:],)

    def end(self) -> Sequence[str]:
        return ()


class SpacedStage:
    """No decoder at all: the tokens with a space between them."""

    def __init__(self) -> None:
        self._first = True

    def feed(self, piece: str) -> Sequence[str]:
        gap, self._first = "" if self._first else " ", False
        return (gap + piece,)

    def end(self) -> Sequence[str]:
        return ()


def build_stages(spec: Mapping[str, Any] | None, where: str) -> list[Stage]:
    """The stages of the `decoder` field of tokenizer.json. Raises UnsupportedError for a step that is not known."""
    if spec is None:
        return [SpacedStage()]
    steps = spec.get("decoders", []) if spec.get("type") == "Sequence" else [spec]
    stages: list[Stage] = []
    fused = False
    for step in steps:
        stage = _build_stage(step, fused, where)
        fused = fused or step.get("type") in ("Fuse", "ByteLevel")
        stages.extend([] if stage is None else [stage])
    return stages


def _build_stage(step: Mapping[str, Any], fused: bool, where: str) -> Stage | None:
    kind = step.get("type")
    if kind == "Fuse":
        return None  # a stream of text pieces is fused already; what follows is built knowing it
    if kind == "Strip" and step["stop"] == 0:
        return StripStage(step["content"], step["start"], fused)
    pattern = step.get("pattern", {}).get("String") if kind == "Replace" else None
    # A fused text may cut a longer pattern in two.
    if pattern is not None and pattern != "" and (not fused or len(pattern) == 1):
        return ReplaceStage(pattern, step["content"])
    if not fused and kind == "ByteLevel":
        return ByteLevelStage()
    if not fused and kind == "ByteFallback":
        return ByteFallbackStage()
    if not fused and kind == "Metaspace":
        return MetaspaceStage(step["replacement"], step.get("prepend_scheme", "always") != "never")
    raise UnsupportedError(
        f"decoder step {kind} cannot be streamed",
        where=where,
        remedy="Moesaic reads ByteLevel, ByteFallback, Metaspace, Replace (of a string), Fuse, and Strip at the left.",
    )


def run_stages(stages: Sequence[Stage], tokens: Sequence[str], *, end: bool = False) -> str:
    """Push tokens through all stages; with `end`, flush them in order. Returns the text that is now final."""
    pieces: Sequence[str] = tokens
    for stage in stages:
        flowing = [out for piece in pieces for out in stage.feed(piece)]
        pieces = [*flowing, *stage.end()] if end else flowing
    return "".join(pieces)
