"""The settings of one application, read from its ``NATSPUBSUB_*`` keys.

``Settings.from_config`` reads ``app.config`` once, in ``init_app``; later changes of the config
are not seen. What each setting is stands in ``groups``; the documentation's configuration page is
generated from it.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigurationError
from ..messages.subjects import slug
from . import parsers
from .groups import PRESETS, AppSettings
from .table import Row, rows_of

PREFIX = "NATSPUBSUB_"
MASK = "***"


class Settings(AppSettings, frozen=True, kw_only=True, eq=False):
    """The settings of one application; durations are seconds."""

    #: Where each value came from: ``"default"``, ``"preset NAME"`` or ``"config"``.
    sources: Mapping[str, str] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], app_import_name: str) -> Settings:
        """Read and check all ``NATSPUBSUB_*`` keys.

        :param config: the Flask config.
        :param app_import_name: the app's name, the default of ``NATSPUBSUB_APP_NAME``.
        :raises ConfigurationError: a bad value: says key, value (secrets masked) and what
            is allowed.
        """
        _warn_unknown_keys(config)
        _warn_unread_environment(config)
        preset_name = _parse_one("preset", config.get(PREFIX + "PRESET"))
        preset = PRESETS.get(preset_name or "", {})
        found: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name in TABLE:
            key = PREFIX + name.upper()
            if config.get(key) is not None:
                found[name] = _parse_one(name, config[key])
                sources[name] = "config"
            elif name in preset:
                found[name] = preset[name]
                sources[name] = f"preset {preset_name}"
            else:
                sources[name] = "default"
        if "app_name" not in found:
            found["app_name"] = _parse_one("app_name", _own_name(app_import_name))
        settings = cls(**found, sources=sources)
        settings._check_together()
        return settings

    def _check_together(self) -> None:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ConfigurationError(
                "NATSPUBSUB_TLS_CERT_FILE and NATSPUBSUB_TLS_KEY_FILE belong together.",
                "Set both, or neither.",
            )
        if self.use_outbox and self.stream_config.get("storage") == "memory":
            self._refuse_memory()
        if self.jetstream_domain and self.jetstream_api_prefix:
            raise ConfigurationError(
                "NATSPUBSUB_JETSTREAM_DOMAIN and NATSPUBSUB_JETSTREAM_API_PREFIX are both set.",
                "A domain is short for the prefix $JS.{domain}.API: set one of them.",
            )
        if self.user and self.token:
            raise ConfigurationError(
                "NATSPUBSUB_USER and NATSPUBSUB_TOKEN are both set.", "Use one way to sign in."
            )

    def _refuse_memory(self) -> None:
        if not self.allow_volatile_streams and not self.urls[0].startswith("memory:"):
            raise ConfigurationError(
                "NATSPUBSUB_STREAM_CONFIG has storage 'memory', and the outbox is on: what the "
                "stream acknowledges would be gone with the server.",
                "Use storage 'file', or set NATSPUBSUB_ALLOW_VOLATILE_STREAMS.",
            )

    @property
    def stream(self) -> str:
        """Name of the main stream."""
        return self.stream_name or f"{self.env}-events-stream"

    @property
    def api_prefix(self) -> str:
        """First tokens of the subjects of JetStream's API."""
        domain = f"$JS.{self.jetstream_domain}.API" if self.jetstream_domain else "$JS.API"
        return self.jetstream_api_prefix or domain

    @property
    def dead_letter_stream(self) -> str:
        """Name of the dead letter stream."""
        return f"{self.stream}-dlq"

    @property
    def safe_urls(self) -> str:
        """The servers, without passwords, for errors and logs."""
        return ", ".join(mask_url(url) for url in self.urls)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return key, value as a string (secrets masked) and source of every setting."""
        return [
            (PREFIX + name.upper(), masked(name, getattr(self, name)), self.sources[name])
            for name in TABLE
        ]

    def __repr__(self) -> str:
        return f"<Settings {self.env}.{self.app_name} at {self.safe_urls}>"


#: The row of each setting by its name, in order.
TABLE: Mapping[str, Row] = rows_of(Settings)


def masked(name: str, value: Any) -> str:
    """Return the value of a setting as a string that may be shown: no password, no token."""
    if name == "urls" and isinstance(value, (str, list, tuple)):
        urls = [value] if isinstance(value, str) else value
        return ", ".join(mask_url(str(url)) for url in urls)
    if TABLE[name].secret and value is not None:
        return MASK
    return repr(value)


def mask_url(url: str) -> str:
    """Return ``url`` with everything before its last ``@`` masked; it need not be valid."""
    scheme, found, rest = url.rpartition("://") if url.count("://") == 1 else ("", "", url)
    if "@" not in rest:
        return url
    return f"{scheme}{found}{MASK}@{rest.rpartition('@')[2]}"


def _parse_one(name: str, value: Any) -> Any:
    try:
        return TABLE[name].parse(value)
    except parsers.Invalid as error:
        raise ConfigurationError(
            f"{PREFIX}{name.upper()} is {masked(name, value)}.", f"Allowed: {error}."
        ) from None


def _own_name(app_import_name: str) -> str:
    """Return the app's name as a token; ConfigurationError if it has no letter for that.

    Otherwise all apps with names in another script would share one name.
    """
    if not app_import_name.isascii() and not re.search("[A-Za-z0-9]", app_import_name):
        raise ConfigurationError(
            f"The app's name {app_import_name!r} has no letter that a subject may have.",
            "Set NATSPUBSUB_APP_NAME: letters, digits, '_' and '-'.",
        )
    return slug(app_import_name)


def _warn_unknown_keys(config: Mapping[str, Any]) -> None:
    known = [PREFIX + name.upper() for name in TABLE]
    for key in config:
        if not key.startswith(PREFIX) or key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        warnings.warn(f"unknown setting {key}{hint}", stacklevel=5)


def _warn_unread_environment(config: Mapping[str, Any]) -> None:
    """Warn of settings in the environment that the application has not read."""
    names = {name: name.removeprefix("FLASK_").partition("__")[0] for name in os.environ}
    unread = [
        name
        for name, key in names.items()
        if name.startswith(f"FLASK_{PREFIX}") and key not in config
    ]
    if unread:
        warnings.warn(
            f"{', '.join(sorted(unread))}: set in the environment, and not in app.config. Call "
            "app.config.from_prefixed_env() before init_app.",
            stacklevel=5,
        )
