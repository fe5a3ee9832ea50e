"""Keys. Compared in constant time against all, as digests: neither the time nor the log tells anything about one."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from moesaic.serving.errors import HTTPError

OPEN = frozenset({"/health", "/ready"})
"""What is answered without a key: a load balancer has none."""


class Keys:
    """The keys that are let in; none: everybody is."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, path: str, authorization: bytes | None) -> None:
        """Raises HTTPError 401."""
        if not self._digests or path in OPEN:
            return
        scheme, _, given = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        found = False
        for known in self._digests:  # all of them, whichever matches
            found |= hmac.compare_digest(digest, known)
        if scheme.lower() != b"bearer" or not found:
            raise HTTPError(401, "a valid API key is needed, as `Authorization: Bearer KEY`", code="invalid_api_key",
                            headers={"www-authenticate": "Bearer"})  # fmt: skip
