"""What every request passes: its id, the key, one answer for any failure, one line in the log, one count."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Collection, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.errors import MoesaicError
from moesaic.serving.auth import Keys
from moesaic.serving.errors import HTTPError
from moesaic.serving.logs import log
from moesaic.serving.metrics import Metrics
from moesaic.serving.running import Disconnected, fail_stream

REQUEST_ID = re.compile(rb"[A-Za-z0-9_.\-]{1,128}")
QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Routes that machines ask every few seconds: not in the log."""


async def send_json(send: Send, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    body = json.dumps(value).encode()
    await send_bytes(send, body, "application/json", status, headers)


async def send_bytes(send: Send, body: bytes, kind: str, status: int = 200,
                     headers: Mapping[str, str] | None = None) -> None:  # fmt: skip
    fields = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    fields += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


class Gate:
    """ASGI middleware. routes: the paths that are counted by name; all others count as one."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, routes: Collection[str]) -> None:
        self.app, self.keys, self.metrics, self.routes = app, keys, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began, headers = time.perf_counter(), dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}".encode()
        note: dict[str, Any] = {}
        scope.update({"app": self, "moesaic.note": note, "moesaic.id": request_id.decode()})
        status = 0

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            self.keys.check(scope["path"], headers.get(b"authorization"))
            await self.app(scope, receive, labelled)
        except Disconnected:
            status = 499
        except Exception as error:
            await self.fail(error, scope, labelled, begun=status != 0)
        self.record(scope, status, time.perf_counter() - began)

    async def fail(self, error: Exception, scope: Scope, send: Send, *, begun: bool) -> None:
        """Answers with a failure. begun: in the middle of a stream."""
        failure = as_http(error)
        scope["moesaic.note"]["error"] = failure.message
        if failure.status == 500 and not isinstance(error, HTTPError):
            log.error("a defect of the server", exc_info=error, extra={"fields": {"request": scope["moesaic.id"]}})
        if begun:
            await fail_stream(failure, scope, send)
        else:
            await send_json(send, failure.body(), failure.status, failure.headers)

    def record(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in self.routes else "/v1/models" if path.startswith("/v1/models/") else "other"
        self.metrics.http.labels(route, str(status)).inc()
        if route in QUIET and status in (200, 503):
            return
        client = scope.get("client")
        fields = {"request": scope["moesaic.id"], "client": client[0] if client else None, "method": scope["method"],
                  "route": route, "status": status, "seconds": round(seconds, 4), **scope["moesaic.note"]}  # fmt: skip
        log.info("request", extra={"fields": fields})


def as_http(error: Exception) -> HTTPError:
    """Whatever went wrong, as an answer. What we did not foresee says nothing about itself."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, MoesaicError):
        return HTTPError.of(error)
    if isinstance(error, HTTPException):
        what = {404: "there is nothing at this path", 405: "this method is not allowed here"}
        return HTTPError(error.status_code, what.get(error.status_code, error.detail), headers=error.headers)
    return HTTPError(500, "the server made a mistake; its log has the details under this request's id")
