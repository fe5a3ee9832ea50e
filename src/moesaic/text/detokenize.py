"""Token ids to text while they are being generated."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.text.decoders import run_stages
from moesaic.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 32  # of the prompt; a character takes at most four


class IncrementalDetokenizer:
    """Turns a growing list of token ids into pieces of text, at O(1) per token.

    The pieces of all `push` calls and of the one `finish` call, joined, equal `tokenizer.decode(ids)`. A piece never
    changes afterwards, so an unfinished character (and, with byte-fallback vocabularies, a run of byte tokens) waits.

    With `prompt_ids` the text continues that prompt: a leading space of the first generated word is kept, and a
    character that the prompt began is completed. Without, the ids are decoded as a text of their own.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] | None = None, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stages = tokenizer.decode_stages()
        self._finished = False
        if prompt_ids:
            nearby = tokenizer.token_strings(prompt_ids[-CONTEXT_TOKENS:], skip_special_tokens)
            # Only special tokens nearby: whether any text came before them must still be known.
            run_stages(self._stages, nearby or tokenizer.token_strings(prompt_ids, skip_special_tokens))

    def push(self, ids: Sequence[int]) -> str:
        """Add ids; returns the text they made final (often one word, possibly nothing)."""
        if self._finished:
            raise RuntimeError("push after finish")
        return run_stages(self._stages, self._tokenizer.token_strings(ids, self._skip))

    def finish(self) -> str:
        """Returns what was held back, incomplete bytes as U+FFFD. Calling it again returns nothing."""
        if self._finished:
            return ""
        self._finished = True
        return run_stages(self._stages, (), end=True)
