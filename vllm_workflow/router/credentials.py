"""Keys: made, kept as hashes, read from where they are kept, and compared.

A key made here is `vw-ID-SECRET`. The ID finds its entry and is no secret; the SECRET has 256
random bits. That is why one round of salted SHA-256 is enough at rest: the slow hashes (scrypt,
argon2) make guessing dear, and 2^256 guesses need no help. A slow hash would cost tens of
milliseconds per call, which anybody without a key could make the router spend.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from vllm_workflow.core.errors import ConfigError

MIN_KEY_LENGTH = 20
"""Of keys that were not made here: shorter ones could be guessed."""
_MADE_HERE = re.compile(r"vw-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_HASH = re.compile(r"sha256:([0-9a-f]{12}):([0-9a-f]{32}):([0-9a-f]{64})")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_USABLE = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class KeyHash:
    """What is kept of a key."""

    key_id: str
    """Empty for a key that was not made here."""
    salt: bytes
    digest: bytes

    def matches(self, key: str) -> bool:
        """Compare in a time that does not tell how much of the key is right."""
        return hmac.compare_digest(_digest(self.salt, key), self.digest)

    def __str__(self) -> str:
        return f"sha256:{self.key_id}:{self.salt.hex()}:{self.digest.hex()}"

    @classmethod
    def of(cls, key: str) -> KeyHash:
        """Hash a key with a new salt."""
        salt = secrets.token_bytes(16)
        return cls(key_id(key), salt, _digest(salt, key))

    @classmethod
    def parse(cls, text: str) -> KeyHash:
        """Read what `vllm-workflow key new` printed.

        Raises:
            ValueError: It is something else; the text does not repeat it.
        """
        found = _HASH.fullmatch(text)
        if found is None:
            raise ValueError(
                "expected sha256:ID:SALT:DIGEST as `vllm-workflow key new` prints it, got "
                f"{len(text)} other characters (not repeated here, they may be a key)"
            )
        return cls(found[1], bytes.fromhex(found[2]), bytes.fromhex(found[3]))


def new_key() -> str:
    """Return a key that nobody else has."""
    return f"vw-{secrets.token_hex(6)}-{secrets.token_urlsafe(32)}"


def key_id(key: str) -> str:
    """Return the public part of a key made here; empty for another one."""
    found = _MADE_HERE.fullmatch(key)
    return found[1] if found else ""


def read_key(env: str, file: str, *, min_length: int = MIN_KEY_LENGTH) -> str:
    """Return a key from an environment variable, or from a file.

    Args:
        env: Name of the variable; empty to read the file.
        file: Path of a file that holds the key and nothing else.
        min_length: Characters it must have.

    Raises:
        ConfigError: There is none, or it cannot be used; the text does not repeat it.
    """
    if env:
        if not _VARIABLE.fullmatch(env):
            raise ConfigError(
                f"expected the name of an environment variable, got {len(env)} other characters "
                "(not repeated here, they may be a key)"
            )
        where, key = f"environment variable {env}", os.environ.get(env, "")
        if not key:
            raise ConfigError(f"{where}: expected a key, got none")
    else:
        where = f"file {file}"
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
            raise ConfigError(f"{where}: cannot read a key: {reason}") from None
    if len(key) < min_length or not _USABLE.fullmatch(key):
        raise ConfigError(
            f"{where}: expected a key of at least {min_length} printable ASCII characters "
            f"without blanks, got {len(key)} characters"
            + ("" if _USABLE.fullmatch(key) else ", others among them")
        )
    return key


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode("utf-8", "surrogateescape")).digest()
