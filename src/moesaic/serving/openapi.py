"""The OpenAPI 3.1 document of the server, from its types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from moesaic import __version__
from moesaic.serving.answers import ErrorAnswer

STATUS = {200: "done", 400: "the request is wrong", 401: "no valid API key", 404: "no such model", 409: "in use",
          413: "the body is too large", 415: "the body is not JSON", 429: "the queue is full", 
          500: "the request failed", 503: "not ready", 504: "took too long"}  # fmt: skip
PLACES = "#/components/schemas/{model}"


class Operation(NamedTuple):
    method: str
    path: str
    about: str
    gives: type[BaseModel] | None
    takes: type[BaseModel] | None
    errors: tuple[int, ...]
    streams: type[BaseModel] | None
    keyed: bool


def document(operations: Sequence[Operation], names: Sequence[str]) -> dict[str, Any]:
    """names: the only values that `model` may have."""
    taken = {op.takes for op in operations if op.takes}
    given = {kind for op in operations for kind in (op.gives, op.streams, ErrorAnswer) if kind}
    wanted: list[Any] = [(kind, "validation") for kind in sorted(taken, key=str)]
    wanted += [(kind, "serialization") for kind in sorted(given, key=str)]
    refs, definitions = models_json_schema(wanted, ref_template=PLACES)
    schemas = definitions["$defs"]
    for kind in taken:
        field = schemas[refs[kind, "validation"]["$ref"].rsplit("/", 1)[1]]["properties"].get("model")
        if field is not None:
            whole = {"type": "string", "enum": list(names)}
            field.clear()
            field |= whole if kind.model_fields["model"].is_required() else {"anyOf": [whole, {"type": "null"}]}
    paths: dict[str, Any] = {}
    for op in operations:
        paths.setdefault(op.path, {})[op.method.lower()] = operation(op, refs, names)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Moesaic", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def event(chunk: Any, refs: Any) -> dict[str, Any]:
    """A server-sent event: a chunk as JSON, an error that ends the stream, or the text that says it is complete."""
    said = {"anyOf": [chunk, refs[ErrorAnswer, "serialization"]]}
    data = {"anyOf": [{"const": "[DONE]"},
                      {"type": "string", "contentMediaType": "application/json", "contentSchema": said}]}  # fmt: skip
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}


def operation(op: Operation, refs: Any, names: Sequence[str]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if op.gives is not None:
        content = {"application/json": {"schema": refs[op.gives, "serialization"]}}
    elif op.path.endswith(".json"):
        content = {"application/json": {"schema": {"type": "object"}}}
    if op.streams is not None:
        content["text/event-stream"] = {"schema": event(refs[op.streams, "serialization"], refs)}
    statuses = sorted({*op.errors, *((401,) if op.keyed else ())})
    failure = {"application/json": {"schema": refs[ErrorAnswer, "serialization"]}}
    if op.path in ("/health", "/ready"):
        failure = content
    found: dict[str, Any] = {
        "summary": op.about,
        "operationId": re.sub(r"\W+", "_", op.path).strip("_"),
        "responses": {"200": {"description": STATUS[200], "content": content}}
        | {str(status): {"description": STATUS[status], "content": failure} for status in statuses},
    }
    if op.takes is not None:
        body = {"application/json": {"schema": refs[op.takes, "validation"]}}
        found["requestBody"] = {"required": True, "content": body}
    if "{model}" in op.path:
        found["parameters"] = [{"name": "model", "in": "path", "required": True,
                                "schema": {"type": "string", "enum": list(names)}}]  # fmt: skip
    if op.keyed:
        found["security"] = [{"key": []}]
    return found
