"""The special tokens that a checkpoint's side files declare beside tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from moesaic.errors import CheckpointError
from moesaic.text.files import read_object

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class SpecialTokens:
    """named: role to text: those of ROLES that are set, and a model's own (such as `image_token`).

    extra: further special tokens.

    by_id: every added token with its flags, in id order, as the side files list them.
    """

    named: Mapping[str, str]
    extra: tuple[str, ...]
    by_id: Mapping[int, AddedToken]

    @property
    def declared(self) -> tuple[AddedToken, ...]:
        return tuple(self.by_id.values())


def read_special_tokens(directory: Path, config: Mapping[str, Any]) -> SpecialTokens:
    """From tokenizer_config.json (`config`); the two older files count only where it lists no added tokens itself.

    The precedence is that of `transformers`. Raises CheckpointError naming the field that is malformed.
    """
    where = str(directory / "tokenizer_config.json")
    merged = dict(config)
    by_id = {}
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, dict) or not all(str(key).isdecimal() for key in decoder):
            raise _malformed("added_tokens_decoder", where)
        by_id = {int(key): _added(value, "added_tokens_decoder", where) for key, value in decoder.items()}
    else:
        merged.update(read_object(directory / "special_tokens_map.json"))
    named = {role: _content(merged[role], role, where) for role in ROLES if merged.get(role) is not None}
    extra = merged.get("extra_special_tokens") or merged.get("additional_special_tokens") or []
    named |= {key: _content(value, key, where) for key, value in config.items() if _names_own_token(key, value)}
    if isinstance(extra, dict):
        named |= {key: _content(value, f"extra_special_tokens.{key}", where) for key, value in extra.items()}
        extra = []
    if not isinstance(extra, list):
        raise _malformed("additional_special_tokens", where)
    more = tuple(_content(item, "additional_special_tokens", where) for item in extra)
    if decoder is None:
        by_id = _legacy_added(directory / "added_tokens.json", {*named.values(), *more})
    return SpecialTokens(named, more, {index: by_id[index] for index in sorted(by_id)})


def _legacy_added(path: Path, special: set[str]) -> dict[int, AddedToken]:
    tokens = read_object(path)
    if not all(isinstance(index, int) for index in tokens.values()):
        raise _malformed("token ids", str(path))
    return {
        index: AddedToken(text, normalized=text not in special, special=text in special)
        for text, index in tokens.items()
    }


def _names_own_token(key: str, value: Any) -> bool:
    return key.endswith("_token") and key not in ROLES and _is_token(value)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _content(value: Any, field: str, where: str) -> str:
    if not _is_token(value):
        raise _malformed(field, where)
    return str(value["content"] if isinstance(value, dict) else value)


def _added(value: Any, field: str, where: str) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    if not isinstance(value, dict):
        raise _malformed(field, where)
    return AddedToken(_content(value, field, where), **{flag: bool(value[flag]) for flag in flags if flag in value})


def _malformed(field: str, where: str) -> CheckpointError:
    return CheckpointError(f"{field} is malformed", where=where, remedy="Download the file again.")
