"""The settings in groups: name, type, default, check and help of each in one place.

A feature brings its own group. A Struct has one base, so each group extends the one before, and
``Settings`` extends the last; the documentation's configuration page has the same order.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from . import parsers
from .parsers import DAY
from .table import Row

PRESETS: dict[str, dict[str, Any]] = {
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


class ConnectionSettings(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Where the server is, who the application is, and how to sign in."""

    urls: Annotated[
        tuple[str, ...],
        Row(
            parsers.urls,
            "Servers to connect to: a URL or a list of URLs. `memory://` is a broker inside the "
            "process, for tests and single-process demos.",
            secret=True,
        ),
    ] = ("nats://127.0.0.1:4222",)
    env: Annotated[
        str, Row(parsers.token, "First token of every subject; keeps environments apart.")
    ] = "development"
    app_name: Annotated[
        str,
        Row(
            parsers.app_name,
            "Second token of every subject and the `producer` of messages. Default: the Flask "
            "app's name, slugged.",
        ),
    ] = ""
    preset: Annotated[
        str | None,
        Row(
            parsers.optional(lambda value: parsers.choice(value, tuple(PRESETS))),
            "A set of defaults: `development`, `testing` (memory broker) or `production`. "
            "Keys set explicitly win.",
        ),
    ] = None
    user: Annotated[str | None, Row(parsers.optional(parsers.credential), "User name.")] = None
    password: Annotated[
        str | None, Row(parsers.optional(parsers.credential), "Password.", secret=True)
    ] = None
    token: Annotated[
        str | None, Row(parsers.optional(parsers.credential), "Authentication token.", secret=True)
    ] = None
    nkey_seed_file: Annotated[
        str | None,
        Row(parsers.optional(parsers.text), "File with an NKey seed (needs the extra `nkeys`)."),
    ] = None
    credentials_file: Annotated[
        str | None,
        Row(
            parsers.optional(parsers.text),
            "Credentials file (JWT and seed; needs the extra `nkeys`).",
        ),
    ] = None
    tls_ca_file: Annotated[
        str | None,
        Row(parsers.optional(parsers.text), "CA certificates (PEM) to check the server with."),
    ] = None
    tls_cert_file: Annotated[
        str | None, Row(parsers.optional(parsers.text), "Client certificate (PEM).")
    ] = None
    tls_key_file: Annotated[
        str | None, Row(parsers.optional(parsers.text), "Key of the client certificate.")
    ] = None
    tls_hostname: Annotated[
        str | None,
        Row(
            parsers.optional(parsers.text),
            "Host name the server's certificate must carry, if not the URL's.",
        ),
    ] = None
    reply_prefix: Annotated[
        str,
        Row(
            parsers.subject_prefix,
            "First tokens of the subjects that the server's answers come to, which NATS calls the "
            "inbox prefix: one for each user keeps them from reading each other's answers.",
        ),
    ] = "_INBOX"
    connect_timeout: Annotated[
        float, Row(parsers.positive_seconds, "Longest wait for one server to accept a connection.")
    ] = 2.0


class PublishingSettings(ConnectionSettings, frozen=True, kw_only=True, eq=False):
    """Direct publishing."""

    publish_timeout: Annotated[
        float, Row(parsers.positive_seconds, "Longest wait for a direct publish to be stored.")
    ] = 5.0
    publish_in_flight: Annotated[
        int,
        Row(
            parsers.integer(1),
            "Messages sent and not yet acknowledged; a publish beyond that is queued.",
        ),
    ] = 4_000
    publish_queue: Annotated[
        int,
        Row(
            parsers.integer(1),
            "Messages of one process that may wait to be sent; a publish beyond that waits for "
            "room, "
            "at most its timeout.",
        ),
    ] = 10_000
    publish_queue_bytes: Annotated[
        int, Row(parsers.integer(1), "The same in bytes of payload and headers.")
    ] = 64 * 1024 * 1024


class StreamSettings(PublishingSettings, frozen=True, kw_only=True, eq=False):
    """The streams that the application uses."""

    stream_name: Annotated[
        str | None,
        Row(
            parsers.optional(parsers.token),
            "Name of the main stream. Default: `{env}-events-stream`.",
        ),
    ] = None
    stream_config: Annotated[
        Mapping[str, Any],
        Row(
            parsers.stream_config,
            "How the main stream is created: max_msgs, max_bytes, max_age, storage, replicas, "
            "duplicate_window, discard. An existing stream is never changed by it.",
        ),
    ] = {}
    dlq_stream_config: Annotated[
        Mapping[str, Any],
        Row(
            parsers.stream_config,
            "The same for the dead letter stream; its storage and replicas are else the main "
            "stream's.",
        ),
    ] = {}
    jetstream_domain: Annotated[
        str | None,
        Row(
            parsers.optional(parsers.token),
            "The JetStream domain that has the streams, where it is not that of the server "
            "connected "
            "to: over a leaf node, say.",
        ),
    ] = None
    jetstream_api_prefix: Annotated[
        str | None,
        Row(
            parsers.optional(parsers.api_prefix),
            "First tokens of the subjects of JetStream's API, where they are not `$JS.API`: "
            "streams "
            "that another account shares are imported under a prefix.",
        ),
    ] = None
    auto_setup: Annotated[
        bool, Row(parsers.flag, "Create missing streams and add missing subjects on first connect.")
    ] = True


class WorkerSettings(StreamSettings, frozen=True, kw_only=True, eq=False):
    """Workers, and the defaults of subscribers' options."""

    concurrency: Annotated[
        int,
        Row(
            parsers.integer(1),
            "Handler threads of a worker: the limit of messages handled at once.",
        ),
    ] = 10
    prefetch: Annotated[
        int,
        Row(
            parsers.integer(1),
            "Most messages of one subscriber that a worker has in hand; fewer where handlers are "
            "slow, "
            "but one for each of its handler threads.",
        ),
    ] = 1_000
    max_deliver: Annotated[
        int, Row(parsers.integer(1), "Deliveries after which a message becomes a dead letter.")
    ] = 5
    ack_wait: Annotated[
        float,
        Row(
            parsers.positive_seconds,
            "Time after which the server redelivers a message it hears nothing of.",
        ),
    ] = 30.0
    backoff: Annotated[
        tuple[float, ...],
        Row(
            parsers.backoff,
            "Waits before the redeliveries of a failed message; the last repeats; jitter is added.",
        ),
    ] = (1.0, 5.0, 15.0, 30.0, 60.0)
    handler_timeout: Annotated[
        float,
        Row(parsers.positive_seconds, "Time limit of a handler; after it the message is retried."),
    ] = 60.0
    shutdown_timeout: Annotated[
        float, Row(parsers.seconds, "How long a stopping worker waits for running handlers.")
    ] = 30.0
    heartbeat_timeout: Annotated[
        float,
        Row(
            parsers.positive_seconds,
            "A process of `worker --processes` that shows no sign of life for so long, or in "
            "which a "
            "loop hangs for so long, is killed and replaced.",
        ),
    ] = 30.0
    use_dlq: Annotated[
        bool, Row(parsers.flag, "Keep messages given up on in the dead letter stream.")
    ] = True


class DatabaseSettings(WorkerSettings, frozen=True, kw_only=True, eq=False):
    """The outbox and the inbox."""

    use_outbox: Annotated[
        bool,
        Row(
            parsers.flag,
            "Publish through the outbox: a row in the caller's transaction, sent after its commit. "
            "Needs a database.",
        ),
    ] = False
    use_inbox: Annotated[
        bool,
        Row(
            parsers.flag,
            "Handlers' database effects happen once, for all subscribers. Needs a database.",
        ),
    ] = False
    outbox_retention: Annotated[
        float,
        Row(
            parsers.seconds,
            "How long sent rows are kept: an acknowledgement of the stream is not yet on its disk, "
            "and the row is the durable copy.",
        ),
    ] = DAY
    outbox_batch_size: Annotated[int, Row(parsers.integer(1), "Rows the relay sends together.")] = (
        500
    )
    outbox_poll_interval: Annotated[
        float,
        Row(
            parsers.positive_seconds,
            "How often an idle relay looks for rows of which no wake-up came.",
        ),
    ] = 1.0
    outbox_partitions: Annotated[
        int,
        Row(
            parsers.integer(1),
            "Partitions of the outbox; each is relayed by one process at a time.",
        ),
    ] = 1
    outbox_max_attempts: Annotated[
        int, Row(parsers.integer(1), "Refusals by the server after which a row is parked.")
    ] = 10
    outbox_resend_on_rewind: Annotated[
        bool,
        Row(
            parsers.flag,
            "When a stream is found to have lost messages that it had acknowledged, send them "
            "again "
            "without being asked. Off: it is logged and shown by health and `doctor`.",
        ),
    ] = False
    allow_volatile_streams: Annotated[
        bool,
        Row(
            parsers.flag,
            "Let the outbox send to streams that keep messages in memory only, or acknowledge them "
            "before they are written.",
        ),
    ] = False
    inbox_retention: Annotated[
        float, Row(parsers.seconds, "How long handled event ids are remembered.")
    ] = 7 * DAY
    bind_key: Annotated[
        str | None,
        Row(
            parsers.optional(parsers.text),
            "The Flask-SQLAlchemy bind of the outbox and inbox tables.",
        ),
    ] = None


class AppSettings(DatabaseSettings, frozen=True, kw_only=True, eq=False):
    """Monitoring, the circuit breaker, and what is added to the Flask app."""

    monitor_url: Annotated[
        str | None,
        Row(
            parsers.optional(parsers.text),
            "The server's monitoring address, such as `http://127.0.0.1:8222`, for `doctor`.",
            secret=True,
        ),
    ] = None
    breaker_threshold: Annotated[
        int,
        Row(
            parsers.integer(0), "Failed direct publishes in a row that open the circuit; 0: never."
        ),
    ] = 10
    breaker_reset: Annotated[
        float,
        Row(
            parsers.positive_seconds, "Time after which an open circuit lets one publish try again."
        ),
    ] = 5.0
    subscribers: Annotated[
        tuple[str, ...],
        Row(parsers.subscribers, "Modules and packages to import for their subscribers."),
    ] = ()
    trace_header: Annotated[
        str, Row(parsers.header_name, "HTTP header that carries the trace id in and out.")
    ] = "X-Trace-ID"
    health_url_prefix: Annotated[
        str | None,
        Row(
            parsers.optional(parsers.url_prefix),
            "Where to mount the health endpoints, such as `/health`.",
        ),
    ] = None
