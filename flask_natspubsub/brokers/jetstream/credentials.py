"""Who this process is for the server, and whether the server is who it should be."""

from __future__ import annotations

import importlib.util
import os
import ssl
from typing import Any
from urllib.parse import unquote, urlsplit

from ...config.settings import Settings
from ...errors import ConfigurationError

#: Parts of what OpenSSL says when a handshake fails, and what to do about it.
_TLS_ADVICE = (
    ("issuer", "Set NATSPUBSUB_TLS_CA_FILE to the authority that signed the server's certificate"),
    ("self-signed", "Set NATSPUBSUB_TLS_CA_FILE to the authority that the server's belongs to"),
    ("mismatch", "Use the host that the certificate names, or set NATSPUBSUB_TLS_HOSTNAME to it"),
    ("expired", "It is the server's: renew it"),
    ("not yet valid", "Look at the clocks of this machine and of the one that made it"),
    ("alert", "Set NATSPUBSUB_TLS_CERT_FILE and _TLS_KEY_FILE to a certificate the server accepts"),
)


def check_credentials(settings: Settings) -> None:
    """Check what needs no server: files are readable, optional packages are installed.

    :raises ConfigurationError: it names the key.
    """
    for key in ("nkey_seed_file", "credentials_file", "tls_ca_file", "tls_cert_file"):
        path = getattr(settings, key)
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigurationError(
                f"NATSPUBSUB_{key.upper()} is {path!r}, which cannot be read.", "Correct the path."
            )
    if any(urlsplit(url).scheme in ("ws", "wss") for url in settings.urls):
        _check_websocket()
    if settings.nkey_seed_file or settings.credentials_file:
        try:
            import nkeys  # noqa: F401
        except ImportError:
            raise ConfigurationError(
                "NKeys and credentials files need the package nkeys.",
                "pip install 'Flask-NatsPubsub[nkeys]'",
            ) from None


def _check_websocket() -> None:
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigurationError(
            "NATSPUBSUB_URLS has a ws:// or wss:// URL, which needs the package aiohttp.",
            "pip install aiohttp, or use a nats:// or tls:// URL.",
        )


def credentials_for(settings: Settings, url: str) -> dict[str, Any]:
    """Return the options of nats-py's ``connect`` that sign in at ``url`` and secure it."""
    # The servers that a cluster advertises come without user information and host names: they
    # get those of the first configured URL.
    configured = urlsplit(url if url in settings.urls else settings.urls[0])
    options: dict[str, Any] = {
        "user": settings.user,
        "password": settings.password,
        "token": settings.token,
        "nkeys_seed": settings.nkey_seed_file,
        "user_credentials": settings.credentials_file,
    }
    if configured.username and configured.password:
        options |= {
            "user": unquote(configured.username),
            "password": unquote(configured.password),
        }
    elif configured.username:
        options["token"] = unquote(configured.username)
    if wants_tls(settings, url):
        options["tls"] = _tls_context(settings)
        options["tls_hostname"] = settings.tls_hostname or configured.hostname
    return {name: value for name, value in options.items() if value is not None}


def wants_tls(settings: Settings, url: str) -> bool:
    """Whether the URL or a setting asks for TLS; if so, nothing is sent without it."""
    asked = settings.tls_ca_file or settings.tls_cert_file or settings.tls_hostname
    return asked is not None or urlsplit(url).scheme in ("tls", "wss")


def _tls_context(settings: Settings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.tls_ca_file)
    if settings.tls_cert_file and settings.tls_key_file:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    return context


def tls_problem(problem: str) -> str:
    """Add what to do about it to OpenSSL's reason for a failed handshake."""
    return next(
        (f"TLS failed, {problem}. {advice}" for words, advice in _TLS_ADVICE if words in problem),
        f"TLS failed, {problem}",
    )
