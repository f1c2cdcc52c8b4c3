"""Every ``NATSPUBSUB_*`` key in one table: default, check, help.

``Settings.from_config`` reads ``app.config`` once, in ``init_app``; later changes of the
config are not seen. The documentation's configuration page is generated from this table.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import ConfigurationError
from ..messages.subjects import slug
from . import parsers

PREFIX = "NATSPUBSUB_"
MASK = "***"


class Row(msgspec.Struct, frozen=True):
    """What the table has of a setting beside its name, type and default.

    :param parse: checks a value and gives it its final form.
    :param secret: whether the value must not be shown.
    """

    parse: parsers.Parser
    help: str
    secret: bool


_rows: list[Row] = []


def setting(default: Any, parse: parsers.Parser, help_text: str, *, secret: bool = False) -> Any:
    """Declare one row of the table."""
    _rows.append(Row(parse, help_text, secret))
    return default


_PRESETS: dict[str, dict[str, Any]] = {
    "development": {"concurrency": 4, "backoff": (1.0, 2.0, 5.0)},
    "testing": {
        "env": "test",
        "urls": ("memory://",),
        "concurrency": 1,
        "backoff": (0.01,),
        "shutdown_timeout": 5.0,
    },
    "production": {"env": "production"},
}

_DAY = 24 * 3600.0


class Settings(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The settings of one application; durations are seconds."""

    urls: tuple[str, ...] = setting(
        ("nats://127.0.0.1:4222",),
        parsers.urls,
        "Servers to connect to: a URL or a list of URLs. `memory://` is a broker inside the "
        "process, for tests and single-process demos.",
        secret=True,
    )
    env: str = setting(
        "development", parsers.token, "First token of every subject; keeps environments apart."
    )
    app_name: str = setting(
        "",
        parsers.app_name,
        "Second token of every subject and the `producer` of messages. Default: the Flask "
        "app's name, slugged.",
    )
    preset: str | None = setting(
        None,
        parsers.optional(lambda value: parsers.choice(value, tuple(_PRESETS))),
        "A set of defaults: `development`, `testing` (memory broker) or `production`. "
        "Keys set explicitly win.",
    )
    user: str | None = setting(None, parsers.optional(parsers.credential), "User name.")
    password: str | None = setting(
        None, parsers.optional(parsers.credential), "Password.", secret=True
    )
    token: str | None = setting(
        None, parsers.optional(parsers.credential), "Authentication token.", secret=True
    )
    nkey_seed_file: str | None = setting(
        None, parsers.optional(parsers.text), "File with an NKey seed (needs the extra `nkeys`)."
    )
    credentials_file: str | None = setting(
        None,
        parsers.optional(parsers.text),
        "Credentials file (JWT and seed; needs the extra `nkeys`).",
    )
    tls_ca_file: str | None = setting(
        None, parsers.optional(parsers.text), "CA certificates (PEM) to check the server with."
    )
    tls_cert_file: str | None = setting(
        None, parsers.optional(parsers.text), "Client certificate (PEM)."
    )
    tls_key_file: str | None = setting(
        None, parsers.optional(parsers.text), "Key of the client certificate."
    )
    tls_hostname: str | None = setting(
        None,
        parsers.optional(parsers.text),
        "Host name the server's certificate must carry, if not the URL's.",
    )
    reply_prefix: str = setting(
        "_INBOX",
        parsers.subject_prefix,
        "First tokens of the subjects that the server's answers come to, which NATS calls the "
        "inbox prefix: one for each user keeps them from reading each other's answers.",
    )
    connect_timeout: float = setting(
        2.0, parsers.positive_seconds, "Longest wait for one server to accept a connection."
    )
    publish_timeout: float = setting(
        5.0, parsers.positive_seconds, "Longest wait for a direct publish to be stored."
    )
    publish_in_flight: int = setting(
        4_000,
        parsers.integer(1),
        "Messages sent and not yet acknowledged; a publish beyond that is queued.",
    )
    publish_queue: int = setting(
        10_000,
        parsers.integer(1),
        "Messages of one process that may wait to be sent; a publish beyond that waits for room, "
        "at most its timeout.",
    )
    publish_queue_bytes: int = setting(
        64 * 1024 * 1024, parsers.integer(1), "The same in bytes of payload and headers."
    )
    stream_name: str | None = setting(
        None,
        parsers.optional(parsers.token),
        "Name of the main stream. Default: `{env}-events-stream`.",
    )
    stream_config: Mapping[str, Any] = setting(
        {},
        parsers.stream_config,
        "How the main stream is created: max_msgs, max_bytes, max_age, storage, replicas, "
        "duplicate_window, discard. An existing stream is never changed by it.",
    )
    dlq_stream_config: Mapping[str, Any] = setting(
        {},
        parsers.stream_config,
        "The same for the dead letter stream; its storage and replicas are else the main stream's.",
    )
    jetstream_domain: str | None = setting(
        None,
        parsers.optional(parsers.token),
        "The JetStream domain that has the streams, where it is not that of the server connected "
        "to: over a leaf node, say.",
    )
    jetstream_api_prefix: str | None = setting(
        None,
        parsers.optional(parsers.api_prefix),
        "First tokens of the subjects of JetStream's API, where they are not `$JS.API`: streams "
        "that another account shares are imported under a prefix.",
    )
    auto_setup: bool = setting(
        True, parsers.flag, "Create missing streams and add missing subjects on first connect."
    )
    concurrency: int = setting(
        10, parsers.integer(1), "Handler threads of a worker; at most so many messages at once."
    )
    prefetch: int = setting(
        1_000,
        parsers.integer(1),
        "Most messages of one subscriber that a worker has in hand; fewer where handlers are slow, "
        "but one for each of its handler threads.",
    )
    max_deliver: int = setting(
        5, parsers.integer(1), "Deliveries after which a message becomes a dead letter."
    )
    ack_wait: float = setting(
        30.0,
        parsers.positive_seconds,
        "Time after which the server redelivers a message it hears nothing of.",
    )
    backoff: tuple[float, ...] = setting(
        (1.0, 5.0, 15.0, 30.0, 60.0),
        parsers.backoff,
        "Waits before the redeliveries of a failed message; the last repeats; jitter is added.",
    )
    handler_timeout: float = setting(
        60.0, parsers.positive_seconds, "Time limit of a handler; after it the message is retried."
    )
    shutdown_timeout: float = setting(
        30.0, parsers.seconds, "How long a stopping worker waits for running handlers."
    )
    heartbeat_timeout: float = setting(
        30.0,
        parsers.positive_seconds,
        "A process of `worker --processes` that shows no sign of life for so long, or in which a "
        "loop hangs for so long, is killed and replaced.",
    )
    use_dlq: bool = setting(
        True, parsers.flag, "Keep messages given up on in the dead letter stream."
    )
    use_outbox: bool = setting(
        False,
        parsers.flag,
        "Publish through the outbox: a row in the caller's transaction, sent after its commit. "
        "Needs a database.",
    )
    use_inbox: bool = setting(
        False,
        parsers.flag,
        "Handlers' database effects happen once, for all subscribers. Needs a database.",
    )
    outbox_retention: float = setting(
        _DAY,
        parsers.seconds,
        "How long sent rows are kept: an acknowledgement of the stream is not yet on its disk, "
        "and the row is the durable copy.",
    )
    outbox_batch_size: int = setting(500, parsers.integer(1), "Rows the relay sends together.")
    outbox_poll_interval: float = setting(
        1.0,
        parsers.positive_seconds,
        "How often an idle relay looks for rows that no hint told it of.",
    )
    outbox_partitions: int = setting(
        1, parsers.integer(1), "Partitions of the outbox; each is relayed by one process at a time."
    )
    outbox_max_attempts: int = setting(
        10, parsers.integer(1), "Refusals by the server after which a row is parked."
    )
    outbox_resend_on_rewind: bool = setting(
        False,
        parsers.flag,
        "When a stream is found to have lost messages that it had acknowledged, send them again "
        "without being asked. Off: it is logged and shown by health and `doctor`.",
    )
    allow_volatile_streams: bool = setting(
        False,
        parsers.flag,
        "Let the outbox send to streams that keep messages in memory only, or acknowledge them "
        "before they are written.",
    )
    inbox_retention: float = setting(
        7 * _DAY, parsers.seconds, "How long handled event ids are remembered."
    )
    bind_key: str | None = setting(
        None,
        parsers.optional(parsers.text),
        "The Flask-SQLAlchemy bind of the outbox and inbox tables.",
    )
    monitor_url: str | None = setting(
        None,
        parsers.optional(parsers.text),
        "The server's monitoring address, such as `http://127.0.0.1:8222`, for `doctor`.",
        secret=True,
    )
    breaker_threshold: int = setting(
        10, parsers.integer(0), "Failed direct publishes in a row that open the circuit; 0: never."
    )
    breaker_reset: float = setting(
        5.0,
        parsers.positive_seconds,
        "Time after which an open circuit lets one publish try again.",
    )
    subscribers: tuple[str, ...] = setting(
        (), parsers.subscribers, "Modules and packages to import for their subscribers."
    )
    trace_header: str = setting(
        "X-Trace-ID", parsers.header_name, "HTTP header that carries the trace id in and out."
    )
    health_url_prefix: str | None = setting(
        None,
        parsers.optional(parsers.url_prefix),
        "Where to mount the health endpoints, such as `/health`.",
    )

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
        preset = _PRESETS.get(preset_name or "", {})
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
        """Key, value as text (secrets masked) and source of every setting."""
        return [
            (PREFIX + name.upper(), masked(name, getattr(self, name)), self.sources[name])
            for name in TABLE
        ]

    def __repr__(self) -> str:
        return f"<Settings {self.env}.{self.app_name} at {self.safe_urls}>"


#: The rows by the names of their settings, in order.
TABLE: Mapping[str, Row] = dict(zip(Settings.__struct_fields__, _rows, strict=False))


def masked(name: str, value: Any) -> str:
    """Return the value of a setting as text that may be shown: no password, no token."""
    if name == "urls" and isinstance(value, (str, list, tuple)):
        urls = [value] if isinstance(value, str) else value
        return ", ".join(mask_url(str(url)) for url in urls)
    if TABLE[name].secret and value is not None:
        return MASK
    return repr(value)


def mask_url(url: str) -> str:
    """Return ``url`` with all before its last ``@`` masked; it need not be a valid URL."""
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

    All apps with names in another script would be one app otherwise.
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
    """Warn of settings in the environment that the application did not take from there."""
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
