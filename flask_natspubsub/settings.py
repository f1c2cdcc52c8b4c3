"""Every ``NATSPUBSUB_*`` key in one table: default, check, help.

``Settings.from_config`` reads ``app.config`` once, in ``init_app``; later changes of the
config are not seen. The documentation's configuration page is generated from this table.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from .errors import ConfigurationError
from .messages.subjects import RESERVED_APP_NAMES, slug

PREFIX = "NATSPUBSUB_"
MASK = "***"

Parser = Callable[[Any], Any]


class _Invalid(ValueError):
    """What is allowed, in words; becomes a ConfigurationError with key and value."""


def setting(default: Any, parse: Parser, help_text: str, *, secret: bool = False) -> Any:
    """Declare one row of the table."""
    metadata = {"parse": parse, "help": help_text, "secret": secret}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# --- what a value may be -----------------------------------------------------------------


def _optional(parse: Parser) -> Parser:
    return lambda value: None if value is None else parse(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Invalid("True or False")
    return value


def _integer(minimum: int) -> Parser:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise _Invalid(f"a whole number, {minimum} or more")
        return value

    return parse


def seconds(value: Any) -> float:
    """Turn seconds (int or float) or a timedelta into seconds; ValueError if negative."""
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e10:
        raise _Invalid("a number of seconds, or a timedelta, not negative")
    return float(value)


def _positive_seconds(value: Any) -> float:
    result = seconds(value)
    if result == 0:
        raise _Invalid("a number of seconds, or a timedelta, greater than 0")
    return result


def backoff(value: Any) -> tuple[float, ...]:
    """Turn a list of delays into seconds; the last one repeats."""
    if isinstance(value, (int, float, dt.timedelta)) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise _Invalid("a list of seconds (the last one repeats), such as [1, 5, 15]")
    return tuple(seconds(item) for item in value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Invalid("a text, not empty")
    return value


def _token(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", value):
        raise _Invalid("letters, digits, '_' and '-' (it becomes one token of a subject)")
    return value


def _app_name(value: Any) -> str:
    name = _token(value)
    if name.lower() in RESERVED_APP_NAMES:
        raise _Invalid("any name but 'dlq' and 'events', which the streams use themselves")
    return name


def _header_name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value):
        raise _Invalid("the name of an HTTP header")
    return value


def _url_prefix(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("/") or value.rstrip("/") == "":
        raise _Invalid("a path such as '/health'")
    return value.rstrip("/")


_SCHEMES = ("nats", "tls", "ws", "wss", "memory")


def _urls(value: Any) -> tuple[str, ...]:
    allowed = "a server's URL such as 'nats://127.0.0.1:4222', a list of them, or 'memory://'"
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)) or not value:
        raise _Invalid(allowed)
    urls = tuple(_url(item.strip() if isinstance(item, str) else item, allowed) for item in value)
    if len({url.startswith("memory:") for url in urls}) > 1:
        raise _Invalid("either 'memory://' or servers, not both")
    return urls


def _url(value: Any, allowed: str) -> str:
    if not isinstance(value, str) or not value:
        raise _Invalid(allowed)
    url = value if "://" in value else f"nats://{value}"
    try:
        parts = urlsplit(url)
        known = parts.scheme in _SCHEMES and (parts.scheme == "memory" or parts.hostname)
        _ = parts.port
    except ValueError:
        known = False
    if not known:
        raise _Invalid(allowed)
    return url


def _subscribers(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) and v for v in value):
        raise _Invalid("a list of module names such as ['shop.subscribers']")
    return tuple(value)


_STREAM_KEYS: dict[str, Parser] = {
    "max_msgs": _integer(-1),
    "max_bytes": _integer(-1),
    "max_age": seconds,
    "storage": lambda value: _choice(value, ("file", "memory")),
    "replicas": _integer(1),
    "duplicate_window": seconds,
    "discard": lambda value: _choice(value, ("old", "new")),
}


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise _Invalid(" or ".join(repr(choice) for choice in choices))
    return str(value)


def _stream_config(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _Invalid(f"a dict with keys from {', '.join(_STREAM_KEYS)}")
    parsed = {}
    for key, item in value.items():
        if key not in _STREAM_KEYS:
            raise _Invalid(f"keys from {', '.join(_STREAM_KEYS)}; not {key!r}")
        try:
            parsed[key] = _STREAM_KEYS[key](item)
        except _Invalid as error:
            raise _Invalid(f"{error} for {key!r}") from None
    return parsed


_PRESETS: dict[str, dict[str, Any]] = {
    "development": {"concurrency": 4, "backoff": (1.0, 2.0, 5.0)},
    "testing": {
        "env": "test",
        "urls": ("memory://",),
        "concurrency": 1,
        "backoff": (0.01,),
        "shutdown_timeout": 5.0,
    },
    "production": {"env": "production", "auto_setup": True},
}

_HOUR = 3600.0
_DAY = 24 * _HOUR


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one application; durations are seconds."""

    urls: tuple[str, ...] = setting(
        ("nats://127.0.0.1:4222",),
        _urls,
        "Servers to connect to: a URL or a list of URLs. `memory://` is a broker inside the "
        "process, for tests and single-process demos.",
        secret=True,
    )
    env: str = setting(
        "development", _token, "First token of every subject; keeps environments apart."
    )
    app_name: str = setting(
        "",
        _app_name,
        "Second token of every subject and the `producer` of messages. Default: the Flask "
        "app's name, slugged.",
    )
    preset: str | None = setting(
        None,
        _optional(lambda value: _choice(value, tuple(_PRESETS))),
        "A set of defaults: `development`, `testing` (memory broker) or `production`. "
        "Keys set explicitly win.",
    )
    user: str | None = setting(None, _optional(_text), "User name.")
    password: str | None = setting(None, _optional(_text), "Password.", secret=True)
    token: str | None = setting(None, _optional(_text), "Authentication token.", secret=True)
    nkey_seed_file: str | None = setting(
        None, _optional(_text), "File with an NKey seed (needs the extra `nkeys`)."
    )
    credentials_file: str | None = setting(
        None, _optional(_text), "Credentials file (JWT and seed; needs the extra `nkeys`)."
    )
    tls_ca_file: str | None = setting(
        None, _optional(_text), "CA certificates (PEM) to check the server with."
    )
    tls_cert_file: str | None = setting(None, _optional(_text), "Client certificate (PEM).")
    tls_key_file: str | None = setting(None, _optional(_text), "Key of the client certificate.")
    tls_hostname: str | None = setting(
        None, _optional(_text), "Host name the server's certificate must carry, if not the URL's."
    )
    connect_timeout: float = setting(
        2.0, _positive_seconds, "Longest wait for one server to accept a connection."
    )
    publish_timeout: float = setting(
        5.0, _positive_seconds, "Longest wait for a direct publish to be stored."
    )
    stream_name: str | None = setting(
        None, _optional(_token), "Name of the main stream. Default: `{env}-events-stream`."
    )
    stream_config: Mapping[str, Any] = setting(
        {},
        _stream_config,
        "How the main stream is created: max_msgs, max_bytes, max_age, storage, replicas, "
        "duplicate_window, discard. An existing stream is never changed by it.",
    )
    auto_setup: bool = setting(
        True, _boolean, "Create missing streams and add missing subjects on first connect."
    )
    concurrency: int = setting(
        10, _integer(1), "Handler threads of a worker; at most so many messages at once."
    )
    max_deliver: int = setting(
        5, _integer(1), "Deliveries after which a message becomes a dead letter."
    )
    ack_wait: float = setting(
        30.0,
        _positive_seconds,
        "Time after which the server redelivers a message it hears nothing of.",
    )
    backoff: tuple[float, ...] = setting(
        (1.0, 5.0, 15.0, 30.0, 60.0),
        backoff,
        "Waits before the redeliveries of a failed message; the last repeats; jitter is added.",
    )
    handler_timeout: float = setting(
        60.0, _positive_seconds, "Time limit of a handler; after it the message is retried."
    )
    shutdown_timeout: float = setting(
        30.0, seconds, "How long a stopping worker waits for running handlers."
    )
    use_dlq: bool = setting(True, _boolean, "Keep messages given up on in the dead letter stream.")
    breaker_threshold: int = setting(
        10, _integer(0), "Failed direct publishes in a row that open the circuit; 0: never."
    )
    breaker_reset: float = setting(
        5.0, _positive_seconds, "Time after which an open circuit lets one publish try again."
    )
    subscribers: tuple[str, ...] = setting(
        (), _subscribers, "Modules and packages to import for their subscribers."
    )
    trace_header: str = setting(
        "X-Trace-ID", _header_name, "HTTP header that carries the trace id in and out."
    )
    health_url_prefix: str | None = setting(
        None, _optional(_url_prefix), "Where to mount the health endpoints, such as `/health`."
    )

    #: Where each value came from: ``"default"``, ``"preset NAME"`` or ``"config"``.
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], app_import_name: str) -> Settings:
        """Read and check all ``NATSPUBSUB_*`` keys.

        :param config: the Flask config.
        :param app_import_name: the app's name, the default of ``NATSPUBSUB_APP_NAME``.
        :raises ConfigurationError: a bad value: says key, value (secrets masked) and what
            is allowed.
        """
        _warn_unknown_keys(config)
        preset_name = _parse_one("preset", config.get(PREFIX + "PRESET"))
        preset = _PRESETS.get(preset_name or "", {})
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for field in table():
            key = PREFIX + field.name.upper()
            if config.get(key) is not None:
                values[field.name] = _parse_one(field.name, config[key])
                sources[field.name] = "config"
            elif field.name in preset:
                values[field.name] = preset[field.name]
                sources[field.name] = f"preset {preset_name}"
            else:
                sources[field.name] = "default"
        if "app_name" not in values:
            values["app_name"] = _parse_one("app_name", slug(app_import_name))
        settings = cls(**values, sources=sources)
        settings._check_together()
        return settings

    def _check_together(self) -> None:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ConfigurationError(
                "NATSPUBSUB_TLS_CERT_FILE and NATSPUBSUB_TLS_KEY_FILE belong together.",
                "Set both, or neither.",
            )
        if self.user and self.token:
            raise ConfigurationError(
                "NATSPUBSUB_USER and NATSPUBSUB_TOKEN are both set.", "Use one way to sign in."
            )

    @property
    def stream(self) -> str:
        """Name of the main stream."""
        return self.stream_name or f"{self.env}-events-stream"

    @property
    def dead_letter_stream(self) -> str:
        """Name of the dead letter stream."""
        return f"{self.stream}-dlq"

    @property
    def safe_urls(self) -> str:
        """The servers, without passwords, for errors and logs."""
        return ", ".join(mask_url(url) for url in self.urls)

    def rows(self) -> list[tuple[str, str, str]]:
        """Key, value as text (secrets masked) and source of every setting."""
        return [
            (PREFIX + f.name.upper(), masked(f, getattr(self, f.name)), self.sources[f.name])
            for f in table()
        ]

    def __repr__(self) -> str:
        return f"<Settings {self.env}.{self.app_name} at {self.safe_urls}>"


def table() -> list[dataclasses.Field[Any]]:
    """Return the rows of the table, in order; ``metadata`` has ``help`` and ``secret``."""
    return [field for field in dataclasses.fields(Settings) if "parse" in field.metadata]


def masked(field: dataclasses.Field[Any], value: Any) -> str:
    """Return ``value`` as text that may be shown: no password, no token."""
    if field.name == "urls" and isinstance(value, (str, list, tuple)):
        urls = [value] if isinstance(value, str) else value
        return ", ".join(mask_url(str(url)) for url in urls)
    if field.metadata["secret"] and value is not None:
        return MASK
    return repr(value)


def mask_url(url: str) -> str:
    """Return ``url`` with user information replaced."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return MASK
    if "@" not in url:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{MASK}@{host}"))


def _parse_one(name: str, value: Any) -> Any:
    field = next(field for field in table() if field.name == name)
    try:
        return field.metadata["parse"](value)
    except _Invalid as error:
        raise ConfigurationError(
            f"{PREFIX}{name.upper()} is {masked(field, value)}.", f"Allowed: {error}."
        ) from None


def _warn_unknown_keys(config: Mapping[str, Any]) -> None:
    known = [PREFIX + field.name.upper() for field in table()]
    for key in config:
        if not key.startswith(PREFIX) or key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        warnings.warn(f"unknown setting {key}{hint}", stacklevel=5)
