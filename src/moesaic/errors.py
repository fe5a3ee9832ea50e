"""The typed errors.

Every failure that a user can cause is one of these. Each carries *what* was wrong, *where* (a file, a tensor, a
field, an option) and the *remedy*. The command line prints them as one line and exits with `exit_code`; a server
answers with `http_status`. A traceback reaching a user is a bug.
"""

from __future__ import annotations


class MoesaicError(Exception):
    """Base of all user-facing failures.

    what: one sentence without a final period.  where: the file, tensor, field or option concerned.
    remedy: what the user can do about it.
    """

    http_status = 500
    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(self.one_line())

    def one_line(self) -> str:
        """`where: what. remedy` on a single line, whatever control characters the parts contain."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.remedy:
            text = f"{text.rstrip('.')}. {self.remedy}"
        return " ".join(text.split())


class OptionError(MoesaicError):
    """An option, flag or configuration value that is unknown or cannot be honoured."""

    http_status = 400
    exit_code = 2


class CheckpointError(MoesaicError):
    """A checkpoint that is incomplete, inconsistent, malformed or hostile."""

    exit_code = 3


class UnsupportedError(MoesaicError):
    """A well-formed thing that Moesaic cannot run: an unknown architecture, format or hardware."""

    http_status = 400
    exit_code = 4


class RequestError(MoesaicError):
    """One request that cannot be served; nobody else's is affected."""

    http_status = 400
    exit_code = 5


class CapacityError(MoesaicError):
    """Not enough memory or cache for what was asked."""

    http_status = 503
    exit_code = 6
