"""Answers held to a grammar: JSON, a JSON schema, a regular expression, one of several texts. Through `xgrammar`.

A `Guide` walks along one answer and says which tokens may come next; the sampler gives all others -inf before anything
else looks at the logits. Torch-free but for what xgrammar imports itself, when the first grammar is compiled. Calls of
xgrammar have no bound in time: who takes grammars from strangers walks in a process of its own (`serving/guides.py`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moesaic.errors import RequestError, UnsupportedError
from moesaic.text.tokenizer import Tokenizer

log = logging.getLogger("moesaic.engine")
KINDS = ("json_object", "json_schema", "regex", "choice")
CACHE_BYTES = 256 << 20
SOURCE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""Where in xgrammar an error arose, which it says first."""


def available() -> bool:
    return find_spec("xgrammar") is not None


class Guide(Protocol):
    """What may follow, for one answer."""

    def allowed_W(self) -> npt.NDArray[np.int32]:
        """Bit `t % 32` of word `t // 32` is set where token t may come next. Valid until `accept`."""
        ...

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        ...


class Matcher:
    """A guide in this process."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self.matcher = matcher
        self.words_1W: npt.NDArray[np.int32] = np.zeros((1, -(-vocab // 32)), np.int32)

    def allowed_W(self) -> npt.NDArray[np.int32]:
        self.words_1W.fill(-1)
        self.matcher.fill_next_token_bitmask(self.words_1W, 0)
        return self.words_1W.reshape(-1)

    def accept(self, token: int) -> None:
        """Raises RuntimeError for a token that was not allowed."""
        if not self.matcher.accept_token(token):
            raise RuntimeError(f"token {token} does not continue the grammar")

    @property
    def ended(self) -> bool:
        """Whether the newest token was an end token."""
        return bool(self.matcher.is_terminated())


class Grammars:
    """Compiles grammars for one tokenizer. `compile` may run in a thread: it holds no lock that a step needs."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        if not available():
            raise UnsupportedError(
                "structured answers need the package xgrammar", where="response_format",
                remedy="Ask the operator for: pip install 'moesaic[grammar]'.",
            )  # fmt: skip
        import xgrammar

        self.vocab, self.library = vocab, xgrammar
        texts = [b"" if i in tokenizer.special_ids else tokenizer.token_bytes(i) for i in range(vocab)]
        self.compiler = self.compiler_of(texts)
        # JSON escapes control characters; where a schema bounds a string's length, xgrammar does not.
        self.json_compiler = self.compiler_of([b"" if any(byte < 32 for byte in text) else text for text in texts])

    def compiler_of(self, texts: list[bytes]) -> Any:
        """texts: of each token; empty for one that never comes."""
        kind = self.library.VocabType.RAW
        info = self.library.TokenizerInfo(texts, kind, vocab_size=self.vocab, stop_token_ids=[])
        return self.library.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES // 2)

    def compile(self, kind: str, text: str) -> Any:
        """kind: one of KINDS; text: a JSON schema, a regular expression, or a JSON list of texts.

        Raises RequestError where xgrammar does not understand it.
        """
        try:
            if kind == "json_object":
                return self.json_compiler.compile_json_schema('{"type": "object"}', any_whitespace=False)
            if kind == "json_schema":
                return self.json_compiler.compile_json_schema(text, any_whitespace=False)  # or a model may never stop
            if kind == "regex":
                return self.compiler.compile_regex(text)
            return self.compiler.compile_grammar(self.library.Grammar.from_ebnf(choices(json.loads(text))))
        except Exception as error:  # xgrammar's own types are RuntimeError and ValueError, today
            reason = SOURCE.sub("", str(error).strip()).splitlines()
            raise RequestError(
                f"cannot be compiled ({reason[0] if reason else type(error).__name__})", where=field_of(kind),
                remedy="Correct or simplify it.",
            ) from error  # fmt: skip

    def guide(self, compiled: Any, stops: Iterable[int]) -> Matcher:
        """stops: the tokens that end the answer; they are allowed where the grammar is complete."""
        matcher = self.library.GrammarMatcher(compiled, override_stop_tokens=sorted(stops))
        return Matcher(matcher, self.vocab)


def field_of(kind: str) -> str:
    """The field of a request that a kind of grammar comes from."""
    return "response_format" if kind.startswith("json") else kind


def choices(texts: Iterable[str]) -> str:
    """The grammar of one of several texts, each exactly as it is."""
    return "root ::= " + " | ".join(f'"{"".join(map(escaped, text))}"' for text in texts)


def escaped(char: str) -> str:
    return char if char.isascii() and char.isalnum() else f"\\U{ord(char):08x}"
