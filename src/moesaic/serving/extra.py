"""The packages that serving needs beyond those of the engine."""

from __future__ import annotations

from importlib.util import find_spec

from moesaic.errors import UnsupportedError

PACKAGES = ("starlette", "uvicorn", "httptools", "pydantic", "prometheus_client", "msgpack", "yaml")


def require() -> None:
    """Raises UnsupportedError, with the command that helps, where one is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"needs packages that are not installed: {', '.join(missing)}",
            where="moesaic serve", remedy="pip install 'moesaic[serve]'",
        )  # fmt: skip
