"""API keys: hashed, compared in constant time, and what one of them may use."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pi0.reading import read_text

ENVIRONMENT = "PI0_API_KEYS"
MAX_FILE = 1 << 20
SHORTEST = 16  # characters


class Keys:
    """Names by the SHA-256 of their key. Without any, everybody is "anyone"."""

    def __init__(self, digests: Mapping[str, bytes]):
        self._digests = dict(digests)

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def parse(cls, text: str, where: str) -> Keys:
        """One key in a line: `NAME KEY` or `NAME sha256:HEX`; # begins a comment. Raises ValueError."""
        digests: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            parts = line.partition("#")[0].split()
            if not parts:
                continue
            if len(parts) != 2:
                raise ValueError(f"{where}: line {number} is not NAME KEY")
            name, key = parts
            if name in digests:
                raise ValueError(f"{where}: line {number} has the name {name!r} a second time")
            if key.startswith("sha256:"):
                if not re.fullmatch(r"sha256:[0-9a-f]{64}", key):
                    raise ValueError(f"{where}: line {number} is not sha256: and 64 hexadecimal digits")
                digests[name] = bytes.fromhex(key.removeprefix("sha256:"))
            elif len(key) < SHORTEST:
                raise ValueError(f"{where}: the key in line {number} has fewer than {SHORTEST} characters")
            else:
                digests[name] = _digest(key)
        if not digests:
            raise ValueError(f"{where} has no keys")
        return cls(digests)

    @classmethod
    def load(cls, file: Path) -> Keys:
        """The keys in a file. Raises OSError, and ValueError as `parse`."""
        return cls.parse(read_text(file, limit=MAX_FILE), str(file))

    def name(self, authorization: str) -> str | None:
        """Whose key a header has: `Api-Key KEY`, `Bearer KEY`, or the password of `Basic`; None for nobody's."""
        if not self._digests:
            return "anyone"
        kind, _, key = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                key = base64.b64decode(key.strip(), validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return None
        elif kind.lower() not in ("api-key", "bearer"):
            return None
        given, found = _digest(key.strip()), None
        for name, digest in self._digests.items():  # all of them, however early one fits
            if hmac.compare_digest(given, digest):
                found = name
        return found


class Rate:
    """At most `rate` requests per second on average, and as many at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self._clock = rate, clock
        self._left, self._last = max(rate, 1.0), clock()

    def take(self) -> bool:
        """Whether one more request may be taken now."""
        now = self._clock()
        self._left, self._last = min(self._left + (now - self._last) * self.rate, max(self.rate, 1.0)), now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
