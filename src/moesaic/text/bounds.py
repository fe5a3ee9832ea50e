"""How much text one token can cover: lets a hopelessly long prompt be refused without tokenising it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.text.decoders import BYTE_OF_CHAR

# NFC can shorten text. The worst ratio of UTF-8 lengths is 3 (U+1F82 is 3 bytes, its four parts are 8; 4 is safe).
NFC_SHRINK = 4


def max_bytes_per_token(spec: Mapping[str, Any]) -> int | None:
    """An upper bound on the UTF-8 bytes of *text* that one token of this tokenizer can stand for.

    spec: the whole tokenizer.json. None when no bound holds: a step that may drop text (an unknown normaliser, a
    splitter that removes its matches), or an unknown-word token that may stand for any length.
    """
    model = spec.get("model") or {}
    vocab = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not vocab:
        return None
    normalizers = _flatten(spec.get("normalizer"), "normalizers")
    splitters = _flatten(spec.get("pre_tokenizer"), "pretokenizers")
    added = [token for token in spec.get("added_tokens") or [] if isinstance(token, dict)]
    if any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None  # such a token swallows any amount of white space
    if not all(_keeps_text(step) for step in splitters):
        return None
    shrink = 1
    for step in normalizers:
        if not _keeps_text(step):
            return None
        shrink *= NFC_SHRINK if step.get("type") == "NFC" else 1
    if any(step.get("type") == "ByteLevel" for step in splitters):
        complete = all(char in vocab for char in BYTE_OF_CHAR)
        longest = max(map(len, vocab))  # one character of the alphabet is one byte
    else:
        complete = bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
        longest = max(map(_size, vocab))
    longest_added = max((_size(str(token.get("content", ""))) for token in added), default=0)
    return shrink * max(longest, longest_added) if complete else None


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _flatten(step: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(step, dict):
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [leaf for child in step.get(key) or [] for leaf in _flatten(child, key)]


def _keeps_text(step: Mapping[str, Any]) -> bool:
    """True for a step that never makes text shorter, other than NFC's bounded composition."""
    kind = step.get("type")
    if kind == "Split":
        return step.get("behavior") != "Removed"
    if kind == "Replace":
        pattern = (step.get("pattern") or {}).get("String")
        return pattern is not None and len(step.get("content", "").encode()) >= len(pattern.encode())
    return kind in ("NFC", "Prepend", "ByteLevel", "Metaspace", "Digits")
