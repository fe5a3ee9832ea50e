"""Failures as HTTP answers, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.errors import MoesaicError

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 431: "invalid_request_error", 500: "server_error", 503: "service_unavailable_error",
    504: "timeout_error",
}  # fmt: skip


class HTTPError(Exception):
    """An answer other than the one that was asked for. param: the field at fault.  code: for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @classmethod
    def of(cls, error: MoesaicError) -> HTTPError:
        return cls.problem(error.http_status, error.what, error.where, error.remedy)

    @classmethod
    def problem(cls, status: int, what: str, where: str | None, remedy: str | None) -> HTTPError:
        """From the parts of a typed error."""
        text = f"{where}: {what}" if where else what
        text = f"{text.rstrip('.')}. {remedy}" if remedy else text
        return cls(status, " ".join(text.split()), param=where)

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, what: str) -> HTTPError:
    return HTTPError(400, f"{param}: {what}", param=param, code="invalid_value")


def unsupported(param: str, what: str) -> HTTPError:
    return HTTPError(400, f"{param}: {what}", param=param, code="unsupported_parameter")


def unavailable(what: str, seconds: int) -> HTTPError:
    return HTTPError(503, what, code="unavailable", headers={"retry-after": str(seconds)})


def busy(what: str, seconds: int) -> HTTPError:
    return HTTPError(429, what, code="queue_full", headers={"retry-after": str(seconds)})
