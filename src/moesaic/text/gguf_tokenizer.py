"""The tokenizer files of a checkpoint, rebuilt from the metadata of a GGUF file: byte-level BPE only.

GGUF stores vocabulary, merges and token kinds, but only a *name* for how text is cut into words before the merges; the
names that are known here are those whose cutting a test has compared with an original.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.errors import CheckpointError, UnsupportedError

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type; 1 is a normal token
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
CUTTERS: Mapping[str, Any] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
}
ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json (file name to JSON object), with the chat template in the second.

    metadata: of the file `where`. Raises UnsupportedError for another kind of tokenizer, CheckpointError for fields
    that are missing or do not fit together.
    """
    kind, cutter = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cutter not in CUTTERS:
        raise UnsupportedError(
            f"its tokenizer is of kind {kind!r:.40} with word rule {cutter!r:.40}", where=where,
            remedy=f"Supported are gpt2 with {' or '.join(CUTTERS)}; else use the model's safetensors checkpoint.",
        )  # fmt: skip
    tokens = strings(metadata, "tokenizer.ggml.tokens", where)
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(set(tokens)) != len(tokens) or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise bad("tokenizer.ggml.tokens", where)
    special = roles(metadata, tokens, where)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    ends = {name: metadata.get(f"tokenizer.ggml.add_{name}_token") is True for name in ("bos", "eos")}
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [added(i, tokens[i], kind) for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)],
        "pre_tokenizer": CUTTERS[cutter], "post_processor": surround(special, ends, tokens), "decoder": BYTE_LEVEL,
        "model": model(tokens, strings(metadata, "tokenizer.ggml.merges", where), where),
    }  # fmt: skip
    return {"tokenizer.json": spec, "tokenizer_config.json": config}


def roles(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    """`bos_token` and the others -> text."""
    found = {}
    for theirs, ours in ROLES.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        index = metadata.get(key)
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise bad(key, where)
        found[f"{ours}_token"] = tokens[index]
    return found


def added(index: int, text: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": kind == CONTROL}


def model(tokens: list[str], merges: list[str], where: str) -> dict[str, Any]:
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise bad("tokenizer.ggml.merges", where)
    vocab = {text: index for index, text in enumerate(tokens)}
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": vocab, "merges": pairs,
    }  # fmt: skip


def surround(special: Mapping[str, str], ends: Mapping[str, bool], tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that puts bos and eos around a text, where the file asks for them."""
    texts = {name: special[f"{name}_token"] for name, wanted in ends.items() if wanted and f"{name}_token" in special}
    if not texts:
        return None
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if "bos" in texts:
        single.insert(0, {"SpecialToken": {"id": texts["bos"], "type_id": 0}})
    if "eos" in texts:
        single.append({"SpecialToken": {"id": texts["eos"], "type_id": 0}})
    named = {text: {"id": text, "ids": [tokens.index(text)], "tokens": [text]} for text in texts.values()}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise bad(key, where)
    return value


def bad(key: str, where: str) -> CheckpointError:
    return CheckpointError(f"{key} is missing or malformed", where=where, remedy="Download the file again.")
