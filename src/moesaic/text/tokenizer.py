"""The tokenizer of a checkpoint: text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import processors

from moesaic.errors import CheckpointError, MoesaicError, RequestError, UnsupportedError
from moesaic.text.bounds import max_bytes_per_token
from moesaic.text.decoders import Stage, build_stages, byte_level_bytes, byte_token_value, run_stages
from moesaic.text.files import parse_object, read_object, read_text
from moesaic.text.special import SpecialTokens, read_special_tokens
from moesaic.text.tiktoken_file import NAME as TIKTOKEN
from moesaic.text.tiktoken_file import tokenizer_json

TOKENIZER_FILES = ("tokenizer.json", TIKTOKEN)
OTHER_KINDS = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model")
SLICE_CHARS = 200_000  # what a long prompt is probed by; about 0.3 s of one core

T = TypeVar("T")


class Tokenizer:
    """Text to ids and back, with the ids that Hugging Face `AutoTokenizer` gives for the same directory (the one
    exception, for the checkpoint's sake, is at `_surround`).

    special_tokens: role (`bos_token` ...) to text.  special_ids: every id that `skip_special_tokens` skips.
    eos_id is the tokenizer's own; eos_ids adds those of generation_config.json (or config.json).
    Immutable after construction, and safe to share between threads.
    """

    def __init__(self, native: tokenizers.Tokenizer, spec: Mapping[str, Any], where: str) -> None:
        """native: configured as it shall be used; owned by this object.  spec: its tokenizer.json.

        where: named in errors. Raises UnsupportedError for a decoder that cannot be streamed.
        """
        self._native = native
        self._where = where
        # As the library understood it, with the defaults of older files filled in.
        self._decoder: Mapping[str, Any] | None = native.decoder and json.loads(native.decoder.__getstate__())
        self._byte_level = any(step.get("type") == "ByteLevel" for step in _decoder_steps(self._decoder))
        self._byte_fallback = any(step.get("type") == "ByteFallback" for step in _decoder_steps(self._decoder))
        self._max_bytes = max_bytes_per_token(spec)
        self.decode_stages()
        self.vocab_size: int = native.get_vocab_size()
        self.special_tokens: Mapping[str, str] = {}
        self.special_ids: frozenset[int] = frozenset(
            index for index, token in native.get_added_tokens_decoder().items() if token.special
        )
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.pad_id: int | None = None
        self.eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, or else tiktoken.model, and the files beside it.

        Raises CheckpointError (nothing there, malformed) or UnsupportedError (another kind of tokenizer).
        """
        directory = Path(path)
        config = read_object(directory / "tokenizer_config.json")
        special = read_special_tokens(directory, config)
        file = next((directory / n for n in TOKENIZER_FILES if (directory / n).is_file()), None)
        if file is None:
            raise _missing(directory)
        if file.name == TIKTOKEN:
            spec = tokenizer_json(file, config, special)
            text = json.dumps(spec)
        else:
            text = read_text(file)
            spec = parse_object(text, file)
        native = _native_call(
            lambda: tokenizers.Tokenizer.from_str(text),
            lambda why: CheckpointError(f"not a tokenizer ({why})", where=str(file), remedy="Download the file again."),
        )
        _configure(native, config, special)
        made = cls(native, spec, str(file))
        made._adopt(special, directory)
        return made

    def _adopt(self, special: SpecialTokens, directory: Path) -> None:
        """Set what the side files say. Part of construction."""
        self.special_tokens = dict(special.named)
        flagged = (self._native.token_to_id(token.content) for token in special.declared if token.special)
        self.special_ids |= {index for index in flagged if index is not None}
        self.bos_id, self.eos_id, self.pad_id = (
            self._native.token_to_id(special.named[role]) if role in special.named else None
            for role in ("bos_token", "eos_token", "pad_token")
        )
        stops = [] if self.eos_id is None else [self.eos_id]
        for name in ("generation_config.json", "config.json"):
            declared = read_object(directory / name).get("eos_token_id")
            if declared is not None:
                stops += _id_list(declared, directory / name)
                break
        self.eos_ids = tuple(dict.fromkeys(stops))

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """The token ids of `text`. add_special_tokens: as the checkpoint says (often one bos token in front).

        Special tokens spelled out in the text are recognised. Raises RequestError for text that is not valid Unicode
        or that the tokenizer gives up on, and, with `max_tokens`, for text that cannot fit: refused before the work
        where that can be known, so a 10-million-character prompt costs little.
        """
        size = _utf8_size(text)
        if max_tokens is not None:
            self._refuse_hopeless(text, size, max_tokens)
        ids = self._encode(text, add_special_tokens)
        if max_tokens is not None and len(ids) > max_tokens:
            raise _too_long(f"{len(ids)}", max_tokens)
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        def work() -> list[int]:
            # The batch call lets other Python threads run meanwhile, and skips the character offsets.
            encoded = self._native.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoded[0].ids)

        return _native_call(
            work,
            lambda why: RequestError(f"the text cannot be tokenised ({why})", where="prompt", remedy="Shorten it."),
        )

    def _refuse_hopeless(self, text: str, size: int, max_tokens: int) -> None:
        """Raise RequestError when `text` (`size` bytes) has more than `max_tokens` tokens, if that is cheap to tell."""
        if self._max_bytes is not None and size > max_tokens * self._max_bytes:
            raise _too_long(f"at least {-(-size // self._max_bytes)}", max_tokens)
        if len(text) <= 2 * SLICE_CHARS:
            return
        # A cut changes the tokens of the words it falls into, nowhere near half of a slice: twice the limit is safe.
        count = 0
        for start in range(0, len(text), SLICE_CHARS):
            count += len(self._encode(text[start : start + SLICE_CHARS], add_special_tokens=False))
            if count > 2 * max_tokens:
                raise _too_long(f"more than {count // 2}", max_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids without a token are passed over, invalid UTF-8 becomes U+FFFD."""
        return _native_call(
            lambda: str(self._native.decode(list(ids), skip_special_tokens=skip_special_tokens)),
            lambda why: RequestError(f"the ids cannot be decoded ({why})", where="token ids", remedy="Correct them."),
        )

    def decode_stages(self) -> list[Stage]:
        """A fresh streaming decoder (stateful: one per text)."""
        return build_stages(self._decoder, self._where)

    def token_strings(self, ids: Sequence[int], skip_special_tokens: bool = False) -> list[str]:
        """The raw vocabulary entries of `ids`, without those that have none or are to be skipped."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        entries = (self._native.id_to_token(index) for index in ids if index not in skipped)
        return [entry for entry in entries if entry is not None]

    def token_text(self, index: int) -> str:
        """One token for display (log-probs): its leading space kept, special tokens shown, broken UTF-8 as U+FFFD."""
        # A neighbour in front keeps the first-word rules of some decoders away from the token itself.
        stages = self.decode_stages()
        run_stages(stages, ["."])
        token = self.token_strings([index])
        return run_stages(stages, token, end=True)

    def token_bytes(self, index: int) -> bytes:
        """The exact bytes that one token adds to a text; empty for an id without a token."""
        for token in self.token_strings([index]):
            if self._byte_level:
                return byte_level_bytes(token)
            byte = byte_token_value(token) if self._byte_fallback else None
            return self.token_text(index).encode("utf-8") if byte is None else bytes([byte])
        return b""


def _configure(native: tokenizers.Tokenizer, config: Mapping[str, Any], special: SpecialTokens) -> None:
    """Bring a freshly read tokenizer to the state that `transformers` brings it to."""
    native.no_truncation()
    native.no_padding()
    native.encode_special_tokens = bool(config.get("split_special_tokens", False))
    states = {token.content: token.__getstate__() for token in native.get_added_tokens_decoder().values()}
    native.add_tokens([t for t in special.declared if states.get(t.content) != t.__getstate__()])
    known = {token.content for token in native.get_added_tokens_decoder().values()}
    names = dict.fromkeys(text for text in (*special.named.values(), *special.extra) if text not in known)
    native.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in names])
    _surround(native, config, special)


def _surround(native: tokenizers.Tokenizer, config: Mapping[str, Any], special: SpecialTokens) -> None:
    """Honour an explicit add_bos_token / add_eos_token where tokenizer.json would do otherwise.

    DeepSeek-V3 asks for its bos token in tokenizer_config.json only. transformers 4 heeds it; transformers 5 does not
    when there is a tokenizer.json, and drops a token that the model was trained with. The checkpoint's word counts.
    """
    bare = native.encode("a", add_special_tokens=False).ids
    full = native.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    if at is None or not bare:
        return
    prefix, suffix = full[:at], full[at + len(bare) :]
    bos, eos = (native.token_to_id(special.named.get(role, "")) for role in ("bos_token", "eos_token"))
    wanted = (
        _with_token(prefix, bos, config.get("add_bos_token"), front=True),
        _with_token(suffix, eos, config.get("add_eos_token"), front=False),
    )
    if wanted != (prefix, suffix):
        before, after = ([native.id_to_token(index) for index in ids] for ids in wanted)
        native.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(native.id_to_token(index), index) for index in dict.fromkeys([*wanted[0], *wanted[1]])],
        )


def _with_token(ids: list[int], token: int | None, asked: bool | None, *, front: bool) -> list[int]:
    """`ids` with `token` at its outer end if asked, without it if refused, unchanged if nothing was said."""
    if asked is None or token is None:
        return ids
    if not asked:
        return [index for index in ids if index != token]
    if token in ids:
        return ids
    return [token, *ids] if front else [*ids, token]


def _native_call(work: Callable[[], T], failure: Callable[[str], MoesaicError]) -> T:
    """Run `work` in the tokenizers library, turning what it raises into one of our errors.

    Its regular expressions give up on, for one, ten million spaces by a Rust panic, which Python sees as an exception
    outside `Exception`, of a class that cannot be imported.
    """
    try:
        return work()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise failure(str(error)) from error
        raise


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return list(decoder.get("decoders", [])) if decoder.get("type") == "Sequence" else [decoder]


def _utf8_size(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has a lone surrogate at character {error.start}, which is not valid Unicode",
            where="prompt",
            remedy="Send valid UTF-8.",
        ) from error


class TooLongError(RequestError):
    """Text of more tokens than may be."""


def _too_long(count: str, limit: int) -> RequestError:
    return TooLongError(
        f"the prompt has {count} tokens, and at most {limit} fit", where="prompt", remedy="Shorten the prompt."
    )


def _id_list(value: Any, path: Path) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise CheckpointError("eos_token_id must be token ids", where=str(path), remedy="Correct the file.")
    return ids


def _missing(directory: Path) -> MoesaicError:
    for name in OTHER_KINDS:
        if (directory / name).is_file():
            return UnsupportedError(
                f"only {name} is there, and Moesaic reads tokenizer.json and {TIKTOKEN}",
                where=str(directory),
                remedy="Convert it once with Hugging Face transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes tokenizer.json.",
            )
    looked = ", ".join(("tokenizer.json", *OTHER_KINDS, TIKTOKEN))
    return CheckpointError(
        f"no tokenizer (looked for {looked})",
        where=str(directory),
        remedy="Download the tokenizer files of the checkpoint into this directory.",
    )
