"""A tokenizer for a model that comes without one: a token per byte, and a number for every other id of its vocabulary.

What random weights say is noise; but prompts get in and answers get out, and nobody has to ask whether there is text.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from moesaic.text.decoders import BYTE_OF_CHAR
from moesaic.text.tokenizer import Tokenizer

BYTES = 256


def byte_tokenizer(vocab: int) -> Tokenizer:
    """vocab: how many ids the model has; where it has fewer than 256, only the lower bytes have a token."""
    ids = {char: byte for char, byte in BYTE_OF_CHAR.items() if byte < vocab}
    ids |= {f"Ġ{number}": number for number in range(BYTES, vocab)}
    spec: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": ids, "merges": []},
    }  # fmt: skip
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), spec, "byte tokenizer")
