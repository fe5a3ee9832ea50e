"""The application: a table of what is served, from which both the router and the OpenAPI document are made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from moesaic.serving import answers, openapi, routes, schema
from moesaic.serving.auth import OPEN, Keys
from moesaic.serving.gate import Gate
from moesaic.serving.routes import Call, Handler
from moesaic.serving.state import State


@dataclass(frozen=True)
class Entry:
    """One path. takes: its body.  gives: its JSON answer; None is plain text.  errors: statuses it may answer with.

    streams: the JSON of its events, where it can stream.
    """

    method: str
    path: str
    handler: Handler
    about: str
    gives: type[BaseModel] | None
    takes: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    streams: type[BaseModel] | None = None


BODY = (400, 404, 413, 415, 503)
RUNS = (*BODY, 429, 500, 504)
TABLE = (
    Entry("POST", "/v1/chat/completions", routes.chat, "Answer a conversation.", answers.ChatAnswer,
          schema.ChatRequest, RUNS, answers.ChatChunk),
    Entry("POST", "/v1/completions", routes.completions, "Continue prompts.", answers.TextAnswer,
          schema.CompletionRequest, RUNS, answers.TextChunk),
    Entry("GET", "/v1/models", routes.models, "The model that is served.", answers.ModelList, errors=(503,)),
    Entry("GET", "/v1/models/{model}", routes.model, "One of its names.", answers.Model, errors=(404, 503)),
    Entry("POST", "/tokenize", routes.tokenize, "Text to token ids.", answers.Tokenized, schema.TokenizeRequest, BODY),
    Entry("POST", "/detokenize", routes.detokenize, "Token ids to text.", answers.Detokenized,
          schema.DetokenizeRequest, BODY),
    Entry("GET", "/health", routes.health, "Whether the server should be kept.", answers.State, errors=(503,)),
    Entry("GET", "/ready", routes.ready, "Whether requests are taken.", answers.State, errors=(503,)),
    Entry("GET", "/plan", routes.plan, "The plan that the model was built from.", answers.Plan, errors=(503,)),
    Entry("GET", "/metrics", routes.metrics, "Prometheus metrics.", None),
    Entry("POST", "/flush_cache", routes.flush_cache, "Forget the prefix cache.", answers.State, errors=(409, 503)),
    Entry("GET", "/openapi.json", routes.openapi, "This document.", None),
)  # fmt: skip


class Endpoint:
    """A handler as an ASGI application."""

    def __init__(self, state: State, handler: Handler) -> None:
        self.state, self.handler = state, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.handler(Call(self.state, scope, receive, send))


def make_app(state: State, keys: Keys) -> ASGIApp:
    def path(entry: Entry) -> str:
        return entry.path.replace("{model}", "{model:path}")

    table = [Route(path(e), Endpoint(state, e.handler), methods=[e.method]) for e in TABLE]
    gate: ASGIApp = Gate(Router(table, redirect_slashes=False), keys, state.session.metrics, [e.path for e in TABLE])
    if state.config.cors_origin:
        return CORSMiddleware(gate, allow_origins=state.config.cors_origin, allow_methods=["GET", "POST"],
                              allow_headers=["*"], expose_headers=["x-request-id", "retry-after"])  # fmt: skip
    return gate


@cache
def document(names: tuple[str, ...], keyed: bool) -> dict[str, Any]:
    """The OpenAPI document. names: of the served model."""
    entries = [openapi.Operation(e.method, e.path, e.about, e.gives, e.takes, e.errors, e.streams,
                                 keyed and e.path not in OPEN) for e in TABLE]  # fmt: skip
    return openapi.document(entries, names)
