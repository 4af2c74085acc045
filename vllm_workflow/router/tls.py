"""What connections are encrypted with, made from files that may change while the router runs.

A context is never changed once it is in use: what it trusts it would go on trusting. Other
files mean another context.
"""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from vllm_workflow.core.errors import ConfigError

_MAX_CONTEXTS = 256
"""Kept: instances mostly share a few."""


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """What connections to an instance are made with; equal if made from equal files."""

    digest: bytes
    context: ssl.SSLContext = field(compare=False, repr=False)


def digest_of(*files: str) -> bytes:
    """Return what tells the contents of files from other contents; names may be empty."""
    digest = hashlib.sha256()
    for file in files:
        try:
            content = Path(file).read_bytes() if file else b""
        except OSError:  # told of by whoever loads it
            content = b"unreadable"
        digest.update(f"{len(file)} {file} {len(content)} ".encode() + content)
    return digest.digest()


def upstream_tls(*, verify: bool, ca_file: str, cert_file: str, key_file: str) -> UpstreamTls:
    """Return what connections to an instance are made with; equal files are loaded once.

    Args:
        verify: False takes any certificate.
        ca_file: Who may have signed it; empty: the system's list.
        cert_file: What the router shows; empty: nothing.
        key_file: Of `cert_file`.

    Raises:
        ConfigError: A file cannot be used.
    """
    trusted = ca_file or ssl.get_default_verify_paths().cafile or ""
    digest = digest_of(trusted, cert_file, key_file)
    return UpstreamTls(digest, _upstream_context(verify, ca_file, cert_file, key_file, digest))


@lru_cache(maxsize=_MAX_CONTEXTS)
def _upstream_context(
    verify: bool, ca_file: str, cert_file: str, key_file: str, digest: bytes
) -> ssl.SSLContext:
    """Load files once for each `digest` of what they hold."""
    if ca_file:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _load_ca(context, ca_file, "ca_file")
    else:
        context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert_file:
        _load_chain(context, cert_file, key_file)
    return context


def server_context(cert_file: str, key_file: str, client_ca_file: str) -> ssl.SSLContext:
    """Return what connections of clients are taken with, anew each time.

    Args:
        cert_file: What the router shows, with intermediate certificates.
        key_file: Of `cert_file`.
        client_ca_file: Who must have signed what a client shows; empty: it need not.

    Raises:
        ConfigError: A file cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load_chain(context, cert_file, key_file)
    if client_ca_file:
        # Those of the system, which the line above has loaded none of, are not meant.
        _load_ca(context, client_ca_file, "client_ca_file")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@dataclass(slots=True)
class RenewableTls:
    """What connections of clients are taken with, each by what is in force when its handshake
    begins. Sessions of one context cannot be resumed with the next."""

    current: ssl.SSLContext
    """May be replaced."""


def _load_chain(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    try:
        # An encrypted key would be asked for on a terminal that nobody sits at.
        context.load_cert_chain(cert_file, key_file, password="")
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"cert_file, key_file: expected a certificate and its key in PEM without a password, "
            f"got {cert_file} and {key_file}: {_reason(e)}"
        ) from None


def _load_ca(context: ssl.SSLContext, file: str, where: str) -> None:
    try:
        context.load_verify_locations(file)
    except OSError as e:
        raise ConfigError(
            f"{where}: expected certificates in PEM, got {file}: {_reason(e)}"
        ) from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
