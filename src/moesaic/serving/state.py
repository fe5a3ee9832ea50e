"""What all handlers share: options, the session, and, once the model is there, its tokenizer and template."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from moesaic.engine.params import SamplingParams
from moesaic.serving.asking import params_for
from moesaic.serving.errors import HTTPError
from moesaic.serving.options import ServeConfig
from moesaic.serving.parsers.families import Reader
from moesaic.serving.session import Session
from moesaic.text.chat import ChatTemplate
from moesaic.text.tokenizer import Tokenizer


class State:
    """names: what clients may call the model; the first is what answers say."""

    def __init__(self, config: ServeConfig, session: Session, names: Sequence[str],
                 document: Callable[[], Mapping[str, Any]]) -> None:  # fmt: skip
        self.config, self.session, self.names, self.document = config, session, tuple(names), document
        self.created = int(time.time())

    def load(self) -> None:
        """Reads tokenizer and template from where the engine found the model; raises their errors."""
        path = Path(self.session.info["path"])
        self.tokenizer = Tokenizer.from_directory(path)
        self.template = ChatTemplate.from_directory(path, self.tokenizer.special_tokens)
        self.reader = Reader.of(self.template, self.config.tool_parser, self.config.reasoning_parser)

    @property
    def max_model_len(self) -> int:
        return int(self.session.info["max_model_len"])

    @cached_property
    def recommended(self) -> dict[str, Any]:
        """The checkpoint's sampling, where it differs from the engine's own defaults."""
        return dict(self.session.info["defaults"])

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: value for name, value in self.recommended.items() if name != "max_tokens"}

    def params(self, chosen: Mapping[str, Any], prompt: Sequence[int]) -> SamplingParams:
        return params_for(chosen, prompt, self.max_model_len, self.config, self.recommended.get("max_tokens"))

    def check_model(self, name: str) -> None:
        """Raises HTTPError: 503 while there is no model, 404 for another than that which is served."""
        self.session.check_open()
        if name not in self.names:
            raise HTTPError(404, f"the model {name[:200]!r} is not served here; this is {self.names[0]!r}",
                            param="model", code="model_not_found")  # fmt: skip

    def name(self, asked: str) -> str:
        return asked if asked in self.names else self.names[0]

    def model_card(self, name: str) -> dict[str, Any]:
        self.session.check_open()
        return {"id": name, "object": "model", "created": self.created, "owned_by": "moesaic",
                "max_model_len": self.max_model_len}  # fmt: skip
